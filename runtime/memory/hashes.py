"""Hashes of pages that were copied out, and the comparison of memory with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from runtime.linux.pagemap import Bounds, runs
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges

CHUNK_PAGES = 512
BLOCK_BYTES = 16 * PAGE_BYTES
# One hash of so much takes less time than sixteen, and other threads run meanwhile, which they can not with short ones.
LARGE_BYTES = 1 << 20
READ_BYTES = 4 << 20
_UNKNOWN = 0

Hashes = NDArray[np.uint64]


class PageHashes:
    """A hash for each page of an address space that is known, in chunks of 2 MiB of addresses."""

    def __init__(self) -> None:
        self._chunks: dict[int, Hashes] = {}

    def put(self, address: int, hashes: Hashes) -> None:
        """Hashes of consecutive pages from ``address`` on."""
        for chunk, at, part in _by_chunk(address, len(hashes)):
            known = self._chunks.get(chunk)
            if known is None:
                known = self._chunks[chunk] = np.zeros(CHUNK_PAGES, dtype=np.uint64)
            known[at : at + part.stop - part.start] = hashes[part]

    def get(self, address: int, pages: int) -> Hashes:
        """As ``put`` got them; 0 for pages that are not known."""
        found = np.zeros(pages, dtype=np.uint64)
        for chunk, at, part in _by_chunk(address, pages):
            known = self._chunks.get(chunk)
            if known is not None:
                found[part] = known[at : at + part.stop - part.start]
        return found

    @property
    def bytes(self) -> int:
        return len(self._chunks) * CHUNK_PAGES * 8


def _by_chunk(address: int, pages: int) -> Iterable[tuple[int, int, slice]]:
    """Chunk number, first page in it, and the part of the pages that falls into it."""
    first = address // PAGE_BYTES
    done = 0
    while done < pages:
        chunk, at = divmod(first + done, CHUNK_PAGES)
        count = min(CHUNK_PAGES - at, pages - done)
        yield chunk, at, slice(done, done + count)
        done += count


def hash_pages(data: memoryview) -> Hashes:
    """xxh3 of each page of ``data``; never 0."""
    digest = xxhash.xxh3_64_intdigest
    count = len(data) // PAGE_BYTES
    found = np.fromiter(
        (digest(data[at : at + PAGE_BYTES]) for at in range(0, len(data), PAGE_BYTES)), np.uint64, count
    )
    found[found == _UNKNOWN] = 1
    return found


class Comparer:
    """Compares what a file of memory (/proc/PID/mem, a file of shared memory) holds with what was copied out of it.

    A page counts as clean when it hashes like what was *copied out* last. (Like it did in the last comparison would be
    wrong: it may have been different when it was copied in between, and have changed back.)
    """

    def __init__(self) -> None:
        self._copied = PageHashes()
        # By address: the hash of a whole block that was found equal to its copies page by page. One long hash takes a
        # tenth of the time of sixteen short ones.
        self._equal_blocks: dict[int, int] = {}
        self._equal_large: dict[int, int] = {}

    def copied(self, address: int, data: memoryview) -> None:
        self._copied.put(address, hash_pages(data))
        for size, equal in ((BLOCK_BYTES, self._equal_blocks), (LARGE_BYTES, self._equal_large)):
            for block in range(address // size * size, address + len(data), size):
                equal.pop(block, None)

    def differing(self, fd: int, existing: PageRanges, buffer: bytearray) -> PageRanges:
        """Existing pages that differ from their copies or were never copied; of others than these no copy is known
        afterwards. Raises PermissionError. ``buffer`` is scratch room of a few MiB."""
        return self.differing_in(_read_all(fd, existing, buffer))

    def differing_in(self, pieces: Iterable[tuple[int, memoryview]]) -> PageRanges:
        """``differing`` of pages that somebody else reads: addresses and contents, ascending."""
        kept = PageHashes()
        equal_blocks: dict[int, int] = {}
        equal_large: dict[int, int] = {}
        found: list[Bounds] = [EMPTY.bounds]
        for address, view in pieces:
            known = self._copied.get(address, max(len(view) // PAGE_BYTES, 1))
            same = self._compare_large(address, view, known, equal_blocks, equal_large)
            kept.put(address, np.where(same, known, np.uint64(_UNKNOWN)))
            found.append(runs(address, ~same))
        self._copied, self._equal_blocks, self._equal_large = kept, equal_blocks, equal_large
        return PageRanges.of(np.concatenate(found))

    def _compare_large(
        self,
        address: int,
        view: memoryview,
        known: Hashes,
        equal_blocks: dict[int, int],
        equal_large: dict[int, int],
    ) -> NDArray[np.bool_]:
        """For each page whether it is as it was copied; no page at all of an empty ``view``, which can not be read."""
        same = np.zeros(len(known), dtype=np.bool_)
        for at, data, pages, digest in _cut(address, view, LARGE_BYTES):
            if digest is not None and self._equal_large.get(at) == digest:
                same[pages] = True
                # Its blocks are as they were, too.
                for block in range(at, at + LARGE_BYTES, BLOCK_BYTES):
                    if block in self._equal_blocks:
                        equal_blocks[block] = self._equal_blocks[block]
            else:
                same[pages] = self._compare(at, data, known[pages], equal_blocks)
            if digest is not None and same[pages].all():
                equal_large[at] = digest
        return same

    def _compare(
        self, address: int, view: memoryview, known: Hashes, equal_blocks: dict[int, int]
    ) -> NDArray[np.bool_]:
        """As ``_compare_large``, by blocks."""
        same = np.zeros(len(known), dtype=np.bool_)
        for at, data, pages, digest in _cut(address, view, BLOCK_BYTES):
            if digest is not None and self._equal_blocks.get(at) == digest:
                same[pages] = True
            else:
                same[pages] = hash_pages(data) == known[pages]
            if digest is not None and same[pages].all():
                equal_blocks[at] = digest
        return same


def _cut(address: int, view: memoryview, size_bytes: int) -> Iterator[tuple[int, memoryview, slice, int | None]]:
    """What lies between multiples of ``size_bytes``: address, content, its pages in ``view``, hash of a whole one."""
    done = 0
    while done < len(view):
        at = address + done
        data = view[done : done + size_bytes - at % size_bytes]
        digest = xxhash.xxh3_64_intdigest(data) if len(data) == size_bytes else None
        yield at, data, slice(done // PAGE_BYTES, (done + len(data)) // PAGE_BYTES), digest
        done += len(data)


def _read_all(fd: int, ranges: PageRanges, buffer: bytearray) -> Iterator[tuple[int, memoryview]]:
    """Addresses and contents of pages that follow each other; nothing for a page that can not be read."""
    for start, end in ranges.spans():
        while start < end:
            # Up to a multiple of the buffer's size, so that blocks are read as a whole.
            view = memoryview(buffer)[: min(end - start, len(buffer) - start % len(buffer))]
            try:
                got = os.preadv(fd, [view], start) // PAGE_BYTES * PAGE_BYTES
            except PermissionError:
                raise
            except OSError:
                got = 0
            yield start, view[:got]
            start += max(got, PAGE_BYTES)
