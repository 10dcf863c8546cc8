"""Dirty-page tracking: which pages of running processes were written since somebody last asked. Values, a Protocol.

All addresses are in bytes, all pids are this host's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from runtime.memory.ranges import EMPTY, PageRanges
from runtime.memory.tasks import AddressSpace

TrackerKind = Literal["uffd-wp", "hash", "still"]


@dataclass(frozen=True, kw_only=True)
class Untracked:
    """Ranges about which nothing is known since the last scan, and why."""

    ranges: PageRanges
    reason: str


@dataclass(frozen=True, kw_only=True)
class ProcessScan:
    """Private memory of one process, anonymous and of private file mappings. Shared memory is in SegmentScan.

    ``existing``: pages that have content of their own now. A page of the process's private mappings that is not in it
    reads as zeros (anonymous memory) or as the file (private file mappings): a copy of it is to be forgotten.
    ``dirty``: existing pages that were written since the last scan; in the first scan all of them.
    ``untracked``: existing pages that must be taken as dirty, by reason: of new mappings, of a process not tracked.
    ``vanished``: what was mapped at the last scan and is not now.
    ``reason``: why the whole process is not tracked; empty when it is.
    ``shares_memory_with``: another process of the scan that runs in this one's memory (vfork): all else is empty then.
    """

    pid: int
    existing: PageRanges = EMPTY
    dirty: PageRanges = EMPTY
    untracked: tuple[Untracked, ...] = ()
    vanished: PageRanges = EMPTY
    reason: str = ""
    shares_memory_with: int = 0

    @property
    def to_copy(self) -> PageRanges:
        """Pages whose content must be copied (again): dirty ones and untracked ones."""
        found = self.dirty
        for part in self.untracked:
            found = found | part.ranges
        return found


class Segment(NamedTuple):
    """Shared memory without a file that is carried otherwise. ``inode`` is what CRIU calls its shmid.

    The name belongs to it: System V segments are numbered by themselves, on the same device as others.
    """

    device: str
    inode: int
    name: str


@dataclass(frozen=True, kw_only=True)
class SegmentScan:
    """Memory that processes share by mapping it. Addresses are offsets in the segment.

    ``path`` opens it for reading as long as the mapping it was found by is there. ``existing`` and ``dirty`` are as for
    processes; what does not exist reads as zeros.
    """

    segment: Segment
    path: str
    existing: PageRanges
    dirty: PageRanges


@dataclass(frozen=True, kw_only=True)
class Scan:
    """``processes`` in order of pid. ``gone``: processes of the last scan that have ended.

    ``segments``: shared memory that any of the processes maps, when the tracker was asked to look at it.
    ``spaces``: what they mapped when they were looked at, of those that have memory of their own.
    """

    processes: tuple[ProcessScan, ...]
    gone: tuple[int, ...]
    took_ms: float
    segments: tuple[SegmentScan, ...] = ()
    spaces: tuple[AddressSpace, ...] = ()

    @property
    def dirty_pages(self) -> int:
        """Pages that have to be copied after this scan."""
        private = sum(process.to_copy.pages for process in self.processes)
        return private + sum(segment.dirty.pages for segment in self.segments)


@dataclass(frozen=True, kw_only=True)
class TrackerFacts:
    """For the report. ``untracked``: pid to reason. ``stop_ms``: how long one thread of each process stood still."""

    kind: TrackerKind
    armed: int
    untracked: Mapping[int, str] = field(default_factory=dict)
    stop_ms: Mapping[int, float] = field(default_factory=dict)


class DirtyTracker(Protocol):
    """Watches the memory of a changing set of processes while they run.

    What is promised: a page whose content differs between the return of one scan and the return of the next is in
    ``to_copy`` of the next, or in what ``glance`` gave in between, or no longer in ``existing``. So a copy that is made
    of these *after* each scan or glance, with what is not in ``existing`` forgotten, equals the memory after a scan
    during which nothing runs (the last one).
    A page may be reported though it has not changed.
    """

    def arm(self, pids: Iterable[int]) -> None:
        """Begin to watch these processes. Does not fail for a single process: its reason is in the scan."""

    def glance(self, pids: Iterable[int]) -> Mapping[int, PageRanges]:
        """Everything is frozen, and the final scan is soon to come: by pid, pages that it would report, as far as they
        are found in a fraction of its time. It will report them only if they are written again, or if it finds that
        nobody watched them.
        """

    def scan(self, pids: Iterable[int], *, final: bool = False) -> Scan:
        """Everything since the last scan, for the processes that exist now (read the cgroup again each time).

        New ones are armed on the way. ``final``: everything is frozen and no other scan will follow, so nothing is
        armed and nothing in the processes is touched.
        """

    def copied(self, space: int | Segment, address: int, data: memoryview) -> None:
        """Tell what was copied out of a process (its pid) or a segment after the last scan, page-aligned.

        Any one thread at a time, and not during a scan. What is compared by content is dirty until this says otherwise.
        """

    def clear_marks(self) -> None:
        """After the final scan, still frozen: make memory look to a dump as if it had never been watched.

        Costs next to nothing where memory is dense. ``close``, which does the same for good, takes 25 ms for each GiB.
        """

    def facts(self) -> TrackerFacts:
        """Of the last scan; kept when the tracker is closed."""

    def close(self) -> None:
        """Stop watching. Safe while everything is frozen, and at any time; idempotent."""
