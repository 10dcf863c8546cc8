"""Pages made smaller for the link, a message's worth at a time, and made whole again on the other side.

``auto`` asks for each piece which way takes least time: the processor's, measured as it is used, or the link's,
measured as it takes what is sent, of a piece that is as compressible as a sample of it. What does not get smaller goes
as it is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from migrate.errors import ProtocolViolation
from transport.api import MAX_BODY_BYTES

Compress = Literal["auto", "none", "lz4", "zstd"]
WAYS = ("lz4", "zstd")
"""What this version can unpack."""

PLAIN = "none"
LEVEL = 1
"""Of zstd: higher ones cost several times as much for a tenth less."""
SAMPLE_BYTES, SAMPLES = 4096, 16
LEAST_GAIN = 0.75
"""A way must be foreseen to take at most this share of the time that going plain takes."""
WORTH = 0.95
"""What was packed and is not smaller than this share goes plain."""
SMALLEST_BYTES = 64 << 10
# Where nothing has been measured yet: one core of a server of these years, in bytes a second.
_FIRST_GUESS_BPS = {"lz4": 700e6, "zstd": 300e6}
_MEMORY = 0.7  # Share of what was measured before in a new estimate.


@dataclass(frozen=True, kw_only=True)
class Packed:
    way: str
    body: memoryview | bytes

    def fields(self) -> dict[str, object]:
        """What the announcing message says of it; nothing where it is plain, which every version understands."""
        return {} if self.way == PLAIN else {"packed": self.way, "packed_bytes": len(self.body)}


class LinkMeter:
    """How fast the link takes bytes, from how long sending blocked. One that never blocks is as fast as it was fed."""

    def __init__(self) -> None:
        self.rate_Bps = 0.0
        self._before_s: float | None = None

    def sent(self, wire_bytes: int, began_s: float, ended_s: float) -> None:
        before, self._before_s = self._before_s, ended_s
        if before is None or ended_s <= before:
            return
        rate = wire_bytes / (ended_s - before)
        # Buffers drain while the next piece is made: of the whole time only when it was the link that was waited for.
        if 2 * (ended_s - began_s) >= ended_s - before:
            self.rate_Bps = _MEMORY * self.rate_Bps + (1 - _MEMORY) * rate if self.rate_Bps else rate
        else:
            self.rate_Bps = max(self.rate_Bps, rate)


class Packer:
    """Of one move's source. ``allow`` what the target can unpack; until then everything goes plain. One thread."""

    def __init__(self, wanted: Compress = "none", *, now: Callable[[], float] = time.perf_counter) -> None:
        self._wanted = wanted
        self._now = now
        self._allowed: tuple[str, ...] = ()
        self._compress: dict[str, Callable[[memoryview], bytes]] = {}
        self._speed_Bps = dict(_FIRST_GUESS_BPS)
        self.link = LinkMeter()
        self.memory_bytes: Counter[str] = Counter()
        """By the way they went."""

    def allow(self, ways: Collection[str]) -> None:
        """Loads the libraries, so that a blackout does not."""
        chosen = () if self._wanted == PLAIN else WAYS if self._wanted == "auto" else (self._wanted,)
        self._allowed = tuple(way for way in chosen if way in ways)
        for way in self._allowed:
            self._compress[way] = _compressor(way)

    def pack(self, data: memoryview) -> Packed:
        """In the way that is best for it. What it returns is good as long as ``data`` is."""
        way = self._way(data)
        if way != PLAIN:
            body = self._timed(way, data)
            if len(body) <= WORTH * len(data):
                self.memory_bytes[way] += len(data)
                return Packed(way=way, body=body)
        self.memory_bytes[PLAIN] += len(data)
        return Packed(way=PLAIN, body=data)

    def _way(self, data: memoryview) -> str:
        if not self._allowed or len(data) < SMALLEST_BYTES:
            return PLAIN
        if self._wanted != "auto":
            return self._allowed[0]
        # A link that is faster than the fastest way is not worth a look at the piece.
        fastest_Bps = max(self._speed_Bps[way] for way in self._allowed)
        if not self.link.rate_Bps or self.link.rate_Bps > LEAST_GAIN * fastest_Bps:
            return PLAIN
        sample = memoryview(_sample(data))
        # Each time all ways: one that was slow once, on a processor that had other work, is not out for good.
        ratios = {way: len(self._timed(way, sample)) / len(sample) for way in self._allowed}
        return best_way(ratios, self._speed_Bps, self.link.rate_Bps)

    def _timed(self, way: str, data: memoryview) -> bytes:
        begin = self._now()
        body = self._compress[way](data)
        speed = len(data) / max(self._now() - begin, 1e-6)
        self._speed_Bps[way] = _MEMORY * self._speed_Bps[way] + (1 - _MEMORY) * speed
        return body


def best_way(ratios: Mapping[str, float], speeds_Bps: Mapping[str, float], link_Bps: float) -> str:
    """The way whose slower half, packing or the link, takes the shortest, if that is worth it."""
    times = {way: max(1 / speeds_Bps[way], ratio / link_Bps) for way, ratio in ratios.items()}
    best = min(times, key=lambda way: times[way], default=PLAIN)
    return best if best in times and times[best] <= LEAST_GAIN / link_Bps else PLAIN


def _sample(data: memoryview) -> bytes:
    """Pages from all over it, together."""
    step = max(len(data) // SAMPLES, SAMPLE_BYTES) & -SAMPLE_BYTES
    return b"".join(data[start : start + SAMPLE_BYTES] for start in range(0, len(data), step))


def _compressor(way: str) -> Callable[[memoryview], bytes]:
    if way == "lz4":
        import lz4.block

        return lambda data: bytes(lz4.block.compress(data, store_size=False))
    import zstandard

    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    return compressor.compress


# On the target. The peer is not trusted.


def unpacking(
    message: Mapping[str, Any], memory_bytes: int, receive: Callable[[memoryview], None]
) -> Callable[[memoryview], None]:
    """What fills memory with the pages that this message announced, ``memory_bytes`` long; ``receive`` fills it with
    what comes. Both raise ProtocolViolation."""
    way, length = packed_of(message, memory_bytes)

    def receive_packed(view: memoryview) -> None:
        body = bytearray(length)
        receive(memoryview(body))
        unpack(way, body, view)

    return receive if way == PLAIN else receive_packed


def packed_of(message: Mapping[str, Any], memory_bytes: int) -> tuple[str, int]:
    """How the data of this message comes, and how long it is. Raises ProtocolViolation."""
    if memory_bytes > MAX_BODY_BYTES:
        raise ProtocolViolation(f"{memory_bytes} bytes of memory were announced at once")
    way, length = message.get("packed", PLAIN), message.get("packed_bytes", memory_bytes)
    if way == PLAIN:
        return PLAIN, memory_bytes
    if way not in WAYS:
        raise ProtocolViolation("memory came packed in a way that nobody asked for")
    if not isinstance(length, int) or not 0 < length <= memory_bytes:
        raise ProtocolViolation("memory came packed and is longer than it was")
    return str(way), length


def unpack(way: str, body: bytes | bytearray | memoryview, view: memoryview) -> None:
    """Fill ``view`` exactly. Never takes more memory than that again, whatever the body claims. Raises
    ProtocolViolation."""
    try:
        plain = _unpacked(way, body, len(view))
    except Exception as error:  # each library has classes of its own, some of them not public
        raise ProtocolViolation(f"memory that came packed can not be unpacked: {error}") from error
    if len(plain) != len(view):
        raise ProtocolViolation(f"packed memory has {len(plain)} bytes, {len(view)} were announced")
    view[:] = plain


def _unpacked(way: str, body: bytes | bytearray | memoryview, length: int) -> bytes:
    if way == "lz4":
        import lz4.block

        return bytes(lz4.block.decompress(body, uncompressed_size=length))
    import zstandard

    # The library trusts the size in the frame, so that is looked at first; a frame without it has nothing to claim.
    claimed = zstandard.get_frame_parameters(bytes(body[:18])).content_size
    if claimed != length:
        raise ValueError(f"its frame claims {claimed} bytes, {length} were announced")
    return zstandard.ZstdDecompressor().decompress(body, max_output_size=length, allow_extra_data=False)
