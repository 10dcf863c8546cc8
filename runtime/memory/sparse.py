"""What a sparse file holds. Stdlib only: the pager, a program of its own, imports it."""

from __future__ import annotations

import errno
import os
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
    try:
        first = os.lseek(fd, start, os.SEEK_DATA)
        if first >= end:
            return None
        return first, min(os.lseek(fd, first, os.SEEK_HOLE), end) - first
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing from here on
            return None
        raise
