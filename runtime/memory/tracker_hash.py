"""Dirty pages by comparing contents, for kernels that can not tell: each scan reads and hashes every existing page.

Costs about half a second of one core for each GiB and scan, and 8 bytes for each page.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from runtime.linux.probes import has_pagemap_scan
from runtime.memory.api import ProcessScan, Scan, Segment, TrackerFacts, Untracked
from runtime.memory.existing import existing_pages, private_mappings
from runtime.memory.hashes import READ_BYTES, Comparer
from runtime.memory.ranges import EMPTY, PageRanges
from runtime.memory.shared import SharedMemory
from runtime.memory.tasks import AddressSpace, owner_of_memory, read_address_space, start_ticks


@dataclass(kw_only=True)
class _Task:
    started: str
    comparer: Comparer = field(default_factory=Comparer)
    mapped: PageRanges = EMPTY


class HashTracker:
    """``runtime.memory.api.DirtyTracker``. Never stops or touches a process."""

    def __init__(self, *, shared: bool = False, use_pagemap_scan: bool | None = None) -> None:
        """``shared``: track shared memory too.

        ``use_pagemap_scan`` False: find pages by /proc/PID/pagemap alone, as kernels before 6.7 must."""
        self._use_scan = has_pagemap_scan() if use_pagemap_scan is None else use_pagemap_scan
        self._tasks: dict[int, _Task] = {}
        self._reasons: dict[int, str] = {}
        self._facts: TrackerFacts | None = None
        self._shared = SharedMemory() if shared else None
        self._buffer = bytearray(READ_BYTES)

    def arm(self, pids: Iterable[int]) -> None:
        """Nothing to do: what was not copied yet is dirty."""

    def scan(self, pids: Iterable[int], *, final: bool = False) -> Scan:
        begin = time.perf_counter()
        known = set(self._tasks)
        self._reasons = {}
        self._facts = None
        found = []
        spaces = []
        for pid in sorted(pids):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                task, space = self._task(pid), read_address_space(pid)
                if space is not None:
                    found.append(self._scan_process(pid, task, space))
                    spaces.append(space)
        alive = {process.pid for process in found}
        for pid in set(self._tasks) - alive:
            del self._tasks[pid]
        segments = self._shared.scan(spaces) if self._shared is not None else ()
        took_ms = (time.perf_counter() - begin) * 1e3
        gone = tuple(sorted(known - alive))
        return Scan(processes=tuple(found), segments=segments, gone=gone, took_ms=took_ms, spaces=tuple(spaces))

    def glance(self, pids: Iterable[int]) -> Mapping[int, PageRanges]:
        return {process.pid: process.to_copy for process in self.scan(pids).processes}

    def copied(self, space: int | Segment, address: int, data: memoryview) -> None:
        if isinstance(space, Segment):
            if self._shared is not None:
                self._shared.copied(space, address, data)
        elif (task := self._tasks.get(space)) is not None:
            task.comparer.copied(address, data)

    def clear_marks(self) -> None:
        """There are none."""

    def facts(self) -> TrackerFacts:
        if self._facts is not None:
            return self._facts
        return TrackerFacts(kind="hash", armed=len(self._tasks) - len(self._reasons), untracked=dict(self._reasons))

    def close(self) -> None:
        self._facts = self.facts()
        self._tasks.clear()

    def _task(self, pid: int) -> _Task:
        """What is known of the process; nothing, where the pid is another process's now."""
        started = start_ticks(pid)
        task = self._tasks.get(pid)
        if task is None or task.started != started:
            task = self._tasks[pid] = _Task(started=started)
        return task

    def _scan_process(self, pid: int, task: _Task, space: AddressSpace) -> ProcessScan:
        if other := owner_of_memory(pid, self._tasks):
            return ProcessScan(pid=pid, shares_memory_with=other)
        private = private_mappings(space)
        mapped = PageRanges.from_spans((mapping.start, mapping.end) for mapping in private)
        vanished, task.mapped = task.mapped - mapped, mapped
        existing = existing_pages(space, private, use_scan=self._use_scan)
        try:
            with open(f"/proc/{space.tid}/mem", "rb", buffering=0) as memory:
                dirty = task.comparer.differing(memory.fileno(), existing, self._buffer)
        except PermissionError as error:
            self._reasons[pid] = reason = f"its memory can not be read: {error.strerror}"
            untracked = (Untracked(ranges=existing, reason=reason),)
            return ProcessScan(pid=pid, existing=existing, untracked=untracked, vanished=vanished, reason=reason)
        return ProcessScan(pid=pid, existing=existing, dirty=dirty, vanished=vanished)
