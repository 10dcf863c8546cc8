"""Dirty pages by userfaultfd in asynchronous write-protect mode: the kernel remembers writes, nobody is frozen.

Each process is made to open a userfaultfd (remote.py, by tracer_process.py), on which its private memory is registered
(watched.py). PAGEMAP_SCAN then reads which pages lost their protection and protects them again in the same step.
Closing the descriptor undoes everything, and so does the end of this process.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from runtime.errors import KernelCallFailed
from runtime.linux import userfaultfd
from runtime.linux.pagemap import Pagemap
from runtime.linux.processes import same_open_file
from runtime.memory.api import ProcessScan, Scan, Segment, TrackerFacts
from runtime.memory.place import NotInjected
from runtime.memory.ranges import PageRanges
from runtime.memory.remote import Injected, LeftBehind
from runtime.memory.shared import SharedMemory
from runtime.memory.tasks import AddressSpace, owner_of_memory, read_address_space, start_ticks, with_descendants
from runtime.memory.tracer_process import TracerProcess
from runtime.memory.watched import WatchedMemory

NOT_ARMED = "not armed"
# What a process still holds of ours is asked back for as long as this before it is left there: it may be frozen.
TAKE_BACK_S = 1.0
TAKE_BACK_PAUSE_S = 0.002
_UFFD_LINK = "anon_inode:[userfaultfd]"


@dataclass(kw_only=True)
class _Task:
    """A process of the last scan. ``left_behind``: descriptors of ours that it could not close yet."""

    pid: int
    started: str
    memory: WatchedMemory
    space: AddressSpace | None = None
    stop_ms: float = 0.0
    left_behind: set[int] = field(default_factory=set)

    @property
    def armed(self) -> bool:
        return self.memory.descriptor is not None


class Tracer(Protocol):
    """Who stops threads: the functions of runtime.memory.remote, which raise NotInjected."""

    def make_userfaultfd(self, pid: int) -> Injected: ...

    def close_descriptor(self, pid: int, descriptor: int) -> None: ...

    def close(self) -> None: ...


class UffdTracker:
    """``runtime.memory.api.DirtyTracker``. For one caller at a time."""

    def __init__(self, *, shared: bool = False, tracer: Tracer | None = None) -> None:
        """``shared``: track shared memory too, which costs reading all of it in each scan. ``tracer``: instead of one
        whose death, or ours, harms nobody."""
        self._tracer = tracer or TracerProcess()
        self._tasks: dict[int, _Task] = {}
        # As they were before everything was let go.
        self._facts: TrackerFacts | None = None
        self._shared = SharedMemory() if shared else None
        # Userfaultfds that a process could not close, kept to find them again in its children.
        self._kept: list[int] = []

    def arm(self, pids: Iterable[int]) -> None:
        self._facts = None
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                task = self._task(pid)
                space = read_address_space(pid)
                if space and not task.armed and not owner_of_memory(pid, self._tasks) and self._inject(task):
                    task.memory.watch(space.mappings)

    def scan(self, pids: Iterable[int], *, final: bool = False) -> Scan:
        begin = time.perf_counter()
        self._facts = None
        known = set(self._tasks)
        found = []
        spaces = []
        for pid in sorted(pids):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                task = self._task(pid)
                space = task.space = read_address_space(pid, task.space)
                if space is not None:
                    found.append(self._scan_process(task, space, final=final))
                    spaces.append(space)
        alive = {process.pid for process in found}
        for pid in set(self._tasks) - alive:
            self._forget(pid)
        segments = self._shared.scan(spaces) if self._shared is not None else ()
        took_ms = (time.perf_counter() - begin) * 1e3
        gone = tuple(sorted(known - alive))
        return Scan(processes=tuple(found), segments=segments, gone=gone, took_ms=took_ms, spaces=tuple(spaces))

    def glance(self, pids: Iterable[int]) -> Mapping[int, PageRanges]:
        found = {}
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                task = self._tasks.get(pid)
                if task is not None and task.armed and task.space is not None:
                    with Pagemap(task.space.tid) as pagemap:
                        found[pid] = task.memory.glance(pagemap)
        return found

    def copied(self, space: int | Segment, address: int, data: memoryview) -> None:
        # Of processes the kernel says what was written.
        if isinstance(space, Segment) and self._shared is not None:
            self._shared.copied(space, address, data)

    def clear_marks(self) -> None:
        self._facts = self.facts()
        for task in self._tasks.values():
            task.memory.clear_marks()

    def facts(self) -> TrackerFacts:
        if self._facts is not None:
            return self._facts
        tasks = self._tasks.values()
        return TrackerFacts(
            kind="uffd-wp",
            armed=sum(task.armed for task in tasks),
            untracked={task.pid: task.memory.reason for task in tasks if task.memory.reason},
            stop_ms={task.pid: task.stop_ms for task in tasks if task.armed},
        )

    def close(self) -> None:
        self._facts = self.facts()
        end = time.monotonic() + TAKE_BACK_S
        # Until nobody was found: a process may have forked before it closed its own.
        while self._some_held_ours() and time.monotonic() < end:
            time.sleep(TAKE_BACK_PAUSE_S)
        while self._kept:
            os.close(self._kept.pop())
        for pid in list(self._tasks):
            self._forget(pid)
        self._tracer.close()

    def _some_held_ours(self) -> bool:
        """Asks each process, and who was forked since the last scan, to close what it holds; whether any held it."""
        found = False
        for pid in with_descendants(self._tasks):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found = self._take_back_descriptors(self._task(pid)) or found
        return found

    def _task(self, pid: int) -> _Task:
        """What is known of the process; nothing, where the pid is another process's now."""
        started = start_ticks(pid)
        task = self._tasks.get(pid)
        if task is None or task.started != started:
            self._forget(pid)
            task = self._tasks[pid] = _Task(pid=pid, started=started, memory=WatchedMemory(pid, None, NOT_ARMED))
        return task

    def _forget(self, pid: int) -> None:
        if (task := self._tasks.pop(pid, None)) is not None:
            task.memory.close()

    def _scan_process(self, task: _Task, space: AddressSpace, *, final: bool) -> ProcessScan:
        if not task.armed:
            if other := owner_of_memory(task.pid, self._tasks):
                return ProcessScan(pid=task.pid, shares_memory_with=other)
            if not final:
                self._take_back_descriptors(task)
                self._inject(task)
        with Pagemap(space.tid) as pagemap:
            found = task.memory.scan(pagemap, space.mappings, final=final)
            if task.memory.outdated and self._inject(task):
                found = task.memory.scan(pagemap, space.mappings, final=final)
        return found

    def _inject(self, task: _Task) -> bool:
        """Give the process a userfaultfd. False: the memory's ``reason`` says why not."""
        task.memory.close()
        descriptor, reason = None, ""
        try:
            injected = self._tracer.make_userfaultfd(task.pid)
            descriptor, task.stop_ms = injected.descriptor, injected.stop_ms
            userfaultfd.enable(descriptor)
        except LeftBehind as error:
            task.left_behind.add(error.descriptor)
            if error.ours is not None:
                self._kept.append(error.ours)
            reason = str(error)
        except (NotInjected, KernelCallFailed) as error:
            reason = str(error)
        if reason and descriptor is not None:
            os.close(descriptor)
            descriptor = None
        task.memory = WatchedMemory(task.pid, descriptor, reason)
        return descriptor is not None

    def _take_back_descriptors(self, task: _Task) -> bool:
        """Close what the process holds of ours: CRIU can not dump a userfaultfd. Whether it held any.

        A child that was forked in the moment between the two injected calls has inherited the descriptor.
        """
        ours = [other.memory.descriptor for other in self._tasks.values() if other.memory.descriptor is not None]
        ours += self._kept
        held = _userfaultfds_of(task.pid)
        strays = (task.left_behind & held) | {
            number
            for number in held
            if any(same_open_file(os.getpid(), descriptor, task.pid, number) for descriptor in ours)
        }
        task.left_behind = set(strays)
        for number in strays:
            with contextlib.suppress(NotInjected):
                self._tracer.close_descriptor(task.pid, number)
                task.left_behind.discard(number)
        return bool(strays)


def _userfaultfds_of(pid: int) -> set[int]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{name}") == _UFFD_LINK:
                found.add(int(name))
    return found
