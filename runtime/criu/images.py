"""Image sets on the receiving side: files as CRIU writes them, made from what a peer sent, and read again.

The peer is not trusted: names, addresses and sizes are checked, and nothing outside the directory or already in it is
written. Formats are CRIU's (criu.org/Images; magics from criu/include/magic.h): an image file is two u32 magics and
then records of a u32 size and a protobuf message; a pages file is nothing but pages.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError
from pycriu.images import pagemap_pb2, pstree_pb2

from runtime.criu.page_protocol import (
    KNOWN_FLAGS,
    MAX_SPACE_BYTES,
    PAGE_BYTES,
    PE_PARENT,
    PE_PRESENT,
    SpaceId,
)
from runtime.errors import CorruptData, MissingFeature, NoRoom

_IMG_COMMON = 0x54564319
_PAGEMAP = 0x56084025
_PSTREE = 0x50273030
_MAGICS = struct.Struct("<II")
_SIZE = struct.Struct("<I")
# The 64-bit count came in CRIU 4.2 (commit 7e0da4d97); a CRIU before it would not see it.
_WIDE_COUNT_SINCE = (4, 2, 0)
_MAX_NARROW_PAGES = 2**32 - 1
# A record of a process tree names each thread; the longest that CRIU itself writes are far below this.
_MAX_RECORD_BYTES = 64 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}\.img")
MAX_FILES = 1 << 18
"""More files than this are an attack: CRIU writes about five a task."""
MAX_SPACES = 1 << 16
"""Tasks and segments of shared memory; the kernel's default limit of pids is half of it."""
MAX_BATCH_BYTES = 64 << 20
"""The most that one ``reserve`` gives."""

PageRun = tuple[int, int, int]
"""(address, pages, flags), as the page server reported it."""


@dataclass(frozen=True, kw_only=True)
class PagemapEntry:
    """``pages`` pages from ``address`` on, whose bytes lie one after the other in the pages file if PE_PRESENT."""

    address: int
    pages: int
    flags: int


@dataclass(frozen=True, kw_only=True)
class Pagemap:
    """An image pagemap; its pages are in pages-``pages_id``.img beside it."""

    pages_id: int
    entries: tuple[PagemapEntry, ...]


@dataclass(frozen=True, kw_only=True)
class ImageSetSummary:
    """``pages`` have content in this set; shared memory counts once, pages shared by copy-on-write once per task."""

    tasks: int
    threads: int
    pages: int

    @property
    def memory_bytes(self) -> int:
        return self.pages * PAGE_BYTES


class ImageSetWriter:
    """Creates CRIU's image files in an existing directory, each once."""

    def __init__(self, directory: Path, *, max_files: int = MAX_FILES) -> None:
        self._directory = directory
        self._max_files = max_files
        self._files = 0

    def write_file(self, name: str, content: bytes | bytearray | memoryview) -> None:
        """Create one file with this content. Raises CorruptData for a name that CRIU would not use, and NoRoom."""
        with self.create(name) as file:
            file.write(content)

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """The new file, to write to. Raises CorruptData for a name that CRIU would not use or one that is there."""
        if not _NAME.fullmatch(name):
            raise CorruptData(f"{name[:200]!r} is not the name of an image file")
        self._files += 1
        if self._files > self._max_files:
            raise CorruptData(f"an image set of more than {self._max_files} files")
        with _no_room_named(self._directory), open(_create(self._directory / name), "wb") as file:
            yield file


@dataclass(kw_only=True)
class _Space:
    """A space that is being written: what is in its pages file so far."""

    pages_id: int
    pages_path: Path
    pagemap_path: Path
    entries: list[list[int]] = field(default_factory=list)
    pages: int = 0
    end: int = 0


class PageImageWriter:
    """Writes the pages of a dump as pages-*.img and pagemap-*.img for the CRIU of a version.

    Runs of a space must come in ascending order, as CRIU sends them; spaces may come in any order and alternate.
    No file stays open between calls. After an error the directory is of no use.
    """

    def __init__(self, directory: Path, criu_version: tuple[int, int, int], *, max_spaces: int = MAX_SPACES) -> None:
        self._directory = directory
        self._max_spaces = max_spaces
        self._wide_count = criu_version >= _WIDE_COUNT_SINCE
        if self._wide_count and "nr_pages" not in pagemap_pb2.pagemap_entry.DESCRIPTOR.fields_by_name:
            raise MissingFeature(
                "pycriu is older than CRIU and cannot write its image pagemaps", hint="run scripts/setup again"
            )
        self._spaces: dict[SpaceId, _Space] = {}
        self._scratch = memoryview(b"")
        self._finished = False

    def open(self, space: SpaceId) -> None:
        """Begin a space, or do nothing if it has begun. A task without pages needs this too. Raises CorruptData."""
        if self._finished:
            raise CorruptData(f"pages of {space} came after the end")
        if space in self._spaces:
            return
        if len(self._spaces) >= self._max_spaces or space.id >= (2**31 if space.kind == "task" else 2**56):
            raise CorruptData(f"the images cannot hold {space}")
        number = len(self._spaces) + 1
        pages_path = self._directory / f"pages-{number}.img"
        infix = "" if space.kind == "task" else "shmem-"
        pagemap_path = self._directory / f"pagemap-{infix}{space.id}.img"
        with _no_room_named(self._directory):
            os.close(_create(pages_path))
        self._spaces[space] = _Space(pages_id=number, pages_path=pages_path, pagemap_path=pagemap_path)

    @contextmanager
    def reserve(self, space: SpaceId, runs: Sequence[PageRun]) -> Iterator[memoryview]:
        """Memory to receive the pages of these runs into, one after the other; written when the block ends well.

        The memory is used again by the next call. Raises CorruptData for runs that make no sense, and NoRoom.
        """
        size = self._checked_bytes(space, runs)
        if len(self._scratch) < size:
            self._scratch = memoryview(bytearray(size))
        view = self._scratch[:size]
        yield view
        self._append(space, runs, view)

    def write(self, space: SpaceId, runs: Sequence[PageRun], data: bytes | bytearray | memoryview) -> None:
        """As ``reserve``, with the pages in the caller's memory."""
        view = memoryview(data).cast("B")
        if self._checked_bytes(space, runs) != len(view):
            raise CorruptData(f"{len(view)} bytes of pages do not fit their runs")
        self._append(space, runs, view)

    def finish(self) -> None:
        """Write every pagemap: the images are complete. Raises NoRoom."""
        self._finished = True
        self._scratch = memoryview(b"")
        with _no_room_named(self._directory):
            for space in self._spaces.values():
                with open(_create(space.pagemap_path), "wb") as file:
                    file.write(self._pagemap(space))

    def _checked_bytes(self, space: SpaceId, runs: Sequence[PageRun]) -> int:
        if self._finished or space not in self._spaces:
            raise CorruptData(f"pages of {space} came before its begin or after its end")
        end, pages = self._spaces[space].end, 0
        for address, count, flags in runs:
            if flags & ~KNOWN_FLAGS or flags & PE_PARENT or not flags & PE_PRESENT:
                # Restored, it would be read from wherever the file stands: silent corruption.
                raise CorruptData(f"a run of {space} with flags {flags:#x} has no content")
            if count <= 0 or address % PAGE_BYTES or address + count * PAGE_BYTES > MAX_SPACE_BYTES:
                raise CorruptData(f"an impossible run of {count} pages at {address:#x} of {space}")
            if address < end:
                raise CorruptData(f"pages at {address:#x} of {space} came out of order or twice")
            end = address + count * PAGE_BYTES
            pages += count
        if pages * PAGE_BYTES > MAX_BATCH_BYTES:
            raise CorruptData(f"{pages} pages in one batch; {MAX_BATCH_BYTES // PAGE_BYTES} are allowed")
        return pages * PAGE_BYTES

    def _append(self, space: SpaceId, runs: Sequence[PageRun], view: memoryview) -> None:
        written = self._spaces[space]
        with _no_room_named(self._directory):
            fd = os.open(written.pages_path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _pwrite(fd, view, written.pages * PAGE_BYTES)
            finally:
                os.close(fd)
        for address, count, flags in runs:
            last = written.entries[-1] if written.entries else None
            if last and address == written.end and flags == last[2] and last[1] + count <= _MAX_NARROW_PAGES:
                last[1] += count
            else:
                written.entries.append([address, count, flags])
            written.end = address + count * PAGE_BYTES
            written.pages += count

    def _pagemap(self, space: _Space) -> bytearray:
        image = bytearray(_MAGICS.pack(_IMG_COMMON, _PAGEMAP))
        _add_record(image, pagemap_pb2.pagemap_head(pages_id=space.pages_id))
        for address, pages, flags in space.entries:
            # Required in all versions; from 4.2 on it counts only where nr_pages is missing.
            entry = pagemap_pb2.pagemap_entry(vaddr=address, compat_nr_pages=pages, flags=flags)
            if self._wide_count:
                entry.nr_pages = pages
            _add_record(image, entry)
        return image


def read_pagemap(path: Path) -> Pagemap:
    """Read a pagemap-*.img of any version of CRIU. Raises CorruptData."""
    records = _records(path, _PAGEMAP)
    try:
        head = _decode(pagemap_pb2.pagemap_head, next(records), path)
    except StopIteration:
        raise CorruptData(f"{path.name} is empty") from None
    entries = []
    for record in records:
        entry = _decode(pagemap_pb2.pagemap_entry, record, path)
        # A pycriu from before 4.2 does not know the wide count, and neither did the CRIU that came with it.
        pages = getattr(entry, "nr_pages", 0) or entry.compat_nr_pages
        flags = entry.flags if entry.HasField("flags") else PE_PARENT if entry.in_parent else PE_PRESENT
        entries.append(PagemapEntry(address=entry.vaddr, pages=pages, flags=flags))
    return Pagemap(pages_id=head.pages_id, entries=tuple(entries))


def image_files(directory: Path, prefix: str = "") -> list[Path]:
    """Those whose names begin so, sorted. Not by a pattern, which would have to be compiled in the blackout."""
    names = (name for name in os.listdir(directory) if name.startswith(prefix) and name.endswith(".img"))
    return [directory / name for name in sorted(names)]


def image_set_summary(directory: Path) -> ImageSetSummary:
    """Count what a complete image set holds. Raises CorruptData."""
    tasks = threads = 0
    for record in _records(directory / "pstree.img", _PSTREE):
        tasks += 1
        threads += len(_decode(pstree_pb2.pstree_entry, record, directory).threads)
    pagemaps = (read_pagemap(path) for path in image_files(directory, "pagemap-"))
    pages = sum(entry.pages for pagemap in pagemaps for entry in pagemap.entries if entry.flags & PE_PRESENT)
    return ImageSetSummary(tasks=tasks, threads=threads, pages=pages)


def _records(path: Path, magic: int) -> Iterator[memoryview]:
    """The raw messages of an image file. They are decoded one by one, not through pycriu's conversion to dictionaries,
    which uses a field of descriptors that protobuf 7.34 removed."""
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise CorruptData(f"{path.name} is not readable: {error.strerror}") from error
    if len(content) < _MAGICS.size or _MAGICS.unpack_from(content) != (_IMG_COMMON, magic):
        raise CorruptData(f"{path.name} is not an image of its kind")
    position = _MAGICS.size
    while position < len(content):
        if len(content) - position < _SIZE.size:
            raise CorruptData(f"{path.name} ends inside a record")
        (size,) = _SIZE.unpack_from(content, position)
        position += _SIZE.size
        if size > min(len(content) - position, _MAX_RECORD_BYTES):
            raise CorruptData(f"{path.name} ends inside a record")
        yield content[position : position + size]
        position += size


def _decode(message: Any, record: memoryview, path: Path) -> Any:
    found = message()
    try:
        found.ParseFromString(bytes(record))
    except DecodeError as error:
        raise CorruptData(f"{path.name} holds a record that cannot be decoded: {error}") from error
    # Not every implementation of protobuf checks this when it parses.
    if not found.IsInitialized():
        raise CorruptData(f"{path.name} holds a record without a required field")
    return found


def _add_record(image: bytearray, message: Any) -> None:
    body = message.SerializeToString()
    image += _SIZE.pack(len(body))
    image += body


def _create(path: Path) -> int:
    """A new file, never one that is there and never through a link."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise CorruptData(f"the image {path.name} came twice") from None


def _pwrite(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def _no_room_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoRoom(f"no room for images in {directory}", hint="make room there and try again") from error
