"""Shared memory that lives in no file of its own: shared anonymous mappings, memfd, System V. Tracked by content.

Page tables can not tell what was written to it: a process that wrote may have ended since, and a memfd is written to by
descriptor too. So the memory itself is read, once however many processes map it, and compared with what was copied out.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator

from runtime.memory.api import Segment, SegmentScan
from runtime.memory.hashes import READ_BYTES, Comparer
from runtime.memory.maps import Kind, Mapping
from runtime.memory.ranges import PAGE_BYTES, PageRanges
from runtime.memory.tasks import AddressSpace


class SharedMemory:
    """The segments that a set of processes maps."""

    def __init__(self) -> None:
        self._comparers: dict[Segment, Comparer] = {}
        self._buffer = bytearray(READ_BYTES)

    def scan(self, spaces: Iterable[AddressSpace]) -> tuple[SegmentScan, ...]:
        """In order of inode. A segment that nobody maps any more is not in it, and forgotten."""
        found: dict[Segment, SegmentScan] = {}
        for space in spaces:
            for mapping in space.mappings:
                if mapping.kind == Kind.SHARED_MEMORY and segment_of(mapping) not in found:
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        found[segment_of(mapping)] = self._scan_segment(space.tid, mapping)
        self._comparers = {segment: self._comparers[segment] for segment in found}
        return tuple(sorted(found.values(), key=lambda each: each.segment.inode))

    def copied(self, segment: Segment, offset: int, data: memoryview) -> None:
        comparer = self._comparers.get(segment)
        if comparer is not None:
            comparer.copied(offset, data)

    def _scan_segment(self, tid: int, mapping: Mapping) -> SegmentScan:
        segment = segment_of(mapping)
        path = f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}"
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            existing = PageRanges.from_spans(data_in(fd))
            comparer = self._comparers.setdefault(segment, Comparer())
            dirty = comparer.differing(fd, existing, self._buffer)
        finally:
            os.close(fd)
        return SegmentScan(segment=segment, path=path, existing=existing, dirty=dirty)


def segment_of(mapping: Mapping) -> Segment:
    return Segment(device=mapping.device, inode=mapping.inode, name=mapping.name)


def data_in(fd: int) -> Iterator[tuple[int, int]]:
    """Where the file is not a hole, in whole pages."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            # ENXIO: nothing but a hole from here to the end.
            if error.errno == errno.ENXIO:
                return
            raise
        end = -(-os.lseek(fd, start, os.SEEK_HOLE) // PAGE_BYTES) * PAGE_BYTES
        yield start // PAGE_BYTES * PAGE_BYTES, end
