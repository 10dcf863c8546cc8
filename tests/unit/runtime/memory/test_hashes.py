"""Comparing a file of memory with what was copied out of it."""

import os
from collections.abc import Iterator

import pytest

from runtime.memory.hashes import Comparer, PageHashes, hash_pages
from runtime.memory.ranges import PAGE_BYTES, PageRanges

PAGES = 100


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.pwrite(fd, os.urandom(PAGES * PAGE_BYTES), 0)
    yield fd
    os.close(fd)


class Reader:
    """Compares and copies as a tracker's caller does; the buffer is small, so that reads are many."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.comparer = Comparer()

    def differing(self, first: int = 0, end: int = PAGES) -> list[int]:
        existing = PageRanges.from_spans([(first * PAGE_BYTES, end * PAGE_BYTES)])
        ranges = self.comparer.differing(self._fd, existing, bytearray(32 * PAGE_BYTES))
        return [address // PAGE_BYTES + index for address, pages in ranges for index in range(pages)]

    def copy(self, pages: list[int]) -> None:
        for page in pages:
            data = os.pread(self._fd, PAGE_BYTES, page * PAGE_BYTES)
            self.comparer.copied(page * PAGE_BYTES, memoryview(data))

    def write(self, page: int, data: bytes) -> None:
        os.pwrite(self._fd, data, page * PAGE_BYTES)


def test_what_was_never_copied_differs_until_it_is(memory: int) -> None:
    reader = Reader(memory)
    assert reader.differing() == list(range(PAGES))
    assert reader.differing() == list(range(PAGES))
    reader.copy(list(range(PAGES)))
    assert reader.differing() == []


@pytest.mark.parametrize("page", [0, 15, 16, 31, 32, 50, 99])
def test_a_changed_page_differs_alone_and_again_until_it_is_copied(memory: int, page: int) -> None:
    reader = Reader(memory)
    reader.differing()
    reader.copy(list(range(PAGES)))
    assert reader.differing() == []
    assert reader.differing() == []  # by blocks now
    reader.write(page, b"changed")
    assert reader.differing() == [page]
    assert reader.differing() == [page]
    reader.copy([page])
    assert reader.differing() == []


def test_a_page_that_was_copied_while_it_was_different_and_changed_back_differs(memory: int) -> None:
    reader = Reader(memory)
    reader.differing()
    reader.copy(list(range(PAGES)))
    reader.differing()
    reader.differing()
    before = os.pread(memory, PAGE_BYTES, 20 * PAGE_BYTES)
    reader.write(20, b"for a moment")
    reader.copy([20])
    reader.write(20, before)
    assert reader.differing() == [20]


def test_a_page_that_did_not_exist_for_a_while_must_be_copied_again(memory: int) -> None:
    reader = Reader(memory)
    reader.differing()
    reader.copy(list(range(PAGES)))
    assert reader.differing(10, PAGES) == []
    assert reader.differing() == list(range(10))


def test_a_page_that_can_not_be_read_differs(memory: int) -> None:
    reader = Reader(memory)
    reader.differing()
    reader.copy(list(range(PAGES)))
    os.ftruncate(memory, 90 * PAGE_BYTES)
    assert reader.differing() == list(range(90, PAGES))


def test_hashes_are_found_where_they_were_put() -> None:
    hashes = PageHashes()
    data = os.urandom(1000 * PAGE_BYTES)
    address = 0x7F0000000000 - 300 * PAGE_BYTES
    hashes.put(address, hash_pages(memoryview(data)))
    assert (hashes.get(address, 1000) == hash_pages(memoryview(data))).all()
    assert (hashes.get(address - 5 * PAGE_BYTES, 5) == 0).all()
    assert hashes.get(address + 999 * PAGE_BYTES, 2).tolist()[1] == 0
    assert hashes.bytes <= 4 * 512 * 8
