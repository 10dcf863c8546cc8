"""A directory tree as tar entries: each as other programs know it, and in its comment the Change (runtime/tree.py) that
makes it, which is what counts here. So whiteouts, sockets and attributes survive that tar has no way to say."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgpack

from runtime import tar
from runtime.errors import CorruptData, KernelCallFailed, WrongState
from runtime.linux.files import open_beneath
from runtime.tree import Change, Kind, Op, compare, scan
from runtime.tree_content import data_ranges
from runtime.tree_scan import open_tree
from runtime.treesink import TreeSink

COPY_BYTES = 1 << 20

Write = Callable[[bytes | memoryview], object]

_KINDS = {
    Kind.FILE: tar.FILE,
    Kind.DIRECTORY: tar.DIRECTORY,
    Kind.SYMLINK: tar.SYMLINK,
    Kind.FIFO: tar.FIFO,
    Kind.SOCKET: tar.FILE,  # an empty one: tar has no sockets
    Kind.CHAR: tar.CHAR,
    Kind.BLOCK: tar.BLOCK,
    Kind.WHITEOUT: tar.CHAR,
}


class Entries(Protocol):
    """Where tar entries come from: archive.MemberReader."""

    @property
    def at_end(self) -> bool: ...
    def read(self, size: int) -> bytes: ...
    def next_entry(self) -> tuple[tar.TarEntry, int]: ...


def write_tree(name: str, root: Path | int, write: Write) -> None:
    """All of the tree at ``root`` as entries below ``name``. Raises WrongState when it changes meanwhile."""
    with open_tree(root) as directory:
        for change in compare(None, scan(directory)):
            if change.op is Op.PUT and change.has_content:
                _write_file(name, directory, change, write)
            else:
                write(tar.encode(_entry(name, change, 0, None)))


def _write_file(name: str, directory: int, change: Change, write: Write) -> None:
    try:
        descriptor = open_beneath(directory, change.path, os.O_RDONLY | os.O_NONBLOCK)
    except KernelCallFailed as error:
        raise _changed(change) from error
    try:
        status = os.fstat(descriptor)
        if (status.st_ino, status.st_size) != (change.inode, change.size):
            raise _changed(change)
        ranges = few_ranges(descriptor, change.size)
        size = sum(end - start for start, end in ranges)
        write(tar.encode(_entry(name, change, size, None if size == change.size else tuple(ranges))))
        buffer = memoryview(bytearray(min(COPY_BYTES, max(1, size))))
        for start, end in ranges:
            while start < end:
                count = os.preadv(descriptor, [buffer[: end - start]], start)
                if not count:
                    raise _changed(change)
                write(buffer[:count])
                start += count
        write(tar.padding(size))
    finally:
        os.close(descriptor)


def _changed(change: Change) -> WrongState:
    return WrongState(f"{change.path!r} changed while it was being written", hint="nothing may write to it meanwhile")


def few_ranges(descriptor: int, size: int, most: int = tar.MAX_RANGES) -> list[tar.Range]:
    """The data of a file with holes, in so many parts at most: where there are more, small holes count as data."""
    ranges = data_ranges(descriptor, 0, size)
    gap = 4096
    while len(ranges) > most:
        gap *= 2
        ranges = list(_joined(ranges, gap))
    return ranges


def _joined(ranges: list[tar.Range], gap: int) -> Iterator[tar.Range]:
    start, end = ranges[0]
    for next_start, next_end in ranges[1:]:
        if next_start - end > gap:
            yield start, end
            start = next_start
        end = next_end
    yield start, end


def _entry(name: str, change: Change, size: int, data: tuple[tar.Range, ...] | None) -> tar.TarEntry:
    is_link = change.op is Op.LINK
    return tar.TarEntry(
        name=_entry_name(name, change.path),
        kind=tar.LINK if is_link else _KINDS[change.kind],
        size=size,
        mode=change.mode,
        uid=change.uid,
        gid=change.gid,
        mtime_ns=change.mtime_ns,
        target=_entry_name(name, change.target) if is_link else os.fsencode(change.target),
        device=(os.major(change.rdev), os.minor(change.rdev)),
        xattrs=tuple((os.fsencode(key), value) for key, value in change.xattrs),
        comment=base64.b64encode(msgpack.packb(change.to_message())),
        data=data,
        real_size=change.size,
    )


def _entry_name(name: str, path: str) -> bytes:
    return os.fsencode(f"{name}/{path}" if path else name)


def read_tree(name: str, root: Path, entries: Entries) -> None:
    """Make the tree that ``write_tree`` wrote below ``root``. Raises CorruptData, and what TreeSink does."""
    with TreeSink(root) as sink:
        while not entries.at_end:
            entry, size = entries.next_entry()
            change = _parse_change(entry)
            if change.op not in (Op.PUT, Op.LINK) or entry.name != _entry_name(name, change.path):
                raise CorruptData(f"{entry.name!r} is not what it says it is")
            if entry.real_size != (change.size if change.has_content else 0):
                raise CorruptData(f"{entry.name!r} has another size than it says")
            sink.apply(change)
            for start, end in _data(entry, size, entries):
                while start < end:
                    piece = entries.read(min(COPY_BYTES, end - start))
                    sink.write(change, start, piece)
                    start += len(piece)
            entries.read(len(tar.padding(size)))
        sink.finish()


def _parse_change(entry: tar.TarEntry) -> Change:
    try:
        message = msgpack.unpackb(base64.b64decode(entry.comment, validate=True))
    except (ValueError, binascii.Error, msgpack.UnpackException) as error:
        raise CorruptData(f"{entry.name!r} has no description") from error
    return Change.from_message(message)


def _data(entry: tar.TarEntry, size: int, entries: Entries) -> tuple[tar.Range, ...]:
    """Where the entry's data belong; its map has been read."""
    if entry.data is None:
        return ((0, size),)
    parser = tar.MapParser()
    ranges = None
    while ranges is None:
        size -= tar.BLOCK_BYTES
        ranges = parser.feed(entries.read(tar.BLOCK_BYTES))
    if sum(end - start for start, end in ranges) != size:
        raise CorruptData(f"{entry.name!r} has more or less data than it says")
    return ranges
