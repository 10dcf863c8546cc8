"""Packing pages for the link: which way, and what an untrusted peer can do with it."""

from __future__ import annotations

import os
import tracemalloc
from typing import Any

import lz4.block
import pytest
import zstandard

from migrate.errors import ProtocolViolation
from migrate.packing import PLAIN, WAYS, Compress, LinkMeter, Packed, Packer, best_way, packed_of, unpack, unpacking
from transport.api import MAX_BODY_BYTES

MIB = 1 << 20
TEXT = memoryview((b"the same words again and again, with a number: %08d\n" * 16 % tuple(range(16))) * 5000)[:MIB]
NOISE = memoryview(os.urandom(MIB))


def packer(wanted: Compress, link_Bps: float = 0.0) -> Packer:
    made = Packer(wanted)
    made.allow(WAYS)
    made.link.rate_Bps = link_Bps
    return made


def carried(packed: Packed, length: int) -> bytes:
    """Through the checks of the receiving side."""
    message: dict[str, Any] = {"type": "memory", **packed.fields()}
    view = memoryview(bytearray(length))

    def receive(into: memoryview) -> None:
        into[:] = packed.body

    unpacking(message, length, receive)(view)
    return bytes(view)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("data", [TEXT, NOISE, memoryview(bytes(4096)), memoryview(b"\0" * MIB)])
def test_what_was_packed_comes_out(way: Compress, data: memoryview) -> None:
    assert carried(packer(way).pack(data), len(data)) == bytes(data)


@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_get_smaller_goes_as_it_is(way: Compress) -> None:
    made = packer(way)
    assert made.pack(NOISE).way == PLAIN
    assert made.pack(TEXT).way == way
    assert made.memory_bytes == {PLAIN: MIB, way: MIB}


def test_nothing_is_packed_for_a_target_that_can_not_unpack_it() -> None:
    older = Packer("lz4")
    assert older.pack(TEXT).way == PLAIN
    older.allow(())
    assert older.pack(TEXT).way == PLAIN
    assert older.pack(TEXT).fields() == {}


def test_auto_packs_for_a_slow_link_and_not_for_a_fast_one() -> None:
    assert packer("auto", link_Bps=1e6).pack(TEXT).way in WAYS
    assert packer("auto", link_Bps=100e9).pack(TEXT).way == PLAIN


def test_auto_leaves_alone_what_a_sample_shows_to_be_noise() -> None:
    made = packer("auto", link_Bps=1e6)
    assert made.pack(NOISE).way == PLAIN
    assert made.memory_bytes == {PLAIN: MIB}


def test_auto_sends_as_it_is_until_it_knows_the_link() -> None:
    assert packer("auto").pack(TEXT).way == PLAIN


@pytest.mark.parametrize(
    ("link_Bps", "ratios", "best"),
    [
        (10e6, {"lz4": 0.5, "zstd": 0.3}, "zstd"),  # the link is all that counts
        (400e6, {"lz4": 0.5, "zstd": 0.3}, "lz4"),  # zstd itself would take longer than the link
        (900e6, {"lz4": 0.5, "zstd": 0.3}, PLAIN),
        (10e6, {"lz4": 0.9, "zstd": 0.8}, PLAIN),  # not worth it
        (10e6, {"lz4": 0.9, "zstd": 0.6}, "zstd"),
        (10e6, {}, PLAIN),
    ],
)
def test_the_way_with_the_shortest_time_is_taken(link_Bps: float, ratios: dict[str, float], best: str) -> None:
    assert best_way(ratios, {"lz4": 700e6, "zstd": 300e6}, link_Bps) == best


def test_a_link_that_blocks_is_measured_over_the_whole_time() -> None:
    meter = LinkMeter()
    meter.sent(0, 0.0, 0.0)
    for begin in range(20):
        meter.sent(10_000_000, begin + 0.2, begin + 1.0)  # 0.2 s of packing, during which buffers drain
    assert meter.rate_Bps == pytest.approx(10e6, rel=0.01)


def test_a_link_that_never_blocks_is_as_fast_as_it_was_fed() -> None:
    meter = LinkMeter()
    meter.sent(0, 0.0, 0.0)
    meter.sent(5_000_000, 0.99, 1.0)
    meter.sent(8_000_000, 1.99, 2.0)
    meter.sent(1_000_000, 2.99, 3.0)
    assert meter.rate_Bps == 8e6


def test_a_link_that_got_slower_is_noticed() -> None:
    meter = LinkMeter()
    meter.sent(0, 0.0, 0.0)
    meter.sent(100_000_000, 0.0, 0.1)
    for step in range(20):
        meter.sent(1_000_000, 1.0 + step, 2.0 + step)
    assert meter.rate_Bps < 3e6


# A peer that lies


@pytest.mark.parametrize(
    "fields",
    [
        {"packed": "brotli", "packed_bytes": 10},
        {"packed": 1, "packed_bytes": 10},
        {"packed": ["lz4"], "packed_bytes": 10},
        {"packed": "lz4", "packed_bytes": 0},
        {"packed": "lz4", "packed_bytes": -1},
        {"packed": "lz4", "packed_bytes": "10"},
        {"packed": "zstd", "packed_bytes": 4097},
    ],
)
def test_an_announcement_that_does_not_fit_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        packed_of(fields, 4096)


def test_more_memory_than_a_frame_can_hold_is_refused_before_it_is_taken() -> None:
    with pytest.raises(ProtocolViolation, match="at once"):
        packed_of({}, MAX_BODY_BYTES + 4096)


def bombs() -> dict[str, tuple[str, bytes]]:
    zeros = bytes(64 * MIB)
    sizeless = zstandard.ZstdCompressor(write_content_size=False)
    return {
        "lz4": ("lz4", lz4.block.compress(zeros, store_size=False)),
        "zstd": ("zstd", zstandard.compress(zeros)),
        "zstd without a size": ("zstd", sizeless.compress(zeros)),
        "zstd that lies about its size": ("zstd", lying_frame(zeros)),
    }


def lying_frame(content: bytes) -> bytes:
    """A frame of 64 MiB that claims one page: eight bytes of size, single segment (RFC 8878, 3.1.1.1)."""
    frame = bytearray(zstandard.compress(content))
    header = zstandard.frame_header_size(bytes(frame))
    return bytes(frame[:4]) + bytes([0xE0]) + (4096).to_bytes(8, "little") + bytes(frame[header:])


@pytest.mark.parametrize("name", list(bombs()))
def test_a_bomb_is_refused_and_takes_no_memory(name: str) -> None:
    way, body = bombs()[name]
    view = memoryview(bytearray(4096))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolViolation):
            unpack(way, body, view)
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [b"", b"x", os.urandom(500), b"\x28\xb5\x2f\xfd" + bytes(30)])
def test_garbage_is_refused(way: str, body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        unpack(way, body, memoryview(bytearray(4096)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [MIB - 4096, MIB + 4096])
def test_another_length_than_announced_is_refused(way: Compress, length: int) -> None:
    packed = packer(way).pack(TEXT)
    with pytest.raises(ProtocolViolation):
        unpack(way, packed.body, memoryview(bytearray(length)))
