"""One segment of shared memory, opened from outside: what it holds, and what of it is no longer as it was copied out.

Nothing here tells the kernel to watch anything, and nothing is ever written: page tables can not say what all the
processes did that map it, have mapped it or hold a descriptor of it. Contents can.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from functools import cache

from runtime.memory.api import Segment
from runtime.memory.hashes import READ_BYTES, Comparer
from runtime.memory.maps import Kind, Mapping
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges
from runtime.memory.reader import Range, cut_into_batches, without_zeros
from runtime.memory.shared import data_in, segment_of

# linux/fcntl.h
_F_GET_SEALS = 1034
_F_SEAL_WRITE = 0x0008
_F_SEAL_FUTURE_WRITE = 0x0010
# asm-generic/mman-common.h, Linux 5.14. Where it is missing, pages are mapped when they are looked at.
_MADV_POPULATE_READ = 22
_MAX_ID = 2**32


def open_segment(tid: int, mapping: Mapping) -> OpenSegment | None:
    """What a thread's ``mapping`` shows. None where it is something that can not be put back by writing to it: huge
    pages, sealed memory, no shared memory at all. Raises FileNotFoundError or ProcessLookupError where it is gone."""
    if mapping.kind is not Kind.SHARED_MEMORY or not mapping.inode < _MAX_ID:
        return None
    try:
        fd = os.open(f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return None
    try:
        status = os.fstat(fd)
        usual = stat.S_ISREG(status.st_mode) and status.st_dev == _device() and status.st_ino == mapping.inode
        # EINVAL: no memory file of the usual kind.
        if usual and not fcntl.fcntl(fd, _F_GET_SEALS) & (_F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE):
            return OpenSegment(segment_of(mapping), os.dup(fd))
    except OSError:
        pass
    finally:
        os.close(fd)
    return None


@cache
def _device() -> int:
    """The kernel's own tmpfs, which all shared memory without a file lives on."""
    fd = os.memfd_create("cmigrate-probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


class OpenSegment:
    """Owns ``fd``. Addresses are offsets in the segment. Not for use by several threads at once."""

    def __init__(self, segment: Segment, fd: int) -> None:
        self.segment = segment
        self._fd = fd
        self._comparer: Comparer | None = None
        self._window: mmap.mmap | None = None
        self._looked_ahead = EMPTY
        self._buffer = bytearray()

    def close(self) -> None:
        if self._window is not None:
            self._window.close()
            self._window = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def system_v(self) -> bool:
        return self.segment.name.startswith("/SYSV")

    @property
    def device(self) -> int:
        return os.fstat(self._fd).st_dev

    @property
    def size_bytes(self) -> int:
        """It may end within a page."""
        return os.fstat(self._fd).st_size

    def existing(self) -> PageRanges:
        """Pages that hold something; all others read as zeros."""
        return PageRanges.from_spans(data_in(self._fd))

    def content(self, wanted: PageRanges, buffer: memoryview) -> Iterator[tuple[list[Range], memoryview, list[Range]]]:
        """As ``MemoryReader.content``. What lies beyond the end is zeros."""
        for batch in cut_into_batches([(start, end - start) for start, end in wanted.spans()], len(buffer)):
            view = buffer[: sum(size for _offset, size in batch)]
            position = 0
            for offset, size in batch:
                self._read(offset, view[position : position + size])
                position += size
            yield without_zeros(batch, view)

    def _read(self, offset: int, view: memoryview) -> None:
        while len(view):
            got = os.preadv(self._fd, [view], offset)
            if not got:
                view[:] = bytes(len(view))
                return
            view, offset = view[got:], offset + got

    def copied(self, offset: int, data: memoryview) -> None:
        """What was copied out, page-aligned."""
        if self._comparer is None:
            self._comparer = Comparer()
        self._comparer.copied(offset, data)

    def differing(self, existing: PageRanges) -> PageRanges:
        """Of existing pages those that are not as they were copied out, or never were."""
        if self._comparer is None:
            return existing
        self._buffer = self._buffer or bytearray(READ_BYTES)
        return self._comparer.differing(self._fd, existing, self._buffer)

    def look_ahead(self, existing: PageRanges) -> None:
        """Map these pages here while nobody waits: ``differing_still`` then runs at the speed of memory."""
        size = self.size_bytes // PAGE_BYTES * PAGE_BYTES
        if self._window is not None and len(self._window) != size:
            self._window.close()
            self._window, self._looked_ahead = None, EMPTY
        if size and self._window is None:
            with contextlib.suppress(OSError, ValueError):  # it may have shrunk just now
                self._window = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        if self._window is not None:
            inside = existing & PageRanges.from_spans([(0, size)])
            with contextlib.suppress(OSError, ValueError):
                for start, end in (inside - self._looked_ahead).spans():
                    self._window.madvise(_MADV_POPULATE_READ, start, end - start)
            self._looked_ahead = inside

    def differing_still(self, existing: PageRanges) -> PageRanges:
        """``differing`` of a segment that nobody can change or shorten any more: everything that maps it is frozen."""
        window = self._window
        # Behind its end a mapping is deadly: it must not be longer than the file is now.
        if window is None or self._comparer is None or len(window) > self.size_bytes:
            return self.differing(existing)
        inside = existing & PageRanges.from_spans([(0, len(window))])
        with memoryview(window) as view:
            return self._comparer.differing_in(_pieces(view, inside)) | (existing - inside)

    @property
    def ever_copied(self) -> bool:
        return self._comparer is not None


def _pieces(view: memoryview, ranges: PageRanges) -> Iterator[tuple[int, memoryview]]:
    """Up to multiples of their size, so that blocks are compared as a whole."""
    for start, end in ranges.spans():
        while start < end:
            stop = min(end, start - start % READ_BYTES + READ_BYTES)
            with view[start:stop] as piece:
                yield start, piece
            start = stop
