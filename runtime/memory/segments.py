"""Which memory of a process is still to be filled, and where in the store its pages lie. Pure, stdlib only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Segment(NamedTuple):
    """Memory from ``start`` to ``end`` whose pages lie in the store from ``offset`` on."""

    start: int
    end: int
    offset: int


class Segments:
    """Disjoint segments in order of address. Numbers are bytes, multiples of a page."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        """In a store each page lies at its own address, so that is where they all begin."""
        self._segments = [Segment(start, end, start) for start, end in sorted(spans) if start < end]
        self._starts = [segment.start for segment in self._segments]

    def __bool__(self) -> bool:
        return bool(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def copy(self) -> Segments:
        other = Segments()
        other._segments = list(self._segments)
        other._starts = list(self._starts)
        return other

    def at(self, address: int) -> Segment | None:
        """The segment that holds this address."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._segments[index].end:
            return self._segments[index]
        return None

    def first(self, start: int = 0, end: int = 1 << 64) -> Segment | None:
        """The lowest segment within these bounds, clipped to them."""
        index = max(0, bisect_right(self._starts, start) - 1)
        for segment in self._segments[index : index + 2]:
            if max(segment.start, start) < min(segment.end, end):
                return _clip(segment, start, end)
        return None

    def cut(self, start: int, end: int) -> list[Segment]:
        """Take everything between these addresses out; what was taken."""
        if start >= end:
            return []
        low = bisect_right(self._starts, start) - 1
        if low < 0 or self._segments[low].end <= start:
            low += 1
        high = low
        while high < len(self._segments) and self._segments[high].start < end:
            high += 1
        touched = self._segments[low:high]
        left: list[Segment] = []
        if touched and touched[0].start < start:
            left.append(_clip(touched[0], touched[0].start, start))
        if touched and touched[-1].end > end:
            left.append(_clip(touched[-1], end, touched[-1].end))
        self._segments[low:high] = left
        self._starts[low:high] = [segment.start for segment in left]
        return [_clip(segment, start, end) for segment in touched]

    def move(self, source: int, destination: int, length_bytes: int) -> None:
        """The memory moved (mremap): its pages stay where they are in the store."""
        moved = self.cut(source, source + length_bytes)
        self.cut(destination, destination + length_bytes)
        shift = destination - source
        for segment in moved:
            index = bisect_right(self._starts, segment.start + shift)
            self._segments.insert(index, Segment(segment.start + shift, segment.end + shift, segment.offset))
            self._starts.insert(index, segment.start + shift)


def _clip(segment: Segment, start: int, end: int) -> Segment:
    low, high = max(segment.start, start), min(segment.end, end)
    return Segment(low, high, segment.offset + low - segment.start)
