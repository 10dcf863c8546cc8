"""The container's memory on its way out: rounds while it runs, then the difference while it is frozen. Disk-less moves
have no rounds: one, while it is frozen, copies everything.

CRIU stays the authority on which pages exist: it walks the frozen memory and offers every page to our page server. Of
those, pages that the target has and that were not written since are discarded there; only the rest is read and sent.
"""

from __future__ import annotations

import socket
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path

from migrate.deferral import Deferral, Split
from migrate.messages import HELD_FLAG
from migrate.outgoing import PAGE_BYTES, Outgoing, PageSender
from migrate.shared_source import SharedSource
from runtime.criu.filter.table import SHORTEST_BYTES, PageFilter
from runtime.criu.page_protocol import PE_LAZY, PE_PRESENT, SpaceId
from runtime.criu.pages import PageServer, RunReader
from runtime.memory.api import DirtyTracker, ProcessScan, Scan, TrackerFacts
from runtime.memory.maps import Kind, parse_mappings
from runtime.memory.ranges import EMPTY, PageRanges
from runtime.memory.reader import PIECE_BYTES, MemoryReader, ProcessEnded, Range
from runtime.memory.tasks import pid_inside
from runtime.memory.watched import PRIVATE

# CRIU says nothing while it waits for a task to be dumped; a task takes seconds at most.
CRIU_SILENCE_S = 120.0
ZEROS = memoryview(bytes(PIECE_BYTES))


class LiveMemory:
    """Copies memory of running processes: ``scan``, ``send`` what it found, and again. Not thread safe."""

    def __init__(self, pids: Callable[[], list[int]], out: Outgoing, tracker: DirtyTracker) -> None:
        self._pids = pids
        self._out = out
        self._tracker = tracker
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._deferral: Deferral[int] = Deferral()
        self._split: Split[int] = self._deferral.scanned({})
        self._pid_of: dict[int, int] = {}
        self._missed: dict[int, PageRanges] = {}
        """What got lost with a link and could not be read again: it is not fresh, whoever noted that it was sent."""
        out.memory_again = self.send_again
        self.fresh: dict[int, PageRanges] = {}
        """By pid inside the container: pages of which the target has the present content."""
        self.hidden: dict[int, PageRanges] = {}
        """Of those, the ones that CRIU does not get to see."""
        self.shared: SharedSource | None = None
        """None: shared memory is in CRIU's images."""
        self.keep_back = False
        """Post-copy: what the target lacks at the end stays here until it asks."""
        self.kept: dict[int, PageRanges] = {}
        """That, after ``finish``, as far as CRIU is not asked about it; ``DifferenceSender`` adds the rest."""
        self.hot: dict[int, PageRanges] = {}
        """Of private memory, what was written since the last scan."""
        self.code: dict[int, PageRanges] = {}
        """What can be executed. CRIU runs system calls in the tasks by writing them into a page of it for a moment,
        also after it has sent that page, of which the stream holds no copy but the page itself."""
        self.late: dict[int, list[tuple[int, int]]] = {}
        """Pages of these that the target lacks until ``send_late``."""
        self.pids: dict[int, int] = {}
        """This host's pid by the one inside the container, of everything in the last scan."""

    @property
    def dirty_bytes(self) -> int:
        """What the last scan found written since the one before."""
        return self._split.dirty_bytes + (self.shared.dirty_bytes if self.shared else 0)

    @property
    def hot_bytes(self) -> int:
        """Of these, what the scan before had found as well."""
        return self._split.hot_bytes + (self.shared.hot_bytes if self.shared else 0)

    @property
    def pending_bytes(self) -> int:
        """What the target lacks, with what was kept back."""
        return self._split.pending_bytes + (self.shared.pending_bytes if self.shared else 0)

    def take_shared_apart(self, page_filter: PageFilter | None, *, in_rounds: bool) -> SharedSource | None:
        """The target can: shared memory goes there by our reader, ``in_rounds`` or at the end, where CRIU can be kept
        from looking at it. To be called before anything is scanned."""
        if page_filter is not None and page_filter.loaded:
            self.shared = SharedSource(out=self._out, in_rounds=in_rounds)
        return self.shared

    def scan(self) -> None:
        """Find what was written since the last scan; from here on the target's copy of it is stale.

        A process that can not be tracked would go over whole in each round: CRIU's dump carries it.
        """
        found = self._scan_private()
        if self.shared is not None:
            self.shared.scan(found.spaces)

    def scan_frozen(self) -> None:
        """Everything is frozen: find what private memory the target lacks, for ``send_frozen``. Shared memory waits
        until nothing can change. What this leaves out ``finish`` finds."""
        if not self._pid_of:
            self._scan_private()
            return
        inside_of = {pid: inside for inside, pid in self._pid_of.items()}
        found = {inside_of[pid]: ranges for pid, ranges in self._tracker.glance(inside_of).items()}
        for inside, ranges in found.items():
            self.fresh[inside] = self.fresh.get(inside, EMPTY) - ranges
        self._split = self._deferral.scanned(found)

    def send_frozen(self) -> None:
        self._send_private(defer_hot=False)

    def _scan_private(self) -> Scan:
        dirty: dict[int, PageRanges] = {}
        existing: dict[int, PageRanges] = {}
        found = self._tracker.scan(self._pids())
        for process in found.processes:
            inside = pid_inside(process.pid)
            if inside and not process.shares_memory_with and not process.reason:
                self._forget_stale(inside, process)
                self._pid_of[inside] = process.pid
                dirty[inside], existing[inside] = process.to_copy, process.existing
        self._split = self._deferral.scanned(dirty, existing)
        return found

    def send(self, *, defer_hot: bool = False) -> int:
        """Copy what is pending, without hot pages if so told; a process that has ended meanwhile is left out.

        Bytes of memory looked at.
        """
        shared = self.shared.send(defer_hot=defer_hot) if self.shared is not None else 0
        return shared + self._send_private(defer_hot=defer_hot)

    def _send_private(self, *, defer_hot: bool) -> int:
        wanted = self._split.to_send(defer_hot=defer_hot)
        for inside, ranges in wanted.items():
            self._copy(inside, self._pid_of[inside], ranges)
        self._deferral.sent(wanted)
        return sum(ranges.bytes for ranges in wanted.values())

    def send_again(self, message: Mapping[str, object]) -> None:
        """What got lost with a broken link: these pages, as they are now. That may be newer than what was found
        written, and then it will be found again; it is never older."""
        # By the pid inside, or the number of a segment.
        inside, runs, zeros = message["id"], message["runs"], message["zeros"]
        assert isinstance(inside, int)
        assert isinstance(runs, list)
        assert isinstance(zeros, list)
        pairs = [*zip(runs[::2], runs[1::2], strict=True), *zip(zeros[::2], zeros[1::2], strict=True)]
        wanted = PageRanges.from_spans((address, address + pages * PAGE_BYTES) for address, pages in pairs)
        if message["type"] == "shared":
            assert self.shared is not None
            self.shared.send_again(inside, wanted)
            return
        sent = self._read_and_send(inside, self._pid_of[inside], wanted, memoryview(bytearray(PIECE_BYTES)))
        self._missed[inside] = (self._missed.get(inside, EMPTY) | wanted) - sent

    def finish(self, page_filter: PageFilter | None = None) -> int:
        """Everything is frozen: the last scan. Afterwards ``fresh`` is final.

        What the target has is kept from CRIU by ``page_filter`` and is in ``hidden`` then: CRIU will not name it.
        Bytes that the target lacks, as far as the tracker knows.
        """
        hideable: dict[int, PageRanges] = {}
        usable = page_filter is not None and page_filter.loaded
        scan = self._tracker.scan(self._pids(), final=True)
        known: dict[int, PageRanges] = {}
        dirty = 0
        for process in scan.processes:
            inside = pid_inside(process.pid)
            if inside:
                self.pids[inside] = process.pid
                anonymous, self.code[inside] = anonymous_and_code(process.pid)
            if inside and not process.reason and not process.shares_memory_with:
                self._forget_stale(inside, process)
                known[inside] = self.fresh.get(inside, EMPTY)
                if usable:
                    hidden = long_stretches(known[inside] & anonymous)
                    hideable[process.pid] = self.hidden[inside] = hidden
                    if self.keep_back:
                        kept = long_stretches((process.existing & anonymous) - known[inside])
                        self.kept[inside] = kept
                        hideable[process.pid] = hidden | kept
                if self.keep_back:
                    self.hot[inside] = process.dirty
                dirty += process.to_copy.bytes
        self.fresh = known
        if page_filter is not None and usable:
            segments = self.shared.finish(scan.spaces) if self.shared is not None else ()
            page_filter.publish(hideable, segments=segments)
        # Its marks would look like swapped pages to CRIU. Closing would do as well, but takes 25 ms for each GiB.
        self._tracker.clear_marks()
        return dirty

    def send_late(self) -> None:
        """CRIU is done with the tasks: the pages that it may have been changing while it sent them."""
        for inside, spans in self.late.items():
            with MemoryReader(self.pids[inside]) as reader:
                for start, end in PageRanges.from_spans(spans).spans():
                    for address in range(start, end, PIECE_BYTES):
                        run = (address, min(PIECE_BYTES, end - address))
                        data = self._buffer[: run[1]]
                        reader.read_into([run], data)
                        # With its zeros: for a hole in the store of such memory there may be a file that shows.
                        send_memory(self._out, inside, [run], data, [])
        self.late = {}

    def facts(self) -> TrackerFacts:
        return self._tracker.facts()

    def close(self) -> None:
        """Nothing is tracked any more. Not for a blackout."""
        self._tracker.close()
        if self.shared is not None:
            self.shared.close()

    def _forget_stale(self, inside: int, process: ProcessScan) -> None:
        before = self.fresh.get(inside, EMPTY) - self._missed.pop(inside, EMPTY)
        self.fresh[inside] = (before & process.existing) - process.to_copy

    def _copy(self, inside: int, pid: int, wanted: PageRanges) -> None:
        sent = self._read_and_send(inside, pid, wanted, self._buffer)
        self.fresh[inside] = self.fresh.get(inside, EMPTY) | sent

    def _read_and_send(self, inside: int, pid: int, wanted: PageRanges, buffer: memoryview) -> PageRanges:
        """What of it could be read."""
        ranges = [(start, end - start) for start, end in wanted.spans()]
        copied: list[tuple[int, int]] = []
        try:
            with MemoryReader(pid) as reader:
                for filled, data, zeros in reader.content(ranges, buffer):
                    self._tell_tracker(pid, filled, data, zeros)
                    send_memory(self._out, inside, filled, data, zeros)
                    copied += ((address, address + size) for address, size in (*filled, *zeros))
        except (ProcessEnded, FileNotFoundError, ProcessLookupError):
            pass  # the next scan says so
        return PageRanges.from_spans(copied)

    def _tell_tracker(self, pid: int, filled: list[Range], data: memoryview, zeros: list[Range]) -> None:
        position = 0
        for address, size in filled:
            self._tracker.copied(pid, address, data[position : position + size])
            position += size
        for address, size in zeros:
            self._tracker.copied(pid, address, ZEROS[:size])


def send_memory(out: Outgoing, inside: int, filled: list[Range], data: memoryview, zeros: list[Range]) -> None:
    """Pages of the task with this pid inside: ``data`` is the content of ``filled``; of ``zeros`` the news goes."""
    message = {"type": "memory", "id": inside, "runs": _in_pages(filled), "zeros": _in_pages(zeros)}
    out.memory(message, data if filled else data[:0])


def _in_pages(ranges: list[Range]) -> list[int]:
    return [number for address, size in ranges for number in (address, size // PAGE_BYTES)]


def anonymous_and_code(pid: int) -> tuple[PageRanges, PageRanges]:
    """Private anonymous memory, a page of which reads as zeros when it does not exist, like a hole in a store; and
    private memory that can be executed."""
    try:
        mappings = parse_mappings(Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape"))
    except OSError:
        return EMPTY, EMPTY
    return (
        PageRanges.from_spans((m.start, m.end) for m in mappings if m.kind is Kind.ANONYMOUS),
        PageRanges.from_spans((m.start, m.end) for m in mappings if m.kind in PRIVATE and m.permissions[2] == "x"),
    )


def long_stretches(ranges: PageRanges) -> PageRanges:
    """Without those too short to be worth an entry in the filter's table, which leaves them out as well."""
    bounds = ranges.bounds
    return PageRanges.of(bounds[bounds[:, 1] - bounds[:, 0] >= SHORTEST_BYTES]) if ranges else ranges


class DifferenceSender(PageSender):
    """Consumer of the page server after pre-copy: what the target has is discarded, the rest sent, all of it named.

    In post-copy the rest is discarded as well, as far as a restore can do without it, and noted as kept. Code is noted
    as late.
    """

    def __init__(self, out: Outgoing, live: LiveMemory) -> None:
        super().__init__(out)
        self._live = live
        self._fresh = _Stretches(EMPTY)
        self._code = _Stretches(EMPTY)
        self._kept: list[tuple[int, int]] = []
        self._kept_of = 0

    def open(self, space: SpaceId) -> None:
        super().open(space)
        self._kept_of = space.id
        fresh = code = EMPTY
        if space.kind == "task":
            fresh, code = self._live.fresh.get(space.id, EMPTY), self._live.code.get(space.id, EMPTY)
            for start, end in self._live.hidden.get(space.id, EMPTY).spans():
                self.name(start, (end - start) // PAGE_BYTES, PE_LAZY | PE_PRESENT | HELD_FLAG)
        self._fresh, self._code = _Stretches(fresh), _Stretches(code)

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        end = address + pages * PAGE_BYTES
        while address < end:
            until, held = self._fresh.at(address, end)
            until, code = self._code.at(address, until)
            count = (until - address) // PAGE_BYTES
            if held and flags & PE_LAZY:
                # What is not lazy may differ from its file by being zero, which a store does not tell from a hole.
                source.discard(until - address)
                self.name(address, count, flags | HELD_FLAG)
            elif self._live.keep_back and space.kind == "task" and flags & PE_LAZY:
                source.discard(until - address)
                self._kept.append((address, until))
            elif code:
                source.discard(until - address)
                self.name(address, count, flags | HELD_FLAG)
                self._live.late.setdefault(space.id, []).append((address, until))
            else:
                super().run(space, address, count, flags, source)
            address = until

    def flush(self) -> None:
        super().flush()
        self._note_kept()

    def _note_kept(self) -> None:
        if self._kept:
            found = PageRanges.from_spans(self._kept)
            self._live.kept[self._kept_of] = self._live.kept.get(self._kept_of, EMPTY) | found
            self._kept = []


class _Stretches:
    """Ranges, for questions that come one by one."""

    def __init__(self, ranges: PageRanges) -> None:
        spans = ranges.spans()
        self._starts = [start for start, _end in spans]
        self._ends = [end for _start, end in spans]

    def at(self, address: int, end: int) -> tuple[int, bool]:
        """Up to where ``address`` has the same fate, and whether it is within."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._ends[index]:
            return min(end, self._ends[index]), True
        if index + 1 < len(self._starts):
            return min(end, self._starts[index + 1]), False
        return end, False


class PageThread:
    """The page server beside the conversation with CRIU; the only sender on the channel while it runs."""

    def __init__(self, sock: socket.socket, criu_version: tuple[int, int, int], sender: PageSender) -> None:
        self._server = PageServer(sock, criu_version, sender)
        self._sender = sender
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="pages", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._server.serve(idle_timeout_s=CRIU_SILENCE_S)
            self._sender.flush()
        except BaseException as error:
            # The server has told CRIU, whose failure ends the wait for post-dump.
            self._error = error

    def wait(self) -> BaseException | None:
        """Until the stream is over; what went wrong with it."""
        self._thread.join()
        return self._error
