"""The private memory of one process under a userfaultfd: what is watched, what was written, what exists.

Whether a mapping is watched is never taken from our memory of it. The kernel refuses to scan one that is not, and such
a mapping is untracked in that scan and registered for the next: so whatever the process maps, unmaps, moves or splits
between two scans, or during one, nothing written is taken for clean.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from runtime.errors import KernelCallFailed
from runtime.linux import userfaultfd
from runtime.linux.pagemap import Bounds, Pagemap
from runtime.memory.api import ProcessScan, Untracked
from runtime.memory.maps import Kind, Mapping
from runtime.memory.ranges import EMPTY, PageRanges

NEW_MAPPING = "new mapping"
PRIVATE = (Kind.ANONYMOUS, Kind.PRIVATE_FILE)


class WatchedMemory:
    """Owns ``descriptor``, the process's userfaultfd; None: the process can not be watched, for ``reason``.

    ``outdated`` after a scan: the process runs another program now, which this descriptor does not belong to.
    """

    def __init__(self, pid: int, descriptor: int | None, reason: str = "") -> None:
        self.pid = pid
        self.descriptor = descriptor
        self.reason = reason
        self.outdated = False
        # What we have registered and the kernel has not contradicted: where it is worth asking.
        self._believed = EMPTY
        self._mapped = EMPTY

    def close(self) -> None:
        """The kernel forgets everything that was registered: 20 ms for each GiB that was touched."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def watch(self, mappings: Sequence[Mapping]) -> None:
        """Register what can be written to. The next scan reports all of it, and protects it for the first time."""
        registered = []
        for mapping in mappings:
            if mapping.kind in PRIVATE and not _shows_only_its_file(mapping):
                with contextlib.suppress(KernelCallFailed):
                    self._register(mapping)
                    registered.append((mapping.start, mapping.end))
        self._believed = PageRanges.from_spans(registered)

    def scan(self, pagemap: Pagemap, mappings: Sequence[Mapping], *, final: bool) -> ProcessScan:
        """``mappings`` and ``pagemap`` must be fresh."""
        private = PageRanges.from_spans((each.start, each.end) for each in mappings if each.kind in PRIVATE)
        vanished, self._mapped = self._mapped - private, private
        found = _Found(pagemap)
        for group in _groups(mappings, self._is_believed):
            if self.descriptor is None:
                found.look_at_untracked(group, self.reason)
            elif self._is_believed(group[0]):
                found.look_at_watched(group, protect=not final)
            else:
                found.look_at_unwatched(group)
        errors = self._watch_new(found.new, pagemap, final=final)
        # After they are watched: what comes into being from here on is seen by the next scan.
        for mapping in found.new:
            found.look_at_untracked([mapping], errors.get(mapping, NEW_MAPPING))
        # A process that runs another program has nothing left that is watched, and nothing can be registered.
        self.outdated = bool(errors) and len(errors) == len(found.new) and not found.watched_any
        return found.result(self.pid, private, vanished, self.reason)

    def _is_believed(self, mapping: Mapping) -> bool:
        """A part is enough: a stack that has grown is still watched. The kernel contradicts where that is wrong."""
        bounds = self._believed.bounds
        index = int(np.searchsorted(bounds[:, 1], np.uint64(mapping.start), side="right"))
        return index < len(bounds) and int(bounds[index, 0]) < mapping.end

    def _watch_new(self, new: Sequence[Mapping], pagemap: Pagemap, *, final: bool) -> dict[Mapping, str]:
        """Register and protect; the mappings for which that fails, with the reason."""
        errors: dict[Mapping, str] = {}
        if final or self.descriptor is None:
            return errors
        spans = PageRanges.from_spans((mapping.start, mapping.end) for mapping in new)
        for mapping in new:
            try:
                self._register(mapping)
                # A kernel before 6.14 keeps the mark of protection on pages that are moved by mremap, without the
                # protection itself: such pages would be taken for clean for ever.
                userfaultfd.unprotect(self.descriptor, mapping.start, mapping.end)
                pagemap.protect(mapping.start, mapping.end)
            except KernelCallFailed as error:
                errors[mapping] = f"{error.call}: {os.strerror(error.errno)}"
        failed = PageRanges.from_spans((mapping.start, mapping.end) for mapping in errors)
        self._believed = (self._believed | spans) - failed
        return errors

    def _register(self, mapping: Mapping) -> None:
        assert self.descriptor is not None
        userfaultfd.register(self.descriptor, mapping.start, mapping.end)


class _Found:
    """What one scan has found so far. ``new`` are mappings that are not watched and must be."""

    def __init__(self, pagemap: Pagemap) -> None:
        self._pagemap = pagemap
        self._existing: list[Bounds] = []
        self._written: list[Bounds] = []
        self._untracked: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.new: list[Mapping] = []
        self.watched_any = False

    def look_at_watched(self, group: Sequence[Mapping], *, protect: bool) -> None:
        start, end = group[0].start, group[-1].end
        written, complete = self._pagemap.written(start, end, protect=protect)
        self._written.append(written)
        if complete:
            self.watched_any = True
            # Only now: a page that comes into being in between is not protected, and so is in the next scan.
            self._keep_existing(group)
        elif len(group) == 1:
            self.new.append(group[0])
        else:
            for mapping in group:
                self.look_at_watched([mapping], protect=protect)

    def look_at_unwatched(self, group: Sequence[Mapping]) -> None:
        """Code and constants are watched only when they hold pages of the process's own: most never do, and watching
        makes reading them slower."""
        if not _shows_only_its_file(group[0]):
            self.new += group
            return
        own = self._own_pages(group)
        if len(own):
            at = np.searchsorted(own[:, 1], np.array([each.start for each in group], dtype=np.uint64), side="right")
            for mapping, index in zip(group, at.tolist(), strict=True):
                if index < len(own) and int(own[index, 0]) < mapping.end:
                    self.new.append(mapping)

    def look_at_untracked(self, group: Sequence[Mapping], reason: str) -> None:
        self._keep_existing(group)
        self._untracked[reason] += [(mapping.start, mapping.end) for mapping in group]

    def result(self, pid: int, private: PageRanges, vanished: PageRanges, reason: str) -> ProcessScan:
        existing = PageRanges.of(np.concatenate([*self._existing, EMPTY.bounds])) & private
        untracked = tuple(
            Untracked(ranges=ranges, reason=why)
            for why, spans in self._untracked.items()
            if (ranges := PageRanges.from_spans(spans) & existing)
        )
        dirty = PageRanges.of(np.concatenate([*self._written, EMPTY.bounds])) & existing
        for part in untracked:
            dirty = dirty - part.ranges
        return ProcessScan(
            pid=pid, existing=existing, dirty=dirty, untracked=untracked, vanished=vanished, reason=reason
        )

    def _keep_existing(self, group: Sequence[Mapping]) -> None:
        self._existing.append(self._own_pages(group))

    def _own_pages(self, group: Sequence[Mapping]) -> Bounds:
        of_files = group[0].kind == Kind.PRIVATE_FILE
        return self._pagemap.own_pages(group[0].start, group[-1].end, of_files=of_files)


def _shows_only_its_file(mapping: Mapping) -> bool:
    """It can not be written to as it is. It may have been before."""
    return mapping.kind == Kind.PRIVATE_FILE and not mapping.writable


def _groups(mappings: Sequence[Mapping], is_believed: Callable[[Mapping], bool]) -> list[list[Mapping]]:
    """Private mappings that follow each other with nothing else between, and are alike in all that matters here."""
    grouped = groupby(mappings, lambda each: (each.kind, _shows_only_its_file(each), is_believed(each)))
    return [list(group) for (kind, _shows, _believed), group in grouped if kind in PRIVATE]
