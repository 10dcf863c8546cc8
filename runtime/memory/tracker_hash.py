"""Dirty pages by comparing contents, for kernels that can not tell: each scan reads and hashes every existing page.

Costs about 0.3 s of one core for each GiB and scan, and 8 bytes for each page. A page counts as clean when it hashes
like what was *copied out* last. (Like it did in the last scan would be wrong: it may have been different when it was
copied in between, and have changed back.)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from runtime.linux.pagemap import Bounds, Pagemap, runs
from runtime.linux.probes import has_pagemap_scan
from runtime.memory.api import ProcessScan, Scan, TrackerFacts, Untracked
from runtime.memory.maps import Kind, Mapping, parse_details
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges
from runtime.memory.tasks import AddressSpace, owner_of_memory, read_address_space, start_ticks
from runtime.memory.watched import PRIVATE

CHUNK_PAGES = 512
CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES
READ_BYTES = 4 << 20
_UNKNOWN = 0

Hashes = NDArray[np.uint64]


class PageHashes:
    """A hash for each page of an address space that is known, in chunks of 2 MiB of addresses."""

    def __init__(self) -> None:
        self._chunks: dict[int, Hashes] = {}

    def put(self, address: int, hashes: Hashes) -> None:
        """Hashes of consecutive pages from ``address`` on."""
        for chunk, at, part in _by_chunk(address, len(hashes)):
            known = self._chunks.get(chunk)
            if known is None:
                known = self._chunks[chunk] = np.zeros(CHUNK_PAGES, dtype=np.uint64)
            known[at : at + part.stop - part.start] = hashes[part]

    def get(self, address: int, pages: int) -> Hashes:
        """As ``put`` got them; 0 for pages that are not known."""
        found = np.zeros(pages, dtype=np.uint64)
        for chunk, at, part in _by_chunk(address, pages):
            known = self._chunks.get(chunk)
            if known is not None:
                found[part] = known[at : at + part.stop - part.start]
        return found

    @property
    def bytes(self) -> int:
        return len(self._chunks) * CHUNK_PAGES * 8


def _by_chunk(address: int, pages: int) -> Iterable[tuple[int, int, slice]]:
    """Chunk number, first page in it, and the part of the pages that falls into it."""
    first = address // PAGE_BYTES
    done = 0
    while done < pages:
        chunk, at = divmod(first + done, CHUNK_PAGES)
        count = min(CHUNK_PAGES - at, pages - done)
        yield chunk, at, slice(done, done + count)
        done += count


def hash_pages(data: memoryview) -> Hashes:
    """xxh3 of each page of ``data``; never 0."""
    digest = xxhash.xxh3_64_intdigest
    count = len(data) // PAGE_BYTES
    found = np.fromiter(
        (digest(data[at : at + PAGE_BYTES]) for at in range(0, len(data), PAGE_BYTES)), np.uint64, count
    )
    found[found == _UNKNOWN] = 1
    return found


@dataclass(kw_only=True)
class _Task:
    started: str
    copied: PageHashes = field(default_factory=PageHashes)
    mapped: PageRanges = EMPTY


class HashTracker:
    """``runtime.memory.api.DirtyTracker``. Never stops or touches a process."""

    def __init__(self, *, use_pagemap_scan: bool | None = None) -> None:
        """``use_pagemap_scan`` False: find pages by /proc/PID/pagemap alone, as kernels before 6.7 must."""
        self._use_scan = has_pagemap_scan() if use_pagemap_scan is None else use_pagemap_scan
        self._tasks: dict[int, _Task] = {}
        self._reasons: dict[int, str] = {}
        self._buffer = bytearray(READ_BYTES)

    def arm(self, pids: Iterable[int]) -> None:
        """Nothing to do: what was not copied yet is dirty."""

    def scan(self, pids: Iterable[int], *, final: bool = False) -> Scan:
        begin = time.perf_counter()
        known = set(self._tasks)
        self._reasons = {}
        found: list[ProcessScan] = []
        for pid in sorted(pids):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += self._scan_process(pid)
        alive = {process.pid for process in found}
        for pid in set(self._tasks) - alive:
            del self._tasks[pid]
        took_ms = (time.perf_counter() - begin) * 1e3
        return Scan(processes=tuple(found), gone=tuple(sorted(known - alive)), took_ms=took_ms)

    def copied(self, pid: int, address: int, data: memoryview) -> None:
        task = self._tasks.get(pid)
        if task is not None:
            task.copied.put(address, hash_pages(data))

    def facts(self) -> TrackerFacts:
        return TrackerFacts(kind="hash", armed=len(self._tasks) - len(self._reasons), untracked=dict(self._reasons))

    def close(self) -> None:
        self._tasks.clear()

    def _scan_process(self, pid: int) -> list[ProcessScan]:
        started = start_ticks(pid)
        task = self._tasks.get(pid)
        if task is None or task.started != started:
            task = self._tasks[pid] = _Task(started=started)
        space = read_address_space(pid)
        if space is None:
            return []
        if other := owner_of_memory(pid, self._tasks):
            return [ProcessScan(pid=pid, shares_memory_with=other)]
        private = [mapping for mapping in space.mappings if mapping.kind in PRIVATE]
        mapped = PageRanges.from_spans((mapping.start, mapping.end) for mapping in private)
        vanished, task.mapped = task.mapped - mapped, mapped
        existing = self._existing(space, private)
        try:
            dirty = self._compare(space.tid, task, existing)
        except PermissionError as error:
            self._reasons[pid] = reason = f"its memory can not be read: {error.strerror}"
            untracked = (Untracked(ranges=existing, reason=reason),)
            return [ProcessScan(pid=pid, existing=existing, untracked=untracked, vanished=vanished, reason=reason)]
        return [ProcessScan(pid=pid, existing=existing, dirty=dirty, vanished=vanished)]

    def _existing(self, space: AddressSpace, private: Sequence[Mapping]) -> PageRanges:
        if not self._use_scan:
            private = _populated(space.tid, private)
        found: list[Bounds] = [EMPTY.bounds]
        with Pagemap(space.tid) as pagemap:
            for mapping in private:
                if self._use_scan:
                    of_files = mapping.kind == Kind.PRIVATE_FILE
                    found.append(pagemap.own_pages(mapping.start, mapping.end, of_files=of_files))
                else:
                    found.append(pagemap.own_pages_by_entry(mapping.start, mapping.end))
        return PageRanges.of(np.concatenate(found))

    def _compare(self, tid: int, task: _Task, existing: PageRanges) -> PageRanges:
        """Existing pages that differ from their copies. Afterwards only of the others a copy is known."""
        kept = PageHashes()
        differing: list[Bounds] = [EMPTY.bounds]
        with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
            for address, pages, hashes in self._hash_all(memory.fileno(), existing):
                same = (hashes == task.copied.get(address, pages)) & (hashes != _UNKNOWN)
                kept.put(address, np.where(same, hashes, np.uint64(_UNKNOWN)))
                differing.append(runs(address, ~same))
        task.copied = kept
        return PageRanges.of(np.concatenate(differing))

    def _hash_all(self, memory_fd: int, ranges: PageRanges) -> Iterable[tuple[int, int, Hashes]]:
        """Address, number of pages and their hashes, 0 for a page that can not be read."""
        for start, end in ranges.spans():
            while start < end:
                view = memoryview(self._buffer)[: min(end - start, READ_BYTES)]
                try:
                    got = os.preadv(memory_fd, [view], start) // PAGE_BYTES
                except PermissionError:
                    raise
                except OSError:
                    got = 0
                hashes = hash_pages(view[: got * PAGE_BYTES]) if got else np.zeros(1, dtype=np.uint64)
                yield start, len(hashes), hashes
                start += len(hashes) * PAGE_BYTES


def _populated(tid: int, private: Sequence[Mapping]) -> list[Mapping]:
    """Mappings that hold pages at all: an arena of many GiB with nothing in it is not to be read page by page."""
    details = parse_details(Path(f"/proc/{tid}/smaps").read_text())
    held = {each.mapping.start for each in details if each.resident_bytes or each.swapped_bytes}
    return [mapping for mapping in private if mapping.start in held]
