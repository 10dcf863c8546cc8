"""Reads the content of a tree's files in pieces, and remembers what was sent so that a later pass sends less.

Nothing here grows with a file's size beyond 16 bytes for each 64 KiB that were sent of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from runtime.errors import BadInput, KernelCallFailed
from runtime.linux.files import open_beneath
from runtime.tree_scan import open_tree
from runtime.tree_values import Change, Op

CHUNK_BYTES = 1 << 20
"""Longest piece of content."""
BLOCK_BYTES = 1 << 16
"""What is compared and sent again as one. Small against a database's file, large against what a piece costs."""

_FINGERPRINT_BYTES = 16
_HOLE = bytes(_FINGERPRINT_BYTES)
_UNKNOWN = b"\xff" * _FINGERPRINT_BYTES
# The last two: it is a socket now, or a device that is not there.
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENXIO, errno.ENODEV)

Range = tuple[int, int]


@dataclass(kw_only=True)
class _SentFile:
    """A file as the peer has it: chunk number to the fingerprints of its blocks. A chunk that is missing is a hole."""

    path: str
    size: int
    chunks: dict[int, bytes] = field(default_factory=dict)

    def resize(self, size: int) -> None:
        """The peer truncates or extends its file; of a block that is cut the fingerprint no longer holds."""
        if size < self.size:
            last, within = divmod(size, CHUNK_BYTES)
            self.chunks = {number: prints for number, prints in self.chunks.items() if number <= last}
            if last in self.chunks:
                whole = within // BLOCK_BYTES * _FINGERPRINT_BYTES
                self.chunks[last] = self.chunks[last][:whole] + (_UNKNOWN if within % BLOCK_BYTES else b"")
        self.size = size


class SentContent:
    """What the peer has of one tree's files: a fingerprint of every block that went out. One for all passes of a tree.

    Given to ``compare`` it lets a changed file be patched instead of sent again, and given to ``read_chunks`` it leaves
    out the blocks that the peer has. Fingerprints are of the bytes that went out, not of what lay there at another
    time: a file that is scanned, changed, sent and changed back is told from one that never changed.
    """

    def __init__(self) -> None:
        self._files: dict[int, _SentFile] = {}

    def knows(self, inode: int, path: str) -> bool:
        """Whether it can tell what the peer has at this path for this file. Of small files it can not: they go whole.

        The path counts, because a file that got a second name while the tree was being read may have gone twice, at
        different times.
        """
        known = self._files.get(inode)
        return known is not None and known.path == path

    def begin(self, change: Change) -> _SentFile | None:
        """What the peer has once it has applied this change, to be kept up to date; None for a file not worth it."""
        if change.op is Op.PATCH:
            if not self.knows(change.inode, change.path):
                raise BadInput(f"{change.path!r} is to be patched, and what the peer has of it is not known")
            self._files[change.inode].resize(change.size)
        elif change.size > BLOCK_BYTES:
            self._files[change.inode] = _SentFile(path=change.path, size=change.size)
        else:
            self._files.pop(change.inode, None)
        return self._files.get(change.inode)


def read_chunks(
    root: Path | int, change: Change, *, sent: SentContent | None = None
) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of a file's data up to ``change.size``; holes are left out. A piece is valid until the next.

    For a PATCH only what the peer does not have, new holes as zeros: ``sent`` must be what ``compare`` was given, and
    every earlier call for this tree. A file that shrinks or vanishes meanwhile gives less: its times have changed then,
    so that the next pass sends it again.
    """
    if change.op is Op.PATCH and sent is None:
        raise BadInput(f"{change.path!r} is to be patched, and what the peer has of it is not known")
    known = sent.begin(change) if sent is not None else None
    with open_tree(root) as directory:
        try:
            descriptor = open_beneath(directory, change.path, os.O_RDONLY | os.O_NONBLOCK)
        except KernelCallFailed as error:
            if error.errno in _VANISHED:
                return
            raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and change.inode in (0, status.st_ino):
            yield from _Reader(descriptor, change, known).pieces()
    finally:
        os.close(descriptor)


class _Reader:
    """One pass over one file, a chunk at a time."""

    def __init__(self, descriptor: int, change: Change, known: _SentFile | None) -> None:
        self._descriptor = descriptor
        self._size = change.size
        self._patch = change.op is Op.PATCH
        self._known = known
        self._buffer = memoryview(bytearray(min(CHUNK_BYTES, change.size)))

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        for number in self._chunk_numbers():
            base = number * CHUNK_BYTES
            wanted = min(CHUNK_BYTES, self._size - base)
            data = data_ranges(self._descriptor, base, base + wanted)
            length = self._read(base, wanted, data)
            for start, end in self._to_send(number, length, [(a - base, b - base) for a, b in data]):
                yield base + start, self._buffer[start:end]
            if length < wanted:
                return

    def _chunk_numbers(self) -> Iterator[int]:
        """Chunks that hold data here, and for a patch those in which the peer has some."""
        there = sorted(self._known.chunks, reverse=True) if self._known is not None and self._patch else []
        position = 0
        while position < self._size:
            data = _seek(self._descriptor, position, os.SEEK_DATA)
            number = min(data, self._size) // CHUNK_BYTES if data is not None else None
            while there and (number is None or there[-1] < number):
                yield there.pop()
            if number is None or number * CHUNK_BYTES >= self._size:
                return
            if there and there[-1] == number:
                there.pop()
            yield number
            position = (number + 1) * CHUNK_BYTES

    def _read(self, base: int, wanted: int, data: list[Range]) -> int:
        """Fill the buffer, holes as zeros; returns how many bytes there are, less than wanted where the file ends."""
        position = base
        for start, end in [*data, (base + wanted, base + wanted)]:
            self._buffer[position - base : start - base] = bytes(start - position)
            while start < end:
                count = os.preadv(self._descriptor, [self._buffer[start - base : end - base]], start)
                if not count:
                    return start - base
                start += count
            position = end
        return wanted

    def _to_send(self, number: int, length: int, data: list[Range]) -> Iterator[Range]:
        """Ranges of the buffer that the peer lacks; then notes that it has them."""
        data = _clip(data, 0, length)
        if self._known is None:
            yield from data
            return
        prints = list(self._fingerprints(length, data))
        before = self._known.chunks.get(number, b"")
        if self._patch:
            for start, end in _runs(index for index, new in enumerate(prints) if new != _nth(before, index)):
                yield from _split(start * BLOCK_BYTES, min(end * BLOCK_BYTES, length), data)
        else:
            yield from data
        if length % BLOCK_BYTES and number * CHUNK_BYTES + length < self._size:
            prints[-1] = _UNKNOWN
        now = b"".join(prints)
        # Of blocks that were not read (the file ended) the peer has what it had.
        self._known.chunks[number] = now + before[len(now) :]

    def _fingerprints(self, length: int, data: list[Range]) -> Iterator[bytes]:
        for start in range(0, length, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, length)
            filled = any(a < end and start < b for a, b in data)
            yield xxhash.xxh3_128_digest(self._buffer[start:end]) if filled else _HOLE


def data_ranges(descriptor: int, start: int, end: int) -> list[Range]:
    """The parts of the file between the two offsets that are no holes. Moves the descriptor's position."""
    found: list[Range] = []
    while start < end:
        data = _seek(descriptor, start, os.SEEK_DATA)
        if data is None or data >= end:
            break
        hole = _seek(descriptor, data, os.SEEK_HOLE)
        start = min(end, hole) if hole is not None else end
        found.append((data, start))
    return found


def _seek(descriptor: int, offset: int, whence: int) -> int | None:
    """lseek(2); None when there is nothing of the kind behind the offset."""
    try:
        return os.lseek(descriptor, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _nth(prints: bytes, index: int) -> bytes:
    return prints[index * _FINGERPRINT_BYTES : (index + 1) * _FINGERPRINT_BYTES] or _HOLE


def _clip(ranges: list[Range], start: int, end: int) -> list[Range]:
    return [(max(a, start), min(b, end)) for a, b in ranges if a < end and start < b]


def _split(start: int, end: int, data: list[Range]) -> Iterator[Range]:
    """The range cut where data and holes meet, so that a piece is all of one kind."""
    position = start
    for a, b in _clip(data, start, end):
        if position < a:
            yield position, a
        yield a, b
        position = b
    if position < end:
        yield position, end


def _runs(numbers: Iterator[int]) -> Iterator[Range]:
    """Neighbours joined: 1 2 3 7 gives (1, 4) and (7, 8)."""
    start = end = -1
    for number in numbers:
        if number != end:
            if end > start:
                yield start, end
            start = number
        end = number + 1
    if end > start:
        yield start, end
