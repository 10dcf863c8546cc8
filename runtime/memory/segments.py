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
        self._shifted = False

    def __bool__(self) -> bool:
        return bool(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def copy(self) -> Segments:
        other = Segments()
        other._segments = list(self._segments)
        other._starts = list(self._starts)
        other._shifted = self._shifted
        return other

    @property
    def bytes(self) -> int:
        return sum(segment.end - segment.start for segment in self._segments)

    def add(self, segment: Segment) -> None:
        """Put one in where none is."""
        index = bisect_right(self._starts, segment.start)
        self._segments.insert(index, segment)
        self._starts.insert(index, segment.start)

    def part(self, spans: Iterable[tuple[int, int]]) -> Segments:
        """Take these spans, ascending, out of segments that nothing was done to yet; what was taken."""
        taken, left = Segments(), Segments()
        wanted = [span for span in spans if span[0] < span[1]]
        index = 0
        for segment in self._segments:
            at = segment.start
            while index < len(wanted) and wanted[index][1] <= at:
                index += 1
            while index < len(wanted) and wanted[index][0] < segment.end:
                start, end = max(at, wanted[index][0]), min(wanted[index][1], segment.end)
                left._append(segment, at, start)
                taken._append(segment, start, end)
                at = end
                if wanted[index][1] > segment.end:
                    break  # it reaches into the next one
                index += 1
            left._append(segment, at, segment.end)
        self._segments, self._starts = left._segments, left._starts
        return taken

    def _append(self, segment: Segment, start: int, end: int) -> None:
        if start < end:
            self._segments.append(_clip(segment, start, end))
            self._starts.append(start)

    def take_stored(self, start: int, end: int) -> list[Segment]:
        """Take out what lies between these offsets of the store, wherever it is in memory by now."""
        if not self._shifted:
            return self.cut(start, end)
        found = []
        for segment in list(self._segments):
            shift = segment.start - segment.offset
            found += self.cut(max(segment.start, start + shift), min(segment.end, end + shift))
        return found

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
        self._shifted = self._shifted or bool(moved)
        for segment in moved:
            self.add(Segment(segment.start + shift, segment.end + shift, segment.offset))


def _clip(segment: Segment, start: int, end: int) -> Segment:
    low, high = max(segment.start, start), min(segment.end, end)
    return Segment(low, high, segment.offset + low - segment.start)
