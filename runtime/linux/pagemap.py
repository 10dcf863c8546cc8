"""What the kernel knows about each page of a process: ioctl PAGEMAP_SCAN, and /proc/PID/pagemap where that is missing.

Documentation/admin-guide/mm/pagemap.rst. Ranges are arrays of shape (n, 2): start and end in bytes, uint64.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterable

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
# Reading on through the entries of 512 pages costs less than another call.
_NEAR_BYTES = 512 * PAGE_BYTES

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

    def written(self, start: int, end: int, *, protect: bool) -> Bounds:
        """Pages written since they were last protected; with ``protect`` they are protected again in the same step.

        Mappings that no userfaultfd watches may be left out or reported in full: ask ``survey`` afterwards.
        A whole block of page table that does not exist (2 MiB) is not reported, though it may have existed before.
        """
        # WRITTEN alone: with PRESENT beside it a page dropped by MADV_DONTNEED is taken for clean (07b4377bdbe7).
        flags = PM_SCAN_WP_MATCHING if protect else 0
        return _joined(
            [part[:, :2] for part in self._scan(flags, start, end, (0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN))]
        )

    def protect(self, start: int, end: int) -> None:
        """Protect all pages of a watched range, and report none. EPERM: not all of it is watched."""
        flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
        nowhere = (0, 0, 0)
        categories = (0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN)
        self._ioctl(bytearray(_SCAN.pack(_SCAN.size, flags, start, end, 0, *nowhere, *categories)))

    def own_pages(self, start: int, end: int, *, of_files: bool, with_zeros: bool = False) -> Bounds:
        """Private pages with content: present or swapped out, and not the shared page of zeros.

        ``of_files``: the range maps files, and pages that merely show the file's content do not count.
        ``with_zeros``: the shared page of zeros counts.
        """
        return self.survey([(start, end, of_files)], with_zeros=with_zeros)[:, :2]

    def survey(self, stretches: Iterable[tuple[int, int, bool]], *, with_zeros: bool = False) -> Bounds:
        """``own_pages`` of several stretches (start, end, of_files), with a third column of PAGE_IS_* bits.

        WPALLOWED: a userfaultfd watches there; only then WRITTEN counts: written since it was last protected.
        """
        either = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        found: list[Bounds] = []
        for start, end, of_files in stretches:
            # Whose page it is costs the kernel more to find out than all the rest.
            excluded = (0 if with_zeros else PAGE_IS_PFNZERO) | (PAGE_IS_FILE if of_files else 0)
            wanted = (excluded, excluded, either, either | PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN)
            found += self._scan(0, start, end, wanted)
        regions = _joined(found, 3)
        swapped = regions[:, 2] & np.uint64(PAGE_IS_PRESENT) == 0
        return _joined([regions[~swapped], *self._swapped(regions[swapped])], 3) if swapped.any() else regions

    def _swapped(self, regions: Bounds) -> list[Bounds]:
        """Of pages that PAGEMAP_SCAN calls swapped, those that exist: markers are no pages. The entries tell."""
        found: list[Bounds] = []
        far = np.flatnonzero(regions[1:, 0] - regions[:-1, 1] > np.uint64(_NEAR_BYTES)) + 1
        for part in np.split(regions, far):
            for first, entries in self._entries(int(part[0, 0]), int(part[-1, 1])):
                swapped = entries & (_PM_PRESENT | _PM_SWAP | _PM_FILE) == _PM_SWAP
                real = swapped & (entries & _SWAP_TYPE != _PTE_MARKER)
                if real.any():
                    found += _with_categories(part, first, real)
        return found

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

    def _scan(self, flags: int, start: int, end: int, categories: tuple[int, int, int, int]) -> list[Bounds]:
        """Rows of start, end and categories."""
        found: list[Bounds] = []
        while start < end:
            vector = (self._regions.ctypes.data, len(self._regions), STEP_PAGES)
            argument = bytearray(_SCAN.pack(_SCAN.size, flags, start, end, 0, *vector, *categories))
            if count := self._ioctl(argument):
                found.append(self._regions[:count].copy())
            start = int.from_bytes(argument[_WALK_END_AT : _WALK_END_AT + 8], sys.byteorder)
        return found

    def _ioctl(self, argument: bytearray) -> int:
        try:
            return int(fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument))
        except ProcessLookupError:
            raise
        except OSError as error:
            raise KernelCallFailed("PAGEMAP_SCAN", self._target, error.errno or 0) from error


def _joined(parts: list[Bounds], columns: int = 2) -> Bounds:
    kept = [part for part in parts if len(part)]
    if not kept:
        return np.empty((0, columns), dtype=np.uint64)
    return kept[0] if len(kept) == 1 else np.concatenate(kept)


def _with_categories(regions: Bounds, start: int, flags: NDArray[np.bool_]) -> list[Bounds]:
    """The flagged pages from ``start`` on that lie in one of the regions, with its categories."""
    found = []
    for first, end, categories in regions.tolist():
        low, high = (min(max((each - start) // PAGE_BYTES, 0), len(flags)) for each in (first, end))
        bounds = runs(start + low * PAGE_BYTES, flags[low:high])
        found.append(np.column_stack([bounds, np.full(len(bounds), categories, dtype=np.uint64)]))
    return found


def runs(start: int, flags: NDArray[np.bool_]) -> Bounds:
    """Runs of true, as addresses, when the first flag stands for the page at ``start``."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return (edges.reshape(-1, 2) * PAGE_BYTES + start).astype(np.uint64)
