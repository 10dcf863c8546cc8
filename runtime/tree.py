"""Differences of a directory tree: what is there, what changed since, and the values that carry a change.

Carries a container's upper layer and tmpfs mounts from source to target: once while it runs, then what changed. Paths
are bytes in the file system and text with surrogate escapes here. runtime/treesink.py writes what this reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from runtime.errors import CorruptData

CHUNK_BYTES = 1 << 20
MAX_PATH_BYTES = 4096
MAX_XATTR_BYTES = 1 << 16
# Overlay's own marks that mean the same on every host. Others (origin, impure, uuid, nlink) name inodes of this one.
OVERLAY_MARKS = ("trusted.overlay.opaque", "trusted.overlay.whiteout", "trusted.overlay.redirect")
XATTR_PREFIXES = ("user.", "security.capability", "system.posix_acl_")

Kind = Literal["directory", "file", "symlink", "fifo", "socket", "char", "block", "link", "remove"]
_KINDS: dict[int, Kind] = {
    stat.S_IFDIR: "directory",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name in a tree. ``inode`` and ``ctime_ns`` tell changes and do not travel; a whiteout is a char 0:0."""

    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    nlink: int
    device: int
    target: str = ""
    xattrs: tuple[tuple[str, bytes], ...] = ()
    digest: int = 0


Snapshot = dict[str, Entry]
"""Path relative to the root ("" is the root itself) to what is there."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One step on the way from one state of a tree to the next. ``link`` makes ``path`` a hard link to ``target``."""

    kind: Kind
    path: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    device: int = 0
    target: str = ""
    xattrs: tuple[tuple[str, bytes], ...] = ()
    has_content: bool = field(default=False)

    def to_message(self) -> dict[str, Any]:
        """Plain values for msgpack; ``from_message`` gives the same change back."""
        return {
            "kind": self.kind,
            "path": os.fsencode(self.path),
            "mode": self.mode,
            "uid": self.uid,
            "gid": self.gid,
            "size": self.size,
            "mtime": self.mtime_ns,
            "device": self.device,
            "target": os.fsencode(self.target),
            "xattrs": [[name, value] for name, value in self.xattrs],
            "content": self.has_content,
        }

    @classmethod
    def from_message(cls, message: object) -> Change:
        """From a peer: every field is checked. Raises CorruptData."""
        if not isinstance(message, Mapping):
            raise CorruptData("a change is not a map")
        kind = message.get("kind")
        if kind not in (*_KINDS.values(), "link", "remove"):
            raise CorruptData(f"a change is of unknown kind {kind!r}")
        numbers = {name: _number(message, name) for name in ("mode", "uid", "gid", "size", "mtime", "device")}
        change = cls(
            kind=kind,
            path=checked_path(message.get("path")),
            mode=numbers["mode"] & 0o7777,
            uid=numbers["uid"],
            gid=numbers["gid"],
            size=numbers["size"],
            mtime_ns=numbers["mtime"],
            device=numbers["device"],
            target=_target(kind, message.get("target")),
            xattrs=_xattrs(message.get("xattrs")),
            has_content=message.get("content") is True and kind == "file",
        )
        if change.kind == "remove" and not change.path:
            raise CorruptData("a change removes the root itself")
        return change


def checked_path(value: object) -> str:
    """A relative path that stays below its root. Raises CorruptData."""
    if not isinstance(value, bytes) or len(value) > MAX_PATH_BYTES or b"\0" in value:
        raise CorruptData("a path does not fit")
    if value and any(part in (b"", b".", b"..") for part in value.split(b"/")):
        raise CorruptData(f"path {value!r} leads elsewhere")
    return os.fsdecode(value)


def _number(message: Mapping[str, Any], name: str) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise CorruptData(f"a change's {name} is out of range")
    return value


def _target(kind: str, value: object) -> str:
    if kind == "link":
        return checked_path(value)
    if not isinstance(value, bytes) or len(value) > MAX_PATH_BYTES or b"\0" in value:
        raise CorruptData("a symlink's target does not fit")
    return os.fsdecode(value)


def _xattrs(value: object) -> tuple[tuple[str, bytes], ...]:
    if not isinstance(value, list) or len(value) > 64:
        raise CorruptData("extended attributes do not fit")
    result = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise CorruptData("extended attributes do not fit")
        name, data = pair
        if not isinstance(name, str) or not isinstance(data, bytes) or len(data) > MAX_XATTR_BYTES:
            raise CorruptData("extended attributes do not fit")
        if name not in OVERLAY_MARKS and not name.startswith(XATTR_PREFIXES):
            raise CorruptData(f"extended attribute {name!r} is not carried")
        result.append((name, data))
    return tuple(result)


def scan(root: Path) -> Snapshot:
    """Everything below ``root``, which may change meanwhile: what vanishes while it is looked at is left out."""
    snapshot: Snapshot = {}
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        snapshot[""] = _entry(os.fstat(descriptor), f"/proc/self/fd/{descriptor}", follow=True)
        _scan_directory(descriptor, "", snapshot)
    finally:
        os.close(descriptor)
    return snapshot


def _scan_directory(descriptor: int, prefix: str, snapshot: Snapshot) -> None:
    with os.scandir(descriptor) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path = prefix + name
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            snapshot[path] = _entry(status, f"/proc/self/fd/{descriptor}/{name}", follow=False)
            if stat.S_ISDIR(status.st_mode):
                try:
                    inner = os.open(
                        name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor
                    )
                except OSError as error:
                    if error.errno in (errno.ENOTDIR, errno.ELOOP):
                        continue  # replaced since; the next pass sees what it is now
                    raise
                try:
                    _scan_directory(inner, f"{path}/", snapshot)
                finally:
                    os.close(inner)


def _entry(status: os.stat_result, path: str, *, follow: bool) -> Entry:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind == "file" else 0,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        inode=status.st_ino,
        nlink=status.st_nlink,
        device=status.st_rdev if kind in ("char", "block") else 0,
        target=os.readlink(path) if kind == "symlink" else "",
        xattrs=_read_xattrs(path, follow),
    )


def _read_xattrs(path: str, follow: bool) -> tuple[tuple[str, bytes], ...]:
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOENT, errno.ELOOP):
            return ()
        raise
    found = []
    for name in sorted(names):
        if name in OVERLAY_MARKS or name.startswith(XATTR_PREFIXES):
            with contextlib.suppress(OSError):
                found.append((name, os.getxattr(path, name, follow_symlinks=follow)))
    return tuple(found)


def hash_files(root: Path, snapshot: Snapshot) -> Snapshot:
    """The snapshot with each regular file's content hash, for trees whose times do not tell (tmpfs and mappings)."""
    result = dict(snapshot)
    for path, entry in snapshot.items():
        if entry.kind == "file":
            with contextlib.suppress(FileNotFoundError):
                hasher = xxhash.xxh3_64()
                for _offset, chunk in _read(root, path):
                    hasher.update(chunk)
                # Zero means "not hashed".
                result[path] = replace(entry, digest=hasher.intdigest() or 1)
    return result


def compare(old: Snapshot | None, new: Snapshot, *, always: frozenset[int]) -> list[Change]:
    """The changes that lead from ``old`` (None: an empty directory) to ``new``, in an order that can be applied.

    A file's content counts as changed when its digest differs, or, without digests, when size, times or inode differ;
    and for inodes in ``always``.
    """
    before = old or {}
    changes: list[Change] = []
    for path in sorted(before.keys() - new.keys(), key=lambda p: p.count("/"), reverse=True):
        changes.append(Change(kind="remove", path=path))
    first_of: dict[int, str] = {}
    directories: list[Change] = []
    for path, entry in sorted(new.items()):
        known = before.get(path)
        if entry.kind != "directory" and entry.nlink > 1:
            first = first_of.setdefault(entry.inode, path)
            if first != path:
                if known is None or before.get(first) is None or known.inode != before[first].inode:
                    changes.append(Change(kind="link", path=path, target=first))
                continue
        if known is not None and known.kind != entry.kind:
            changes.append(Change(kind="remove", path=path))
            known = None
        if known == entry and entry.inode not in always:
            continue
        change = _put(path, entry, has_content=entry.kind == "file" and _content_changed(known, entry, always))
        if known is None or not _same_to_reader(known, entry) or change.has_content:
            changes.append(change)
        if entry.kind == "directory" and changes:
            directories.append(change)
    # Making entries changes their directory's times: those are set once more, innermost first.
    return [*changes, *(replace(change) for change in reversed(directories))] if changes else []


def _content_changed(known: Entry | None, entry: Entry, always: frozenset[int]) -> bool:
    if known is None:
        return True
    if entry.digest and known.digest:
        return entry.digest != known.digest or entry.size != known.size
    now = (entry.size, entry.mtime_ns, entry.ctime_ns, entry.inode)
    return now != (known.size, known.mtime_ns, known.ctime_ns, known.inode) or entry.inode in always


def _same_to_reader(known: Entry, entry: Entry) -> bool:
    """Whether only what does not travel differs."""
    same = {"ctime_ns": 0, "inode": 0, "nlink": 0, "digest": 0}
    return replace(known, **same) == replace(entry, **same)  # type: ignore[arg-type]


def _put(path: str, entry: Entry, *, has_content: bool) -> Change:
    return Change(
        kind=entry.kind,
        path=path,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        size=entry.size,
        mtime_ns=max(0, entry.mtime_ns),
        device=entry.device,
        target=entry.target,
        xattrs=entry.xattrs,
        has_content=has_content,
    )


def read_chunks(root: Path, change: Change) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of a file's data, holes left out, never beyond ``change.size``. A file that has vanished or
    shrunk since gives less: the next pass sees that it changed."""
    with contextlib.suppress(FileNotFoundError):
        for offset, chunk in _read(root, change.path):
            left = change.size - offset
            if left <= 0:
                return
            yield offset, chunk[:left]


def _read(root: Path, path: str) -> Iterator[tuple[int, memoryview]]:
    descriptor = open_beneath(root, path, os.O_RDONLY)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        position = 0
        while True:
            try:
                start = os.lseek(descriptor, position, os.SEEK_DATA)
                end = os.lseek(descriptor, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # only a hole is left
                raise
            while start < end:
                count = os.preadv(descriptor, [buffer[: min(CHUNK_BYTES, end - start)]], start)
                if not count:
                    return
                yield start, buffer[:count]
                start += count
            position = end
    finally:
        os.close(descriptor)


def open_beneath(root: Path, path: str, flags: int, mode: int = 0o600) -> int:
    """Open ``path`` below ``root`` following no symbolic link on the way. Raises CorruptData where one lies there."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    parts = path.split("/") if path else []
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        last = parts[-1] if parts else "."
        return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=descriptor)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise CorruptData(f"{path!r} leads through something that is no directory") from error
        raise
    finally:
        os.close(descriptor)
