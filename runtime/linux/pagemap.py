"""What the kernel knows about each page of a process: ioctl PAGEMAP_SCAN, and /proc/PID/pagemap where that is missing.

Documentation/admin-guide/mm/pagemap.rst. Ranges are arrays of shape (n, 2): start and end in bytes, uint64.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys

import numpy as np
from numpy.typing import NDArray

from runtime.errors import KernelCallFailed

PAGE_BYTES = 4096

# linux/fs.h
PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1
PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
# struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
# category_anyof_mask, return_mask
_SCAN = struct.Struct("12Q")
_WALK_END_AT = 32
PAGEMAP_SCAN = (1 | 2) << 30 | _SCAN.size << 16 | ord("f") << 8 | 16
# The kernel hands over what it found in pieces of 512 regions, so a larger array costs nothing but memory.
REGIONS = 16384
# The process can not map and unmap memory during one call: 128 MiB of pages take about 2 ms.
STEP_PAGES = 32768

# Bits of an entry of /proc/PID/pagemap.
_PM_FILE = np.uint64(1 << 61)
_PM_SWAP = np.uint64(1 << 62)
_PM_PRESENT = np.uint64(1 << 63)
_SWAP_TYPE = np.uint64(0x1F)
# The highest swap type is that of PTE markers (linux/swapops.h, SWP_PTE_MARKER): a note in the page table that says
# "write-protected" or "guard" about a page that does not exist.
_PTE_MARKER = np.uint64(31)
_READ_PAGES = 1 << 16

Bounds = NDArray[np.uint64]


class Pagemap:
    """/proc/PID/pagemap of one process; it stays with the memory of the program that the process runs now.

    Not for use by several threads at once. Every method raises ProcessLookupError when that memory has gone.
    """

    def __init__(self, pid: int) -> None:
        """Raises FileNotFoundError or ProcessLookupError when the process has gone."""
        self._target = f"process {pid}"
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = np.zeros((REGIONS, 3), dtype=np.uint64)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Pagemap:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def written(self, start: int, end: int, *, protect: bool) -> tuple[Bounds, bool]:
        """Pages written since they were last protected; with ``protect`` they are protected again in the same step.

        The second value says whether all of the range is watched by a userfaultfd. When it is not, an unknown part of
        the range has been looked at (and protected), and the first value is what was found there.
        A whole block of page table that does not exist (2 MiB) is not reported, though it may have existed before.
        """
        # WRITTEN alone: with PRESENT beside it a page dropped by MADV_DONTNEED is taken for clean (07b4377bdbe7).
        flags = PM_SCAN_CHECK_WPASYNC | (PM_SCAN_WP_MATCHING if protect else 0)
        found: list[Bounds] = []
        while start < end:
            self._regions[:, 0] = 0
            try:
                count, start = self._scan(flags, start, end, (0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN))
            except KernelCallFailed as error:
                if error.errno != errno.EPERM:
                    raise
                # What was found before the mapping that is not watched has been written out, though not counted.
                count = int(np.count_nonzero(self._regions[:, 0]))
                return _joined([*found, self._regions[:count, :2].copy()]), False
            found.append(self._regions[:count, :2].copy())
        return _joined(found), True

    def protect(self, start: int, end: int) -> None:
        """Protect all pages of a watched range, and report none. EPERM: not all of it is watched."""
        argument = bytearray(
            _SCAN.pack(
                *(_SCAN.size, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, start, end),
                *(0, 0, 0, 0, 0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN),
            )
        )
        self._ioctl(argument)

    def own_pages(self, start: int, end: int, *, of_files: bool) -> Bounds:
        """Private pages with content: present or swapped out, and not the shared page of zeros.

        ``of_files``: the range maps files, and pages that merely show the file's content do not count.
        """
        wanted = PAGE_IS_PFNZERO | (PAGE_IS_FILE if of_files else 0)
        either = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        found: list[Bounds] = []
        while start < end:
            count, start = self._scan(0, start, end, (wanted, wanted, either, either))
            regions = self._regions[:count]
            swapped = regions[:, 2] & np.uint64(PAGE_IS_PRESENT) == 0
            found.append(regions[~swapped, :2].copy())
            found += [self._without_markers(int(first), int(last)) for first, last in regions[swapped, :2]]
        return _joined(found)

    def _without_markers(self, start: int, end: int) -> Bounds:
        """To PAGEMAP_SCAN markers are swapped pages, as are pages that are just being moved. The entries tell."""
        found: list[Bounds] = []
        for first, entries in self._entries(start, end):
            marker = (entries & _PM_PRESENT == 0) & (entries & _PM_SWAP != 0) & (entries & _SWAP_TYPE == _PTE_MARKER)
            found.append(runs(first, ~marker & (entries & (_PM_PRESENT | _PM_SWAP) != 0)))
        return _joined(found)

    def own_pages_by_entry(self, start: int, end: int) -> Bounds:
        """As ``own_pages``, from /proc/PID/pagemap alone, for kernels without PAGEMAP_SCAN; zero pages count here."""
        found: list[Bounds] = []
        for first, entries in self._entries(start, end):
            marker = (entries & _PM_PRESENT == 0) & (entries & _SWAP_TYPE == _PTE_MARKER)
            exists = (entries & (_PM_PRESENT | _PM_SWAP) != 0) & (entries & _PM_FILE == 0) & ~marker
            found.append(runs(first, exists))
        return _joined(found)

    def _entries(self, start: int, end: int) -> list[tuple[int, NDArray[np.uint64]]]:
        found = []
        while start < end:
            pages = min((end - start) // PAGE_BYTES, _READ_PAGES)
            data = os.pread(self._fd, pages * 8, start // PAGE_BYTES * 8)
            if len(data) < 8:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), self._target)
            found.append((start, np.frombuffer(data, dtype=np.uint64)))
            start += len(data) // 8 * PAGE_BYTES
        return found

    def _scan(self, flags: int, start: int, end: int, categories: tuple[int, int, int, int]) -> tuple[int, int]:
        """How many regions were found, and the address up to which the range was walked."""
        vector = (self._regions.ctypes.data, len(self._regions), STEP_PAGES)
        argument = bytearray(_SCAN.pack(_SCAN.size, flags, start, end, 0, *vector, *categories))
        count = self._ioctl(argument)
        return count, int.from_bytes(argument[_WALK_END_AT : _WALK_END_AT + 8], sys.byteorder)

    def _ioctl(self, argument: bytearray) -> int:
        try:
            return int(fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument))
        except ProcessLookupError:
            raise
        except OSError as error:
            raise KernelCallFailed("PAGEMAP_SCAN", self._target, error.errno or 0) from error


def _joined(parts: list[Bounds]) -> Bounds:
    kept = [part for part in parts if len(part)]
    if not kept:
        return np.empty((0, 2), dtype=np.uint64)
    return kept[0] if len(kept) == 1 else np.concatenate(kept)


def runs(start: int, flags: NDArray[np.bool_]) -> Bounds:
    """Runs of true, as addresses, when the first flag stands for the page at ``start``."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return (edges.reshape(-1, 2) * PAGE_BYTES + start).astype(np.uint64)
