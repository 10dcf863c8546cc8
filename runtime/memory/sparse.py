"""What a sparse file holds. Stdlib only: the pager, a program of its own, imports it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, size in bytes) of every stretch of data between two offsets, ascending.

    The file may change meanwhile; what is punched before its turn comes is left out.
    """
    while start < end:
        run = next_run(fd, start, end)
        if run is None:
            return
        yield run
        start = sum(run)


def next_run(fd: int, start: int, end: int) -> tuple[int, int] | None:
    """(offset, size in bytes) of the first stretch of data between two offsets, if there is any."""
    return KnownRuns(fd).next(start, end)


def first_pages(fd: int, start: int, end: int, page_bytes: int) -> tuple[int, int] | None:
    """``next_run`` between two offsets that are near each other: page by page, because the kernel does not tell where
    a run ends before it has walked there, and somebody waits."""
    first = _next_data(fd, start)
    if first >= end:
        return None
    after = first + page_bytes
    while after < end and _next_data(fd, after) == after:
        after += page_bytes
    return first, after - first


def _next_data(fd: int, start: int) -> int:
    """Beyond every offset when there is none."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return sys.maxsize
        raise


class KnownRuns:
    """``next_run`` of one file, which remembers: the kernel walks a run page by page to find its end, a millisecond
    for 200 MiB, and a program that faults again and again would wait for that every time.

    Only for callers that never ask for what was punched since, because a remembered run has no holes.
    """

    REMEMBERED = 16

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._known: list[tuple[int, int]] = []

    def next(self, start: int, end: int) -> tuple[int, int] | None:
        """(offset, size in bytes) of the first stretch of data between two offsets, if there is any."""
        if start >= end:
            return None
        for first, last in self._known:
            if first <= start < last:
                return start, min(last, end) - start
        try:
            first = os.lseek(self._fd, start, os.SEEK_DATA)
            if first >= end:
                return None
            last = os.lseek(self._fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing from here on
                return None
            raise
        self._known.insert(0, (first, last))
        del self._known[self.REMEMBERED :]
        return first, min(last, end) - first
