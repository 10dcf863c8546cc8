"""Copies memory out of a process, running or frozen, into the caller's: many ranges in one call.

process_vm_readv(2) is fastest and obeys the mapping's protection; /proc/PID/mem does not (proc(5), FOLL_FORCE), so what
the one cannot read (PROT_NONE, execute-only) the other can. What neither can read does not exist: guard pages, memory
unmapped meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from errno import EFAULT, EPERM, ESRCH
from types import TracebackType
from typing import Self

import numpy

from runtime.criu.pages import nonzero_runs
from runtime.errors import KernelCallFailed
from runtime.memory.digests import MemoryDigest
from runtime.memory.ranges import PageRanges

PAGE_BYTES = 4096
# UIO_MAXIOV of linux/uio.h, and MAX_RW_COUNT of linux/fs.h rounded down.
MAX_VECTORS = 1024
MAX_CALL_BYTES = 1 << 31
# Measured: 4-5 GB/s in pieces of this size; larger ones leave the cache.
PIECE_BYTES = 4 << 20

Range = tuple[int, int]
"""(address, size in bytes), whole pages."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_ulong) * 2,
    ctypes.c_ulong,
)


class ProcessEnded(KernelCallFailed):
    """The process has no memory any more."""

    def __init__(self, pid: int) -> None:
        super().__init__("process_vm_readv", f"process {pid}", ESRCH)


class MemoryReader:
    """Of one process. Not for use by several threads at once; several readers of a process are fine."""

    def __init__(self, pid: int) -> None:
        """Raises FileNotFoundError or ProcessLookupError when the process has gone."""
        self._pid = pid
        self._memory_fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._memory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_into(self, ranges: Sequence[Range], view: memoryview) -> list[Range]:
        """Fill ``view`` with the ranges' content, one after the other; it must be as long as they are together.

        Ranges that cannot be read are returned, and zeros in ``view``. Raises ProcessEnded and KernelCallFailed.
        """
        sizes = [size for _address, size in ranges]
        if sum(sizes) != len(view):
            raise ValueError(f"{sum(sizes)} bytes do not fit into {len(view)}")
        unreadable: list[Range] = []
        position = 0
        for batch in cut_into_batches(ranges):
            length = sum(size for _address, size in batch)
            self._read_batch(batch, view[position : position + length], unreadable)
            position += length
        return _merged(unreadable)

    def _read_batch(self, ranges: list[Range], view: memoryview, unreadable: list[Range]) -> None:
        while ranges:
            done = self._vectors(ranges, view)
            view = view[done:]
            ranges = _after(ranges, done)
            if ranges:
                # One page of it is in the way. It may be the first of many, so what is left of its range goes with it.
                address, size = ranges[0]
                self._forced(address, view[:size], unreadable)
                view, ranges = view[size:], ranges[1:]

    def _vectors(self, ranges: list[Range], view: memoryview) -> int:
        remote = numpy.array(ranges, dtype=numpy.uint64)
        local = numpy.array([[_address_of(view), len(view)]], dtype=numpy.uint64)
        got = _libc.process_vm_readv(self._pid, local.ctypes.data, 1, remote.ctypes.data, len(remote), 0)
        if got >= 0:
            return int(got)
        errno = ctypes.get_errno()
        if errno == ESRCH:
            raise ProcessEnded(self._pid)
        # EPERM: not a descendant, or in another user namespace, under a strict kernel; then it is /proc/PID/mem's turn.
        if errno not in (EFAULT, EPERM):
            raise KernelCallFailed("process_vm_readv", f"process {self._pid}", errno)
        return 0

    def _forced(self, address: int, view: memoryview, unreadable: list[Range]) -> None:
        while len(view):
            got = 0
            with contextlib.suppress(OSError):  # EIO: nothing is there
                got = os.preadv(self._memory_fd, [view], address)
            got -= got % PAGE_BYTES
            if not got:
                view[:PAGE_BYTES] = bytes(PAGE_BYTES)
                unreadable.append((address, PAGE_BYTES))
                got = PAGE_BYTES
            address, view = address + got, view[got:]

    def digest(self, ranges: Sequence[Range], digest: MemoryDigest | None = None) -> MemoryDigest:
        """Of every page of these ranges that is not all zeros; they must ascend. Equal to the store's of the same."""
        digest = digest or MemoryDigest()
        buffer = memoryview(bytearray(PIECE_BYTES))
        for address, size in _pieces(ranges):
            self.read_into([(address, size)], buffer[:size])
            digest.add(address, buffer[:size])
        return digest

    def content(
        self, ranges: Sequence[Range], buffer: memoryview
    ) -> Iterator[tuple[list[Range], memoryview, list[Range]]]:
        """Read the ranges a bufferful at a time: (filled ranges, their bytes in the buffer, ranges that are zeros).

        Pages that cannot be read are in neither. The bytes are packed, in order, and good until the next.
        """
        for batch in cut_into_batches(ranges, len(buffer)):
            length = sum(size for _address, size in batch)
            view = buffer[:length]
            unreadable = self.read_into(batch, view)
            filled, packed, zeros = without_zeros(batch, view)
            yield filled, packed, _without(zeros, unreadable) if unreadable else zeros


def without_zeros(batch: list[Range], view: memoryview) -> tuple[list[Range], memoryview, list[Range]]:
    runs = nonzero_runs(view)
    if len(runs) == 1 and runs[0] == (0, len(view) // PAGE_BYTES):
        return batch, view, []
    filled: list[Range] = []
    zeros: list[Range] = []
    end = position = start = 0
    edges = iter([*runs, (len(view) // PAGE_BYTES, 0)])
    first, count = next(edges)
    for address, size in batch:
        offset = 0
        while offset < size:
            page = (start + offset) // PAGE_BYTES
            if page >= first + count and count:
                first, count = next(edges)
            if page < first:
                length = min(size - offset, (first - page) * PAGE_BYTES)
                zeros.append((address + offset, length))
            else:
                length = min(size - offset, (first + count - page) * PAGE_BYTES)
                filled.append((address + offset, length))
            offset += length
        start += size
    for first, count in runs:
        position, length = first * PAGE_BYTES, count * PAGE_BYTES
        if position != end:
            # memoryview assignment copes with overlap, as memmove does.
            view[end : end + length] = view[position : position + length]
        end += length
    return filled, view[:end], zeros


def _without(ranges: list[Range], others: list[Range]) -> list[Range]:
    left = _page_ranges(ranges) - _page_ranges(others)
    return [(start, end - start) for start, end in left.spans()]


def _page_ranges(ranges: list[Range]) -> PageRanges:
    return PageRanges.from_spans((address, address + size) for address, size in ranges)


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _pieces(ranges: Sequence[Range], piece_bytes: int = PIECE_BYTES) -> Iterator[Range]:
    for address, size in ranges:
        for offset in range(0, size, piece_bytes):
            yield address + offset, min(piece_bytes, size - offset)


def cut_into_batches(ranges: Sequence[Range], limit_bytes: int = PIECE_BYTES) -> Iterator[list[Range]]:
    """At most ``limit_bytes`` and MAX_VECTORS ranges each; ranges are cut where needed."""
    batch: list[Range] = []
    room = limit_bytes
    for address, size in ranges:
        while size:
            taken = min(size, room)
            batch.append((address, taken))
            address, size, room = address + taken, size - taken, room - taken
            if not room or len(batch) == MAX_VECTORS:
                yield batch
                batch, room = [], limit_bytes
    if batch:
        yield batch


def _after(ranges: list[Range], done_bytes: int) -> list[Range]:
    """What is left when so many bytes of them are done, which end at a page."""
    for index, (address, size) in enumerate(ranges):
        if done_bytes < size:
            return [(address + done_bytes, size - done_bytes), *ranges[index + 1 :]]
        done_bytes -= size
    return []


def _merged(ranges: Sequence[Range]) -> list[Range]:
    found: list[Range] = []
    for address, size in ranges:
        if found and sum(found[-1]) == address:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((address, size))
    return found
