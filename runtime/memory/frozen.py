"""Hashes of every page of a process in which nothing runs, made without making any page of it: for ``--verify``.

Not covered: mappings of ordinary files that are shared (the file is carried as a file), huge pages of hugetlbfs, and
what the kernel makes for each process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from runtime.linux.pagemap import Bounds, Pagemap
from runtime.linux.probes import has_pagemap_scan
from runtime.memory.hashes import READ_BYTES, Hashes, hash_pages
from runtime.memory.maps import Kind, Mapping
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges
from runtime.memory.sparse import data_runs
from runtime.memory.store import Store
from runtime.memory.tasks import read_address_space

VERIFIED = (Kind.ANONYMOUS, Kind.PRIVATE_FILE, Kind.SHARED_MEMORY)
ZERO_PAGE_HASH = int(hash_pages(memoryview(bytes(PAGE_BYTES)))[0])

Window = tuple[str, int, str, int, int]
"""What a mapping of shared memory shows: the segment's device, inode and name, and from where to where."""


class FrozenMemory:
    """One process. ``store`` has its pages that are not in its memory yet. Raises ProcessLookupError or
    FileNotFoundError where the process has gone."""

    def __init__(self, pid: int, *, store: Store | None = None, masked: Sequence[tuple[int, int]] = ()) -> None:
        """``masked``: (start, end) of bytes that count as zeros, because the kernel writes to them by itself."""
        space = read_address_space(pid)
        if space is None:
            raise ProcessLookupError(f"process {pid} has no memory any more")
        self._tid = space.tid
        self._store = store
        self._masked = masked
        self._mappings = [mapping for mapping in space.mappings if mapping.kind in VERIFIED]
        self._buffer = bytearray(READ_BYTES)
        self._here: dict[int, PageRanges] = {}

    def leave_out(self, windows: set[Window]) -> None:
        """Forget shared memory that is in ``windows``, and add what is not: another process need not read it again."""
        kept = []
        for mapping in self._mappings:
            window = _window(mapping)
            if mapping.kind is not Kind.SHARED_MEMORY or window not in windows:
                kept.append(mapping)
            if mapping.kind is Kind.SHARED_MEMORY:
                windows.add(window)
        self._mappings = kept

    @property
    def mapped(self) -> PageRanges:
        return PageRanges.from_spans((mapping.start, mapping.end) for mapping in self._mappings)

    def existing(self) -> PageRanges:
        """Pages that may hold something other than zeros or a file's content."""
        found: list[Bounds] = [EMPTY.bounds]
        with Pagemap(self._tid) as pagemap:
            for mapping in self._mappings:
                here = self._here[mapping.start] = self._pages_here(pagemap, mapping)
                found.append(here.bounds)
        return PageRanges.of(np.concatenate(found))

    def hashes(self, wanted: PageRanges) -> Iterator[tuple[int, Hashes]]:
        """(address, a hash for each page from there on) of all that is wanted and can be read. After ``existing``."""
        with open(f"/proc/{self._tid}/mem", "rb", buffering=0) as memory:
            for mapping in self._mappings:
                asked = wanted & PageRanges.from_spans([(mapping.start, mapping.end)])
                if asked:
                    for address, view in self._content(memory.fileno(), mapping, asked):
                        yield address, hash_pages(self._without_masked(address, view))

    def hashes_of_file(self, wanted: PageRanges) -> Iterator[tuple[int, Hashes]]:
        """The same of what the memory would hold had nobody written to it: zeros, or a file's content."""
        for mapping in self._mappings:
            asked = wanted & PageRanges.from_spans([(mapping.start, mapping.end)])
            if mapping.kind is not Kind.PRIVATE_FILE:
                for start, end in asked.spans():
                    yield start, np.full((end - start) // PAGE_BYTES, ZERO_PAGE_HASH, dtype=np.uint64)
            elif asked:
                with self._opened(mapping) as fd:
                    for address, view in self._read(fd, asked, mapping.offset - mapping.start):
                        yield address, hash_pages(view)

    def _pages_here(self, pagemap: Pagemap, mapping: Mapping) -> PageRanges:
        if mapping.kind is Kind.SHARED_MEMORY:
            with self._opened(mapping) as fd:
                shift = mapping.start - mapping.offset
                runs = data_runs(fd, mapping.offset, mapping.offset + mapping.end - mapping.start)
                # A file may end within a page.
                ends = ((offset, -(-(offset + size) // PAGE_BYTES) * PAGE_BYTES) for offset, size in runs)
                return PageRanges.from_spans((offset + shift, end + shift) for offset, end in ends)
        if not has_pagemap_scan():
            return PageRanges.of(pagemap.own_pages_by_entry(mapping.start, mapping.end))
        # A page of zeros that was put there is one that a store must not be asked for.
        of_files = mapping.kind is Kind.PRIVATE_FILE
        return PageRanges.of(pagemap.own_pages(mapping.start, mapping.end, of_files=of_files, with_zeros=not of_files))

    def _content(self, memory: int, mapping: Mapping, asked: PageRanges) -> Iterator[tuple[int, memoryview]]:
        if mapping.kind is Kind.SHARED_MEMORY:
            with self._opened(mapping) as fd:
                yield from self._read(fd, asked, mapping.offset - mapping.start)
            return
        if mapping.kind is Kind.PRIVATE_FILE:
            yield from self._read(memory, asked, 0)
            return
        here = self._here[mapping.start]
        yield from self._read(memory, asked & here, 0)
        for start, end in (asked - here).spans():
            for address in range(start, end, len(self._buffer)):
                view = memoryview(self._buffer)[: min(len(self._buffer), end - address)]
                if self._store is None:
                    view[:] = bytes(len(view))
                else:
                    self._store.read_into(address, view)
                yield address, view

    def _read(self, fd: int, asked: PageRanges, shift: int) -> Iterator[tuple[int, memoryview]]:
        """Addresses and contents; what can not be read is left out."""
        for start, end in asked.spans():
            while start < end:
                view = memoryview(self._buffer)[: min(end - start, len(self._buffer))]
                try:
                    got = os.preadv(fd, [view], start + shift)
                except OSError:
                    got = 0
                whole = -(-got // PAGE_BYTES) * PAGE_BYTES
                # A file may end within a page, which is zeros from there on.
                view[got:whole] = bytes(whole - got)
                if whole:
                    yield start, view[:whole]
                start += max(whole, PAGE_BYTES)

    def _without_masked(self, address: int, view: memoryview) -> memoryview:
        for first, last in self._masked:
            low, high = max(first - address, 0), min(last - address, len(view))
            if low < high:
                view[low:high] = bytes(high - low)
        return view

    @contextlib.contextmanager
    def _opened(self, mapping: Mapping) -> Iterator[int]:
        path = f"/proc/{self._tid}/map_files/{mapping.start:x}-{mapping.end:x}"
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def _window(mapping: Mapping) -> Window:
    end = mapping.offset + mapping.end - mapping.start
    return (mapping.device, mapping.inode, mapping.name, mapping.offset, end)
