"""The tracker of memory that stands still: everything is dirty until it was copied, then nothing ever is again.

For processes that are frozen before the first scan. It costs one look at the page tables and touches no process.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from runtime.linux.probes import has_pagemap_scan
from runtime.memory.api import ProcessScan, Scan, Segment, TrackerFacts
from runtime.memory.existing import existing_pages, private_mappings
from runtime.memory.ranges import PageRanges
from runtime.memory.tasks import AddressSpace, owner_of_memory, read_address_space


class StillTracker:
    """``runtime.memory.api.DirtyTracker``, as long as no process runs between first scan and last."""

    def __init__(self) -> None:
        self._use_scan = has_pagemap_scan()
        self._existing: dict[int, PageRanges] = {}
        self._spaces: dict[int, AddressSpace] = {}
        self._copied: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def arm(self, pids: Iterable[int]) -> None:
        """Nothing to do: what was not copied yet is dirty."""

    def scan(self, pids: Iterable[int], *, final: bool = False) -> Scan:
        begin = time.perf_counter()
        found = []
        for pid in sorted(pids):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if process := self._look_at(pid):
                    found.append(process)
        spaces = tuple(self._spaces[process.pid] for process in found if process.pid in self._spaces)
        return Scan(processes=tuple(found), gone=(), took_ms=(time.perf_counter() - begin) * 1e3, spaces=spaces)

    def _look_at(self, pid: int) -> ProcessScan | None:
        if pid not in self._existing:
            if other := owner_of_memory(pid, self._existing):
                return ProcessScan(pid=pid, shares_memory_with=other)
            space = read_address_space(pid)
            if space is None:
                return None
            self._spaces[pid] = space
            self._existing[pid] = existing_pages(space, private_mappings(space), use_scan=self._use_scan)
        existing = self._existing[pid]
        return ProcessScan(pid=pid, existing=existing, dirty=existing - PageRanges.from_spans(self._copied[pid]))

    def glance(self, pids: Iterable[int]) -> Mapping[int, PageRanges]:
        return {process.pid: process.to_copy for process in self.scan(pids).processes}

    def copied(self, space: int | Segment, address: int, data: memoryview) -> None:
        if isinstance(space, int):
            self._copied[space].append((address, address + len(data)))

    def clear_marks(self) -> None:
        """There are none."""

    def facts(self) -> TrackerFacts:
        return TrackerFacts(kind="still", armed=0)

    def close(self) -> None:
        """Nothing is held."""
