"""The wire form of frames: what is written is read, and nothing else is."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.api import MAX_BODY_BYTES, MAX_CONTROL_BYTES, MAX_TAG, Frame, FrameKind, ProtocolError
from transport.frames import HEADER_BYTES, Decoder, decode_header, encode_header

frames = st.builds(Frame, st.sampled_from(FrameKind), st.integers(0, MAX_TAG), st.binary(max_size=300))


def encode(frame: Frame) -> bytes:
    return encode_header(frame.kind, frame.tag, len(frame.body)) + bytes(frame.body)


def test_the_header_has_the_documented_form() -> None:
    header = encode_header(FrameKind.DATA, 0x0102030405060708, 0x00010203)
    assert header[:20] == b"CMG1\x02\x00\x00\x00\x00\x01\x02\x03\x01\x02\x03\x04\x05\x06\x07\x08"
    assert len(header) == HEADER_BYTES == 24


@given(st.lists(frames, max_size=8), st.lists(st.integers(1, 400), min_size=1))
def test_any_split_of_the_stream_gives_the_same_frames(sent: list[Frame], sizes: list[int]) -> None:
    stream = b"".join(map(encode, sent))
    decoder = Decoder()
    received = []
    position = turn = 0
    while position < len(stream):
        size = sizes[turn % len(sizes)]
        received += decoder.feed(stream[position : position + size])
        position += size
        turn += 1
    assert received == sent
    assert decoder.position == ""


@given(frames, st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_of_a_header_is_refused(frame: Frame, bit: int) -> None:
    header = bytearray(encode(frame)[:HEADER_BYTES])
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        decode_header(header)


@given(st.binary(max_size=600))
@settings(max_examples=300)
def test_random_bytes_give_frames_or_an_error_and_no_large_memory(garbage: bytes) -> None:
    tracemalloc.start()
    try:
        Decoder().feed(garbage)
    except ProtocolError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 256 * 1024


@pytest.mark.parametrize(("kind", "limit"), [(FrameKind.CONTROL, MAX_CONTROL_BYTES), (FrameKind.DATA, MAX_BODY_BYTES)])
def test_limits_hold_when_writing_and_when_reading(kind: FrameKind, limit: int) -> None:
    assert decode_header(encode_header(kind, 1, limit)).length == limit
    with pytest.raises(ProtocolError, match="longer than the limit"):
        encode_header(kind, 1, limit + 1)


@pytest.mark.parametrize("tag", [-1, MAX_TAG + 1])
def test_a_tag_beyond_64_bits_is_refused(tag: int) -> None:
    with pytest.raises(ProtocolError, match="64 bits"):
        encode_header(FrameKind.DATA, tag, 0)


def test_the_error_shows_what_a_foreign_program_said() -> None:
    with pytest.raises(ProtocolError, match="SSH-2.0-OpenSSH") as caught:
        Decoder().feed(b"SSH-2.0-OpenSSH_9.2p1 Debian")
    assert "shell" in caught.value.hint


def test_the_position_in_a_frame_is_told() -> None:
    decoder = Decoder()
    data = encode(Frame.data(1, b"0123456789"))
    decoder.feed(data[:5])
    assert decoder.position == "after 5 of 24 bytes of a frame's header"
    decoder.feed(data[5:27])
    assert decoder.position == "after 3 of 10 bytes of a frame's body"
