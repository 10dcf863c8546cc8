"""The container's shared memory on its way out: in rounds while it runs, what changed since when nothing of it runs.

CRIU does not get to see these segments (runtime/criu/filter). What changed is found by comparing contents, because no
page table tells of writers that have ended or that write by descriptor. The last comparison runs beside CRIU's dump,
and what it finds goes over while the target restores; post-copy, whose channel is in use then, has it before that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from migrate.fields import SharedPlace
from migrate.outgoing import PAGE_BYTES, RUNS_PER_MESSAGE, Outgoing
from runtime.criu.filter.table import HiddenSegment
from runtime.memory import maps
from runtime.memory.maps import Kind
from runtime.memory.open_segment import OpenSegment, open_segment
from runtime.memory.ranges import EMPTY, PageRanges
from runtime.memory.reader import PIECE_BYTES, Range
from runtime.memory.tasks import AddressSpace, pid_inside

# What is smaller is left to CRIU, which has it in the time that the messages about it would take.
LEAST_BYTES = 128 << 10
MAX_SEGMENTS = 256
SHARED_COMPLETE = "shared-complete"
ZEROS = memoryview(bytes(PIECE_BYTES))


@dataclass(kw_only=True)
class _Known:
    """``held``: pages of which the target has some content. ``pending``: those whose present content it lacks, as of
    the last look; ``dirty``: of these, those that changed since they were sent; ``hot``: twice running."""

    segment: OpenSegment
    existing: PageRanges = EMPTY
    held: PageRanges = EMPTY
    pending: PageRanges = EMPTY
    dirty: PageRanges = EMPTY
    hot: PageRanges = EMPTY


@dataclass(kw_only=True)
class SharedSource:
    """``in_rounds``: ``scan`` and ``send`` are called while the container runs; else everything goes at the end."""

    out: Outgoing
    in_rounds: bool
    open_segment: Callable[[int, maps.Mapping], OpenSegment | None] = open_segment
    sent_before_bytes: int = 0
    """Of memory, while the container ran."""
    sent_after_bytes: int = 0
    places: tuple[SharedPlace, ...] = ()
    """After ``finish``: what is not in CRIU's images, and where it is mapped."""
    _known: dict[int, _Known] = field(default_factory=dict)
    _left: set[int] = field(default_factory=set)
    _comparison: _Comparison | None = None
    _buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(PIECE_BYTES)))

    @property
    def dirty_bytes(self) -> int:
        return sum(known.dirty.bytes for known in self._known.values())

    @property
    def hot_bytes(self) -> int:
        return sum(known.hot.bytes for known in self._known.values())

    @property
    def pending_bytes(self) -> int:
        return sum(known.pending.bytes for known in self._known.values())

    def scan(self, spaces: Iterable[AddressSpace]) -> None:
        """What differs from what was sent. Reads all of it: 0.3 s for each GiB."""
        if not self.in_rounds:
            return
        mapped = self._open_what_is_mapped(spaces)
        for number in set(self._known) - set(mapped):
            # First out of what is known: should the link break now, nothing of it is sent again.
            gone = self._known.pop(number)
            self._forget(number, gone, EMPTY)
            gone.segment.close()
        for known in self._known.values():
            known.existing = known.segment.existing()
            known.pending = known.segment.differing(known.existing)
            # Before anything was sent it is not known what changes.
            dirty = known.pending if known.held else EMPTY
            known.hot, known.dirty = dirty & known.dirty, dirty

    def send(self, *, defer_hot: bool = False) -> int:
        """Copy what is pending, without hot pages if so told. Bytes of memory looked at."""
        looked_at = 0
        for number, known in self._known.items():
            wanted = known.pending - known.hot if defer_hot else known.pending
            self._forget(number, known, known.existing)
            self._copy(number, known, wanted)
            known.segment.look_ahead(known.existing)
            looked_at += wanted.bytes
        self.sent_before_bytes += looked_at
        return looked_at

    def finish(self, spaces: Sequence[AddressSpace]) -> tuple[HiddenSegment, ...]:
        """Nothing runs any more and CRIU has not looked yet: what it is not to see, because ``send_rest`` sends it."""
        mapped = self._open_what_is_mapped(spaces)
        places: list[SharedPlace] = []
        hidden: list[HiddenSegment] = []
        for number, (tid, mapping) in mapped.items():
            inside = pid_inside(tid)
            if inside and len(places) < MAX_SEGMENTS:
                segment = self._known[number].segment
                size = segment.size_bytes
                places.append(SharedPlace(id=number, size_bytes=size, pid=inside, address=mapping.start))
                hidden.append(HiddenSegment(number, segment.device, segment.system_v))
        self.places = tuple(places)
        if self.in_rounds and places:
            # CRIU makes system calls in the tasks by writing to a page of code, which may be shared memory.
            code = {mapping.inode for _tid, mapping in _shared_mappings(spaces) if mapping.permissions[2] == "x"}
            segments = {place.id: self._known[place.id].segment for place in places if place.id not in code}
            self._comparison = _Comparison(segments)
        return tuple(hidden)

    def send_rest(self) -> None:
        """What changed since, or everything where there were no rounds; CRIU is done with the tasks."""
        compared = self._comparison.wait() if self._comparison is not None else {}
        for place in self.places:
            known = self._known[place.id]
            existing, wanted = compared.get(place.id) or _compare(known.segment)
            self._forget(place.id, known, existing)
            # No look follows, so nobody needs to know what was copied.
            self._copy(place.id, known, wanted, note=False)
            self.sent_after_bytes += wanted.bytes

    def send_again(self, number: int, lost: PageRanges) -> None:
        """Pages, or that they are no more, got lost with a broken link: they go as they are now."""
        known = self._known.get(number)
        if known is not None:
            self._copy(number, known, lost, buffer=memoryview(bytearray(PIECE_BYTES)))
            return
        zeros = [value for run in lost for value in (run.address, run.pages)]
        self.out.memory({"type": "shared", "id": number, "runs": [], "zeros": zeros}, ZEROS[:0])

    def close(self) -> None:
        """Not for a blackout: what is mapped here is unmapped."""
        if self._comparison is not None:
            self._comparison.join()
        for known in self._known.values():
            known.segment.close()
        self._known = {}

    def _open_what_is_mapped(self, spaces: Iterable[AddressSpace]) -> dict[int, tuple[int, maps.Mapping]]:
        """By number: a thread and a mapping that shows it, of all segments that go this way. They are open then."""
        found: dict[int, tuple[int, maps.Mapping]] = {}
        for tid, mapping in _shared_mappings(spaces):
            if mapping.inode in self._left:
                continue
            known = self._known.get(mapping.inode)
            if known is None:
                try:
                    segment = self.open_segment(tid, mapping)
                except (FileNotFoundError, ProcessLookupError):
                    continue  # gone, or just not mapped here any more
                if segment is None or segment.size_bytes < LEAST_BYTES:
                    self._leave(mapping.inode, segment)
                    continue
                known = self._known[mapping.inode] = _Known(segment=segment)
            if known.segment.system_v != mapping.name.startswith("/SYSV"):
                # Numbered alike by chance: CRIU itself takes one for the other then.
                self._leave(mapping.inode, self._known.pop(mapping.inode).segment)
                found.pop(mapping.inode, None)
                continue
            found.setdefault(mapping.inode, (tid, mapping))
        return found

    def _leave(self, number: int, segment: OpenSegment | None) -> None:
        """To CRIU."""
        self._left.add(number)
        if segment is not None:
            segment.close()

    def _copy(
        self, number: int, known: _Known, wanted: PageRanges, *, note: bool = True, buffer: memoryview | None = None
    ) -> None:
        for filled, data, zeros in known.segment.content(wanted, self._buffer if buffer is None else buffer):
            if note and self.in_rounds:
                _note(known.segment, filled, data, zeros)
            message = {"type": "shared", "id": number, "runs": _in_pages(filled), "zeros": _in_pages(zeros)}
            self.out.memory(message, data if filled else data[:0])
        known.held |= wanted

    def _forget(self, number: int, known: _Known, existing: PageRanges) -> None:
        """Pages that are no more read as zeros here, and must there."""
        spans = [(start, end - start) for start, end in (known.held - existing).spans()]
        for first in range(0, len(spans), RUNS_PER_MESSAGE):
            zeros = _in_pages(spans[first : first + RUNS_PER_MESSAGE])
            self.out.memory({"type": "shared", "id": number, "runs": [], "zeros": zeros}, ZEROS[:0])
        known.held &= existing


class _Comparison:
    """Of segments that nobody changes any more with what was sent, beside CRIU's dump."""

    def __init__(self, segments: Mapping[int, OpenSegment]) -> None:
        self._segments = segments
        self._found: dict[int, tuple[PageRanges, PageRanges]] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shared-memory", daemon=True)
        self._thread.start()

    def wait(self) -> dict[int, tuple[PageRanges, PageRanges]]:
        """By number: what exists, and what of it the target lacks."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._found

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            for number, segment in self._segments.items():
                self._found[number] = _compare(segment)
        except BaseException as error:
            self._error = error


def _compare(segment: OpenSegment) -> tuple[PageRanges, PageRanges]:
    existing = segment.existing()
    return existing, segment.differing_still(existing)


def _shared_mappings(spaces: Iterable[AddressSpace]) -> Iterator[tuple[int, maps.Mapping]]:
    for space in spaces:
        for mapping in space.mappings:
            if mapping.kind is Kind.SHARED_MEMORY:
                yield space.tid, mapping


def _note(segment: OpenSegment, filled: list[Range], data: memoryview, zeros: list[Range]) -> None:
    position = 0
    for offset, size in filled:
        segment.copied(offset, data[position : position + size])
        position += size
    for offset, size in zeros:
        segment.copied(offset, ZEROS[:size])


def _in_pages(ranges: list[Range]) -> list[int]:
    return [number for address, size in ranges for number in (address, size // PAGE_BYTES)]
