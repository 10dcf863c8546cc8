"""A checkpoint in one file that can be carried anywhere, and that ordinary tools open: ``tar --zstd -tvf FILE``.

It is a tar file compressed by Zstandard, one frame for each member (a JSON text, a file, or a whole tree of files), so
that a member can be read without the others and a damaged one has a name. The last member, ``manifest.json``, lists
the others: place, sizes and XXH3 checksum of the compressed bytes. Behind it a frame that decompressors skip tells
where the manifest is; without it the file is not whole. docs/checkpoint-file.md has the details.

Every byte of the file is covered by a checksum, and a member's is verified before anything of it is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import xxhash
import zstandard

from runtime import tar
from runtime.archive_format import (
    COPY_BYTES,
    FOOTER_BYTES,
    FORMAT,
    MANIFEST,
    MAX_JSON_BYTES,
    NAME,
    VERSION,
    Kind,
    Member,
    MemberReader,
    pack_footer,
    parse_footer,
    parse_manifest,
)
from runtime.archive_tree import read_tree, write_tree
from runtime.errors import BadInput, CorruptData, KernelCallFailed, NoRoom, WrongState
from runtime.store import sync_directory

# Pages hardly compress better at higher levels, and the container is frozen meanwhile.
LEVEL = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ArchiveWriter:
    """Writes a new archive; a context manager. The file appears under its name, whole and on the disk, when the block
    ends without an exception, and replaces what was there; otherwise nothing is left. Mode 0600.

    Methods raise NoRoom for a full disk, BadInput for a path that can not be written or a name that does not do,
    WrongState for a source that changes while it is read.
    """

    def __init__(self, path: Path) -> None:
        # Only a link of this very name is resolved: directories are the kernel's to find, /proc/PID/root among them.
        self._path = Path(os.path.realpath(path)) if path.is_symlink() else path
        if self._path.exists() and not self._path.is_file():
            raise BadInput(f"{path} is no regular file", hint="give the name of a file")
        self._partial = self._path.with_name(f".{self._path.name[:200]}.{secrets.token_hex(4)}.partial")
        self._members: list[Member] = []
        self._out = _HashedFile(self._create())

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def add_json(self, name: str, value: Any) -> None:
        """A JSON text, for people and programs alike."""
        self._check_name(name)
        self._add_bytes(name, "json", json.dumps(value, indent=1).encode() + b"\n")

    def add_file(self, name: str, source: Path) -> None:
        """The content of a regular file, which must not change meanwhile."""
        self._check_name(name)
        with open(source, "rb") as file, self._member(name, "file") as write:
            size = os.fstat(file.fileno()).st_size
            write(tar.encode(tar.TarEntry(name=name.encode(), size=size)))
            left = size
            while left:
                piece = file.read(min(COPY_BYTES, left))
                if not piece:
                    raise WrongState(f"{source} shrank while it was being written to {self._path}")
                write(piece)
                left -= len(piece)
            write(tar.padding(size))

    def add_tree(self, name: str, root: Path | int) -> None:
        """A directory with everything below it (runtime/tree.py), which must not change meanwhile."""
        self._check_name(name)
        with self._member(name, "tree") as write:
            write_tree(name, root, write)

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise BadInput(f"{name!r} is no name for a part of an archive")
        taken = (member.name for member in self._members)
        if any(name == other or name.startswith(f"{other}/") or other.startswith(f"{name}/") for other in taken):
            raise BadInput(f"the archive has a part {name!r}, or one within it, already")

    def _create(self) -> int:
        try:
            return os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._no_room(error)
            hint = "give a file in a directory that is there and can be written to"
            raise BadInput(f"{self._path} can not be written: {error.strerror}", hint=hint) from error

    def _add_bytes(self, name: str, kind: Kind, content: bytes, end: bytes = b"") -> None:
        with self._member(name, kind) as write:
            write(tar.encode(tar.TarEntry(name=name.encode(), size=len(content))))
            write(content + tar.padding(len(content)) + end)

    @contextlib.contextmanager
    def _member(self, name: str, kind: Kind) -> Iterator[Callable[[bytes | memoryview], object]]:
        offset = self._out.begin()
        # Not closed: on an error that would write once more.
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).stream_writer(self._out)  # type: ignore[arg-type]
        tar_bytes = 0

        def write(data: bytes | memoryview) -> None:
            nonlocal tar_bytes
            compressor.write(data)
            tar_bytes += len(data)

        try:
            yield write
            compressor.flush(zstandard.FLUSH_FRAME)
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._no_room(error)
            raise KernelCallFailed("writing", str(self._path), error.errno or 0) from error
        self._members.append(
            Member(
                name=name,
                kind=kind,
                offset=offset,
                frame_bytes=self._out.position - offset,
                tar_bytes=tar_bytes,
                xxh3=self._out.hasher.hexdigest(),
            )
        )

    def _finish(self) -> None:
        manifest = {"format": FORMAT, "version": VERSION, "members": [vars(member) for member in self._members]}
        self._add_bytes(MANIFEST, "json", json.dumps(manifest, indent=1).encode() + b"\n", tar.END)
        last = self._members[-1]
        try:
            self._out.write(pack_footer(last))
            os.fsync(self._out.descriptor)
            os.close(self._out.release())
            os.replace(self._partial, self._path)
            sync_directory(self._path.parent)
        except OSError as error:
            if error.errno in _NO_ROOM:
                self._no_room(error)
            raise KernelCallFailed("writing", str(self._path), error.errno or 0) from error

    def _no_room(self, error: OSError) -> NoReturn:
        raise NoRoom(
            f"no room for {self._path}", hint=f"make room in {self._path.parent}, or choose another"
        ) from error

    def _discard(self) -> None:
        descriptor = self._out.release()
        if descriptor >= 0:
            os.close(descriptor)
        self._partial.unlink(missing_ok=True)


class _HashedFile:
    """What compressors write to: all of it, with a checksum of what came since ``begin``."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.position = 0
        self.hasher = xxhash.xxh3_128()

    def begin(self) -> int:
        self.hasher = xxhash.xxh3_128()
        return self.position

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view) :]
        self.hasher.update(data)
        self.position += len(data)
        return len(data)

    def release(self) -> int:
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor


class ArchiveReader:
    """Reads an archive; a context manager. The file is not trusted: it may be damaged, or made to do harm.

    Methods raise CorruptData naming the member, NoRoom where what is extracted does not fit, BadInput for a place that
    does not do. ``verify`` reads all of the file; the others check the members they touch.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._verified: set[str] = set()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadInput(f"{path} can not be read: {error.strerror}") from error
        try:
            self._members = self._read_manifest()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def names(self) -> list[str]:
        """Of all members, in the order they were added."""
        return list(self._members)

    def verify(self) -> None:
        """Check every byte of the file against its checksum."""
        for member in self._members.values():
            self._check(member)

    def read_json(self, name: str) -> Any:
        with self._open(name, "json") as member:
            content = b"".join(member.file_pieces(MAX_JSON_BYTES))
            try:
                return json.loads(content)
            except ValueError as error:
                raise CorruptData(f"{name} is no JSON: {error}") from error

    def metadata(self) -> Any:
        """The first JSON member: what the archive is of."""
        first = next((member.name for member in self._members.values() if member.kind == "json"), None)
        if first is None:
            raise CorruptData(f"{self._path}: there are no metadata in it")
        return self.read_json(first)

    def extract_file(self, name: str, to: Path) -> None:
        """Write a file member to the new file ``to`` (mode 0600); nothing is left of it after an error."""
        with self._open(name, "file") as member:
            try:
                descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except FileExistsError as error:
                raise BadInput(f"{to} is there already") from error
            try:
                with open(descriptor, "wb") as file:
                    for piece in member.file_pieces():
                        file.write(piece)
                    member.finish()
            except BaseException as error:
                to.unlink()
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    raise NoRoom(f"no room for {to}", hint="make room there") from error
                raise

    def extract_tree(self, name: str, to_root: Path) -> None:
        """Make a tree member below ``to_root``, an empty directory. After an error what is there is of no use."""
        if os.listdir(to_root):
            raise BadInput(f"{to_root} is not empty")
        with self._open(name, "tree") as member:
            read_tree(name, to_root, member)

    def _check(self, member: Member) -> None:
        if member.name in self._verified:
            return
        hasher = xxhash.xxh3_128()
        for piece in self._raw(member):
            hasher.update(piece)
        if hasher.hexdigest() != member.xxh3:
            raise CorruptData(f"{self._path}: {member.name} is damaged", hint="use another copy of the file")
        self._verified.add(member.name)

    def _raw(self, member: Member) -> Iterator[bytes]:
        offset, end = member.offset, member.offset + member.frame_bytes
        while offset < end:
            try:
                piece = os.pread(self._descriptor, min(COPY_BYTES, end - offset), offset)
            except OSError as error:
                raise CorruptData(f"{self._path}: {member.name} can not be read: {error.strerror}") from error
            if not piece:
                raise CorruptData(f"{self._path}: {member.name} ends early", hint="use another copy of the file")
            yield piece
            offset += len(piece)

    @contextlib.contextmanager
    def _open(self, name: str, kind: Kind) -> Iterator[MemberReader]:
        member = self._members.get(name)
        if member is None or member.kind != kind:
            raise CorruptData(f"{self._path}: there is no {kind} {name} in it")
        self._check(member)
        with self._opened(member) as reader:
            yield reader

    @contextlib.contextmanager
    def _opened(self, member: Member) -> Iterator[MemberReader]:
        try:
            reader = MemberReader(member, self._raw(member))
            yield reader
            reader.finish()
        except (zstandard.ZstdError, CorruptData) as error:
            raise CorruptData(f"{self._path}: {member.name} is damaged: {error}") from error

    def _read_manifest(self) -> dict[str, Member]:
        size = os.fstat(self._descriptor).st_size
        footer = os.pread(self._descriptor, FOOTER_BYTES, max(0, size - FOOTER_BYTES))
        place = parse_footer(footer)
        if place is None or place.offset + place.frame_bytes + len(footer) != size:
            raise CorruptData(
                f"{self._path} is no whole checkpoint file: its end is missing or damaged",
                hint="use another copy of the file",
            )
        self._check(place)
        with self._opened(place) as reader:
            content = b"".join(reader.file_pieces(MAX_JSON_BYTES))
            reader.end_of_tar()
        return parse_manifest(content, place.offset)
