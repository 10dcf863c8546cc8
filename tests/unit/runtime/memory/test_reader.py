"""Reading a process's memory: here this one's own."""

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from runtime.memory.reader import MAX_VECTORS, PIECE_BYTES, MemoryReader, ProcessEnded

PAGE = 4096
MADV_GUARD_INSTALL = 102
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@pytest.fixture
def reader() -> Iterator[MemoryReader]:
    with MemoryReader(os.getpid()) as found:
        yield found


def area(size: int) -> tuple[mmap.mmap, int]:
    made = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return made, ctypes.addressof(ctypes.c_char.from_buffer(made))


def protect(address: int, size: int, protection: int) -> None:
    assert libc.mprotect(address, size, protection) == 0


def test_many_ranges_are_read_in_one_after_the_other(reader: MemoryReader) -> None:
    count = 3 * MAX_VECTORS + 5
    memory, address = area(2 * count * PAGE)
    memory[:] = os.urandom(len(memory))
    ranges = [(address + 2 * page * PAGE, PAGE) for page in range(count)]
    view = memoryview(bytearray(count * PAGE))
    assert reader.read_into(ranges, view) == []
    assert view == b"".join(memory[2 * page * PAGE : (2 * page + 1) * PAGE] for page in range(count))


def test_a_range_longer_than_a_piece_is_read_whole(reader: MemoryReader) -> None:
    memory, address = area(PIECE_BYTES * 2 + PAGE)
    memory[:] = os.urandom(len(memory))
    view = memoryview(bytearray(len(memory)))
    assert reader.read_into([(address, len(memory))], view) == []
    assert view == memory[:]


def test_memory_that_its_owner_may_not_read_is_read(reader: MemoryReader) -> None:
    memory, address = area(6 * PAGE)
    content = memory[:] = os.urandom(len(memory))
    protect(address + 2 * PAGE, 2 * PAGE, 0)
    view = memoryview(bytearray(len(memory)))
    unreadable = reader.read_into([(address, 3 * PAGE), (address + 3 * PAGE, 3 * PAGE)], view)
    protect(address + 2 * PAGE, 2 * PAGE, mmap.PROT_READ)
    assert unreadable == []
    assert view == content


def test_pages_that_do_not_exist_are_told_and_zero_and_the_rest_is_read(reader: MemoryReader) -> None:
    memory, address = area(8 * PAGE)
    content = memory[:] = os.urandom(len(memory))
    hole, hole_address = area(4 * PAGE)
    hole.madvise(mmap.MADV_DONTNEED)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    assert libc.munmap(address + 2 * PAGE, 3 * PAGE) == 0
    view = memoryview(bytearray(b"x" * len(memory)))
    unreadable = reader.read_into([(address, 8 * PAGE)], view)
    remap(address + 2 * PAGE, 3 * PAGE)
    assert unreadable == [(address + 2 * PAGE, 3 * PAGE)]
    assert view == content[: 2 * PAGE] + bytes(3 * PAGE) + content[5 * PAGE :]
    assert hole_address


def remap(address: int, size: int) -> None:
    """So that unmapping the area unmaps nobody else's memory."""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    fixed_noreplace = 0x100000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace
    assert libc.mmap(address, size, mmap.PROT_READ, flags, -1, 0) == address


def test_guard_pages_are_told(reader: MemoryReader) -> None:
    memory, address = area(4 * PAGE)
    content = memory[:] = os.urandom(len(memory))
    try:
        memory.madvise(MADV_GUARD_INSTALL, PAGE, PAGE)
    except OSError:
        pytest.skip("this kernel has no guard pages (before Linux 6.13)")
    view = memoryview(bytearray(len(memory)))
    assert reader.read_into([(address, len(memory))], view) == [(address + PAGE, PAGE)]
    assert view == content[:PAGE] + bytes(PAGE) + content[2 * PAGE :]


@pytest.mark.parametrize("buffer_pages", [1, 3, 64])
def test_zero_pages_are_left_out_of_the_content_and_told(reader: MemoryReader, buffer_pages: int) -> None:
    pages = 32
    memory, address = area(pages * PAGE)
    filled = {0, 1, 2, 7, 8, 20, 31}
    for page in filled:
        memory[page * PAGE : (page + 1) * PAGE] = os.urandom(PAGE)
    ranges = [(address, 9 * PAGE), (address + 10 * PAGE, 5 * PAGE), (address + 20 * PAGE, 12 * PAGE)]
    found: dict[int, bytes] = {}
    zeros: set[int] = set()
    for runs, content, empty in reader.content(ranges, memoryview(bytearray(buffer_pages * PAGE))):
        assert len(content) == sum(size for _address, size in runs)
        position = 0
        for start, size in runs:
            for offset in range(0, size, PAGE):
                found[(start - address + offset) // PAGE] = bytes(content[position : position + PAGE])
                position += PAGE
        zeros |= {(start - address + offset) // PAGE for start, size in empty for offset in range(0, size, PAGE)}
    assert found == {page: memory[page * PAGE : (page + 1) * PAGE] for page in filled}
    asked = {(start - address + offset) // PAGE for start, size in ranges for offset in range(0, size, PAGE)}
    assert zeros == asked - filled


def test_a_process_that_ends_after_the_reader_was_made_is_named() -> None:
    hold, release = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(release)
            os.read(hold, 1)
        finally:
            os._exit(0)
    os.close(hold)
    with MemoryReader(pid) as reader:
        os.close(release)
        os.waitpid(pid, 0)
        with pytest.raises(ProcessEnded, match=f"process {pid}"):
            reader.read_into([(0x1000, PAGE)], memoryview(bytearray(PAGE)))
