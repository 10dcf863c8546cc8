"""Values of a directory tree: what an entry is, what a change is, and how a change travels. No I/O.

Paths are relative to the tree's root, which is the empty path itself. They are text with surrogate escapes here (as
``os.fsdecode`` makes it) and bytes in messages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from runtime.errors import CorruptData

MAX_PATH_BYTES = 4096
"""PATH_MAX of Linux with its NUL: what the kernel takes in one call."""
MAX_NAME_BYTES = 255
MAX_XATTRS = 64
MAX_XATTR_BYTES = 1 << 16
"""XATTR_SIZE_MAX of linux/limits.h."""
MAX_SIZE_BYTES = 1 << 62

# Overlay's own marks that mean the same on every host. The others (origin, impure, uuid, nlink) name inodes of one.
OVERLAY_MARKS = frozenset({"trusted.overlay.opaque", "trusted.overlay.whiteout", "trusted.overlay.redirect"})
_CARRIED_NAMES = OVERLAY_MARKS | {"security.capability", "system.posix_acl_access", "system.posix_acl_default"}
_ESCAPED_OVERLAY_MARKS = "trusted.overlay.overlay."  # those of an overlay inside the container

E = TypeVar("E", bound=StrEnum)


class Kind(StrEnum):
    """What an entry is. A whiteout (char device 0:0) says that the lower layer's entry of that name is gone."""

    DIRECTORY = "directory"
    FILE = "file"
    SYMLINK = "symlink"
    FIFO = "fifo"
    SOCKET = "socket"
    CHAR = "char"
    BLOCK = "block"
    WHITEOUT = "whiteout"


class Op(StrEnum):
    """What a change does: make or replace an entry; rewrite parts of a file in place; set attributes only; give an
    entry a second name; remove one name (a directory only when empty)."""

    PUT = "put"
    PATCH = "patch"
    META = "meta"
    LINK = "link"
    REMOVE = "remove"


def is_carried(name: str) -> bool:
    """Whether the extended attribute of this name means the same on another host, and so is part of a tree."""
    if name.startswith("trusted.overlay."):
        return name in OVERLAY_MARKS or name.startswith(_ESCAPED_OVERLAY_MARKS)
    return name.startswith(("user.", "trusted.")) or name in _CARRIED_NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One name in a tree. ``inode``, ``nlink`` and ``ctime_ns`` are of this host and do not travel.

    ``settled`` is false where a later change of the entry might not show in ``ctime_ns``. ``content`` is the content's
    hash where one was taken (``hash_files``).
    """

    kind: Kind
    inode: int
    ctime_ns: int
    settled: bool
    nlink: int = 1
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    target: str = ""
    xattrs: tuple[tuple[str, bytes], ...] = ()
    content: bytes = b""

    @property
    def may_have_names(self) -> bool:
        """Whether it can be one of several hard links. Overlay links whiteouts with one another to save inodes: that
        means nothing."""
        return self.nlink > 1 and self.kind not in (Kind.DIRECTORY, Kind.WHITEOUT)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A tree at one time: path to entry, parents before what they hold, the root ("") first."""

    entries: dict[str, Entry]

    def file_inodes(self) -> frozenset[int]:
        """Inode numbers of all regular files: ``compare``'s ``always`` for a tree whose times do not tell."""
        return frozenset(entry.inode for entry in self.entries.values() if entry.kind is Kind.FILE)

    def link_groups(self) -> dict[int, list[str]]:
        """Inode number to its names within the tree, of every entry that may have several."""
        groups: dict[int, list[str]] = {}
        for path, entry in self.entries.items():
            if entry.may_have_names:
                groups.setdefault(entry.inode, []).append(path)
        return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One step from a state of a tree to the next.

    ``target`` is a symlink's target, or for LINK the path whose entry gets the name ``path``. ``inode`` is the source's
    own and does not travel.
    """

    op: Op
    path: str
    kind: Kind = Kind.FILE
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    target: str = ""
    xattrs: tuple[tuple[str, bytes], ...] = ()
    inode: int = 0

    @property
    def has_content(self) -> bool:
        """Whether pieces of content follow this change (``read_chunks``), though there may be none."""
        return self.size > 0 and self.op in (Op.PUT, Op.PATCH)

    @property
    def weight_bytes(self) -> int:
        """About what its message takes, never less: for a sender that packs many into a frame."""
        text = 4 * (len(self.path) + len(self.target))  # UTF-8 has at most four bytes a character
        return 160 + text + sum(4 * len(name) + len(value) + 16 for name, value in self.xattrs)

    def to_message(self) -> dict[str, Any]:
        """Plain values for msgpack, fields of value zero left out; ``from_message`` gives the change back, without
        ``inode``."""
        message: dict[str, Any] = {"op": str(self.op), "path": os.fsencode(self.path)}
        if self.op is Op.LINK:
            message["target"] = os.fsencode(self.target)
        if self.op in (Op.LINK, Op.REMOVE):
            return message
        message["kind"] = str(self.kind)
        for name in ("mode", "uid", "gid", "size", "mtime_ns", "rdev"):
            if value := getattr(self, name):
                message[name] = value
        if self.target:
            message["target"] = os.fsencode(self.target)
        if self.xattrs:
            message["xattrs"] = [[os.fsencode(name), value] for name, value in self.xattrs]
        return message

    @classmethod
    def from_message(cls, message: object) -> Change:
        """From a peer: every field is checked, unknown ones are ignored. Raises CorruptData."""
        if not isinstance(message, Mapping):
            raise CorruptData("a change is not a map")
        path = _path(message.get("path"))
        op = _member(Op, message.get("op"), path)
        if op is Op.REMOVE or op is Op.LINK:
            target = _path(message.get("target")) if op is Op.LINK else ""
            if not path or (op is Op.LINK and not target):
                raise CorruptData(f"a change wants to {op} the root")
            return cls(op=op, path=path, target=target)
        kind = _member(Kind, message.get("kind"), path)
        if (not path and kind is not Kind.DIRECTORY) or (op is Op.PATCH and kind is not Kind.FILE):
            raise CorruptData(f"change of {path!r}: {op} does not go with a {kind}")
        return cls(
            op=op,
            path=path,
            kind=kind,
            mode=_number(message, "mode", 0, 0o7777),
            # The highest value of the type means "leave it" to chown(2).
            uid=_number(message, "uid", 0, 2**32 - 2),
            gid=_number(message, "gid", 0, 2**32 - 2),
            size=_number(message, "size", 0, MAX_SIZE_BYTES if kind is Kind.FILE else 0),
            mtime_ns=_number(message, "mtime_ns", -(2**63), 2**63 - 1),
            rdev=_number(message, "rdev", 0, 2**63 - 1 if kind in (Kind.CHAR, Kind.BLOCK) else 0),
            target=_symlink_target(message.get("target"), path) if kind is Kind.SYMLINK else "",
            xattrs=_xattrs(message.get("xattrs", []), path),
        )


def _path(value: object) -> str:
    """A path that stays below the root, whatever the file system holds."""
    if not isinstance(value, bytes) or len(value) >= MAX_PATH_BYTES or b"\0" in value:
        raise CorruptData(f"the path of a change does not fit: {_short(value)}")
    if value and any(part in (b"", b".", b"..") or len(part) > MAX_NAME_BYTES for part in value.split(b"/")):
        raise CorruptData(f"the path of a change leads elsewhere: {_short(value)}")
    return os.fsdecode(value)


def _symlink_target(value: object, path: str) -> str:
    # Wherever it points to: nothing of ours follows it.
    if not isinstance(value, bytes) or not 0 < len(value) < MAX_PATH_BYTES or b"\0" in value:
        raise CorruptData(f"change of {path!r}: the symlink's target does not fit")
    return os.fsdecode(value)


def _member(kind: type[E], value: object, path: str) -> E:
    try:
        return kind(value if isinstance(value, str) else "")
    except ValueError:
        raise CorruptData(f"change of {path!r}: {_short(value)} is no {kind.__name__.lower()}") from None


def _number(message: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = message.get(name, 0)
    if type(value) is not int or not least <= value <= most:
        raise CorruptData(f"change of {message['path']!r}: {name} does not fit: {_short(value)}")
    return value


def _xattrs(value: object, path: str) -> tuple[tuple[str, bytes], ...]:
    if not isinstance(value, list) or len(value) > MAX_XATTRS:
        raise CorruptData(f"change of {path!r}: its extended attributes do not fit")
    found: dict[str, bytes] = {}
    for pair in value:
        name, data = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if not isinstance(name, bytes) or not isinstance(data, bytes) or len(data) > MAX_XATTR_BYTES:
            raise CorruptData(f"change of {path!r}: its extended attributes do not fit")
        text = os.fsdecode(name)
        if not 0 < len(name) <= MAX_NAME_BYTES or b"\0" in name or not is_carried(text) or text in found:
            raise CorruptData(f"change of {path!r}: extended attribute {_short(name)} is not carried")
        found[text] = data
    return tuple(found.items())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
