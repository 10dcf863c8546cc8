"""The private memory of one process under a userfaultfd: what was written, what exists, what is not watched.

Whether a mapping is watched is never taken from our memory of it: the kernel says so of each page that exists. What is
not watched is untracked in that scan and registered for the next, so whatever the process maps, unmaps, moves or splits
between two scans, or during one, nothing written is taken for clean.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from runtime.errors import KernelCallFailed
from runtime.linux import userfaultfd
from runtime.linux.pagemap import Bounds, Pagemap
from runtime.memory.api import ProcessScan, Untracked
from runtime.memory.maps import Kind, Mapping
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges

NEW_MAPPING = "new mapping"
PRIVATE = (Kind.ANONYMOUS, Kind.PRIVATE_FILE)
# Up to this much of other memory is walked through rather than asked around: a call costs as much as 1000 pages.
_NEAR_BYTES = 4 << 20
# So many pages are unprotected in the time of a call.
_FEW_BYTES = 64 * PAGE_BYTES


class WatchedMemory:
    """Owns ``descriptor``, the process's userfaultfd; None: the process can not be watched, for ``reason``.

    ``outdated`` after a scan: the process runs another program now, which this descriptor does not belong to.
    """

    def __init__(self, pid: int, descriptor: int | None, reason: str = "") -> None:
        self.pid = pid
        self.descriptor = descriptor
        self.reason = reason
        self.outdated = False
        self._private: list[Mapping] = []
        self._existing = EMPTY

    def close(self) -> None:
        """The kernel forgets everything that was registered: 25 ms for each GiB that was touched."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def watch(self, mappings: Sequence[Mapping]) -> None:
        """Register what can be written to. The next scan reports all of it, and protects it for the first time.

        Code and constants are registered once they are found to hold pages of the process's own: most never do, and
        the kernel reads files slower where it watches.
        """
        for mapping in mappings:
            if mapping.kind == Kind.ANONYMOUS or (mapping.kind == Kind.PRIVATE_FILE and mapping.writable):
                with contextlib.suppress(KernelCallFailed):
                    self._register(mapping)

    def scan(self, pagemap: Pagemap, mappings: Sequence[Mapping], *, final: bool) -> ProcessScan:
        """``mappings`` and ``pagemap`` must be fresh."""
        private = [mapping for mapping in mappings if mapping.kind in PRIVATE]
        vanished = spans_of(self._private) - spans_of(private)
        self._private = private
        written = EMPTY
        if self.descriptor is not None:
            written = _ranges(pagemap.written(*stretch, protect=not final) for stretch in _stretches(private))
        # After that: a page that comes into being in between is not protected, and so is in the next scan.
        watched, unwatched = own_pages(pagemap, private)
        reasons = {self.reason or NEW_MAPPING: unwatched}
        if unwatched and self.descriptor is not None and not final:
            reasons = self._watch_new(pagemap, [each for each in private if _overlaps(each, unwatched)])
            # Another program: nothing is left of what was watched, and nothing of what is there can be.
            self.outdated = NEW_MAPPING not in reasons and not watched
        untracked = tuple(Untracked(ranges=ranges, reason=reason) for reason, ranges in reasons.items() if ranges)
        unknown = _ranges(part.ranges.bounds for part in untracked)
        self._existing = watched | unknown
        return ProcessScan(
            pid=self.pid,
            existing=self._existing,
            dirty=(written & watched) - unknown,
            untracked=untracked,
            vanished=vanished,
            reason=self.reason,
        )

    def _watch_new(self, pagemap: Pagemap, new: Sequence[Mapping]) -> dict[str, PageRanges]:
        """Register and protect. Existing pages of these mappings by reason, NEW_MAPPING where that has worked."""
        assert self.descriptor is not None
        by_reason: dict[str, list[Mapping]] = defaultdict(list)
        for mapping in new:
            try:
                self._register(mapping)
                # A kernel before 6.14 keeps the mark of protection on pages that mremap moves, without the protection
                # itself: such pages would be taken for clean for ever.
                userfaultfd.unprotect(self.descriptor, mapping.start, mapping.end)
                pagemap.protect(mapping.start, mapping.end)
                by_reason[NEW_MAPPING].append(mapping)
            except KernelCallFailed as error:
                by_reason[f"{error.call}: {os.strerror(error.errno)}"].append(mapping)
        # Only now: what comes into being from here on is seen by the next scan.
        found: dict[str, PageRanges] = {}
        for reason, mappings in by_reason.items():
            watched, unwatched = own_pages(pagemap, mappings)
            found[reason] = watched | unwatched
        return found

    def clear_marks(self) -> None:
        """Where no page exists the kernel keeps a mark in the page table, which CRIU takes for a page in swap.

        Pages that exist may keep their protection: nobody sees it, and a write lifts it.
        """
        if self.descriptor is None:
            return
        for mapping in self._private:
            for start, end in gaps(mapping, self._existing):
                # ENOENT: the mapping is not watched, and so has no marks.
                with contextlib.suppress(KernelCallFailed):
                    userfaultfd.unprotect(self.descriptor, start, end)

    def _register(self, mapping: Mapping) -> None:
        assert self.descriptor is not None
        userfaultfd.register(self.descriptor, mapping.start, mapping.end)


def spans_of(mappings: Iterable[Mapping]) -> PageRanges:
    return PageRanges.from_spans((mapping.start, mapping.end) for mapping in mappings)


def own_pages(pagemap: Pagemap, mappings: Sequence[Mapping]) -> tuple[PageRanges, PageRanges]:
    """Existing pages of private mappings: where a userfaultfd watches, and elsewhere."""
    watched, unwatched = EMPTY, EMPTY
    for kind in PRIVATE:
        part = [mapping for mapping in mappings if mapping.kind == kind]
        spans = spans_of(part)
        found = [
            pagemap.own_pages_by_watch(*stretch, of_files=kind == Kind.PRIVATE_FILE) for stretch in _stretches(part)
        ]
        watched = watched | (_ranges(first for first, _second in found) & spans)
        unwatched = unwatched | (_ranges(second for _first, second in found) & spans)
    return watched, unwatched


def _ranges(parts: Iterable[Bounds]) -> PageRanges:
    return PageRanges.of(np.concatenate([EMPTY.bounds, *parts]))


def _overlaps(mapping: Mapping, ranges: PageRanges) -> bool:
    index = int(np.searchsorted(ranges.bounds[:, 1], np.uint64(mapping.start), side="right"))
    return index < len(ranges) and int(ranges.bounds[index, 0]) < mapping.end


def gaps(mapping: Mapping, existing: PageRanges) -> list[tuple[int, int]]:
    """Where the mapping has no pages. A few pages between two gaps belong to the gap, so that there are fewer."""
    first = int(np.searchsorted(existing.bounds[:, 1], np.uint64(mapping.start), side="right"))
    last = int(np.searchsorted(existing.bounds[:, 0], np.uint64(mapping.end), side="left"))
    found: list[tuple[int, int]] = []
    start = mapping.start
    for held_start, held_end in [*existing.bounds[first:last].tolist(), (mapping.end, mapping.end)]:
        if held_start > start:
            if found and start - found[-1][1] <= _FEW_BYTES:
                start = found.pop()[0]
            found.append((start, held_start))
        start = max(start, held_end)
    return found


def _stretches(mappings: Sequence[Mapping]) -> list[tuple[int, int]]:
    """Few stretches that hold all the mappings, and little of others in between."""
    found: list[tuple[int, int]] = []
    for mapping in mappings:
        if found and mapping.start - found[-1][1] <= _NEAR_BYTES:
            found[-1] = (found[-1][0], mapping.end)
        else:
            found.append((mapping.start, mapping.end))
    return found
