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
from dataclasses import dataclass

import numpy as np

from runtime.errors import KernelCallFailed
from runtime.linux import userfaultfd
from runtime.linux.pagemap import PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, Bounds, Pagemap
from runtime.memory.api import ProcessScan, Untracked
from runtime.memory.maps import Kind, Mapping
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges

NEW_MAPPING = "new mapping"
PRIVATE = (Kind.ANONYMOUS, Kind.PRIVATE_FILE)
# Up to this much of other memory is walked through rather than asked around: a call costs as much as 1000 pages.
_NEAR_BYTES = 4 << 20
_LARGE_BYTES = 16 << 20
# Below this it is faster to close than to look for gaps.
_LITTLE_BYTES = 32 << 20
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
        self._layout = layout_of(())
        self._existing = EMPTY
        self._registered: set[tuple[int, int]] = set()

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
        """``pagemap`` and ``mappings`` must be fresh; the same mappings may be the same object as in the last scan."""
        before, layout = self._layout, self._layout
        if mappings is not layout.mappings:
            layout = self._layout = layout_of(mappings)
        watching = self.descriptor is not None
        written = EMPTY
        if watching and not final:
            written = _ranges(pagemap.written(start, end, protect=True) for start, end, _files in layout.stretches)
        # After that: a page that comes into being in between is not protected, and so is in the next scan.
        survey = pagemap.survey(layout.stretches)
        watched, unwatched = _where(survey, PAGE_IS_WPALLOWED) & layout.spans, _unwatched(survey) & layout.spans
        if watching and final:
            written = _where(survey, PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN)
        reasons = {self.reason or NEW_MAPPING: unwatched}
        if unwatched and watching and not final:
            reasons = self._watch_new(pagemap, [each for each in layout.private if _overlaps(each, unwatched)])
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
            vanished=EMPTY if layout is before else before.spans - layout.spans,
            reason=self.reason,
        )

    def glance(self, pagemap: Pagemap) -> PageRanges:
        """What was written since the last scan where that found something to watch; protected again. Whether it is
        watched still the next scan will say."""
        written = _ranges(pagemap.written(start, end, protect=True) for start, end, _files in self._layout.stretches)
        return written & self._layout.spans

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
            layout = layout_of(mappings)
            found[reason] = _where(pagemap.survey(layout.stretches), 0) & layout.spans
        return found

    def clear_marks(self) -> None:
        """Where no page exists the kernel keeps a mark in the page table, which CRIU takes for a page in swap.

        Pages that exist may keep their protection: nobody sees it, and a write lifts it.
        """
        if self._existing.bytes < _LITTLE_BYTES:
            self.close()
        if self.descriptor is None:
            return
        registered = PageRanges.from_spans(self._registered)
        for mapping in self._layout.private:
            if not _overlaps(mapping, registered):
                continue  # never watched, or only what was there before
            for start, end in gaps(mapping, self._existing):
                # ENOENT: the mapping is not watched any more, and so has no marks.
                with contextlib.suppress(KernelCallFailed):
                    userfaultfd.unprotect(self.descriptor, start, end)

    def _register(self, mapping: Mapping) -> None:
        assert self.descriptor is not None
        userfaultfd.register(self.descriptor, mapping.start, mapping.end)
        self._registered.add((mapping.start, mapping.end))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The private ones among a process's mappings, and stretches (start, end, of_files) to ask the kernel about."""

    mappings: Sequence[Mapping]
    private: Sequence[Mapping]
    spans: PageRanges
    stretches: Sequence[tuple[int, int, bool]]


def layout_of(mappings: Sequence[Mapping]) -> Layout:
    private = [mapping for mapping in mappings if mapping.kind in PRIVATE]
    return Layout(mappings=mappings, private=private, spans=spans_of(private), stretches=_stretches(private))


def spans_of(mappings: Iterable[Mapping]) -> PageRanges:
    return PageRanges.from_spans((mapping.start, mapping.end) for mapping in mappings)


def _where(survey: Bounds, categories: int) -> PageRanges:
    wanted = np.uint64(categories)
    return PageRanges.of(survey[survey[:, 2] & wanted == wanted, :2])


def _unwatched(survey: Bounds) -> PageRanges:
    return PageRanges.of(survey[survey[:, 2] & np.uint64(PAGE_IS_WPALLOWED) == 0, :2])


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


def _stretches(private: Sequence[Mapping]) -> list[tuple[int, int, bool]]:
    """Few stretches that hold all the mappings, and little of others in between.

    Large anonymous memory is for itself: to ask there which pages are a file's would be all in vain, and slow.
    """
    found: list[tuple[int, int, bool]] = []
    for mapping in private:
        small = mapping.kind != Kind.ANONYMOUS or mapping.end - mapping.start <= _LARGE_BYTES
        if found and found[-1][2] == small and mapping.start - found[-1][1] <= _NEAR_BYTES:
            found[-1] = (found[-1][0], mapping.end, small)
        else:
            found.append((mapping.start, mapping.end, small))
    return found
