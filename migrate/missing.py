"""Which memory a target lacks after the switch, and how it tells the source so when the link has been away.

The target's book is the one that counts: what it has not got, the source sends, whatever was on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from migrate.errors import ProtocolViolation
from migrate.incoming import memory_of
from migrate.outgoing import RUNS_PER_MESSAGE
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges
from runtime.memory.segments import Segments

MISSING = "missing"
Span = tuple[int, int]
"""(start, end) in bytes, whole pages."""


class MissingMemory:
    """The target's book, by pid inside. ``remote`` is what the source has kept back: nothing else may come."""

    def __init__(self, remote: Mapping[int, PageRanges]) -> None:
        self._remote = {pid: Segments(ranges.spans()) for pid, ranges in remote.items() if ranges}
        self._left = {pid: segments.copy() for pid, segments in self._remote.items()}
        self.bytes = sum(segments.bytes for segments in self._left.values())

    def must_be_expected(self, pid: int, spans: Iterable[Span]) -> None:
        """Raises ProtocolViolation for a page that was not kept back."""
        remote = self._remote.get(pid)
        if remote is None or not all(_covers(remote, start, end) for start, end in spans):
            raise ProtocolViolation(f"memory of task {pid} came, which was not kept back")

    def come(self, pid: int, start: int, end: int) -> list[Span]:
        """These pages are here. Those of them that were not before: the others are memory by now, and may have been
        written to."""
        pieces = self._left[pid].cut(start, end)
        self.bytes -= sum(piece.end - piece.start for piece in pieces)
        return [(piece.start, piece.end) for piece in pieces]

    def lacks(self, pid: int, address: int) -> bool:
        return pid in self._left and self._left[pid].at(address) is not None

    def messages(self) -> Iterator[dict[str, Any]]:
        """All that is missing, for the source; ``bytes`` together."""
        for pid, segments in self._left.items():
            flat = [number for piece in segments for number in (piece.start, (piece.end - piece.start) // PAGE_BYTES)]
            for first in range(0, len(flat), 2 * RUNS_PER_MESSAGE):
                yield {"type": MISSING, "id": pid, "runs": flat[first : first + 2 * RUNS_PER_MESSAGE]}


def hear_missing(
    receive: Callable[[], Mapping[str, Any]], total_bytes: int, kept: Mapping[int, PageRanges]
) -> dict[int, PageRanges]:
    """What the target lacks: its messages up to so many bytes. ``kept`` is all that was ever kept back for it.

    Raises ProtocolViolation where it names anything else, or a page twice, and what ``receive`` does.
    """
    if total_bytes > sum(ranges.bytes for ranges in kept.values()):
        raise ProtocolViolation("the target lacks more memory than was kept back for it")
    spans: dict[int, list[Span]] = {}
    left = total_bytes
    while left:
        message = receive()
        if message.get("type") != MISSING:
            raise ProtocolViolation(f"{left} bytes were to be named as missing, and another message came")
        pid, runs, _same = memory_of(message, "runs", "runs")
        left -= sum(pages for _address, pages in runs) * PAGE_BYTES
        if left < 0 or not runs or any(address % PAGE_BYTES or not pages for address, pages in runs):
            raise ProtocolViolation("what is missing does not fit")
        spans.setdefault(pid, []).extend((address, address + pages * PAGE_BYTES) for address, pages in runs)
    found = {pid: PageRanges.from_spans(listed) for pid, listed in spans.items()}
    named_once = sum(ranges.bytes for ranges in found.values()) == total_bytes
    if not named_once or any(ranges - kept.get(pid, EMPTY) for pid, ranges in found.items()):
        raise ProtocolViolation("the target lacks memory that was not kept back for it")
    return found


def _covers(segments: Segments, start: int, end: int) -> bool:
    while start < end:
        segment = segments.at(start)
        if segment is None:
            return False
        start = segment.end
    return True
