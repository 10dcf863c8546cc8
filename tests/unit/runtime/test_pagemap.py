"""What the kernel says of this process's own pages."""

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from runtime.linux.pagemap import PART_BYTES, Pagemap
from runtime.linux.probes import has_pagemap_scan

PAGE = 4096
MAP_NORESERVE = 0x4000

pytestmark = pytest.mark.skipif(not has_pagemap_scan(), reason="this kernel has no PAGEMAP_SCAN")


@pytest.fixture
def large() -> Iterator[tuple[mmap.mmap, int]]:
    """Memory of three parts and a bit that takes no room, and its address."""
    size = 3 * PART_BYTES + 5 * PAGE
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    view = ctypes.c_char.from_buffer(memory)
    yield memory, ctypes.addressof(view)
    del view
    memory.close()


def test_large_memory_is_looked_through_in_parts_and_nothing_of_it_is_missed(large: tuple[mmap.mmap, int]) -> None:
    memory, start = large
    # At the edges of parts, and of the whole.
    touched = [
        0,
        1,
        PART_BYTES - PAGE,
        PART_BYTES,
        2 * PART_BYTES - PAGE,
        2 * PART_BYTES + 7 * PAGE,
        len(memory) - PAGE,
    ]
    touched = sorted({offset // PAGE * PAGE for offset in touched})
    for offset in touched:
        memory[offset] = 1
    with Pagemap(os.getpid()) as pagemap:
        found = pagemap.survey([(start, start + len(memory), False)])
    pages = [page for first, end, _categories in found.tolist() for page in range(first, end, PAGE)]
    assert pages == [start + offset for offset in touched]
