"""Directory trees for tests: carry one to another place as a move does, look at one with nothing of ours, and make and
change random ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgpack
from hypothesis import strategies as st

from runtime.tree import Change, SentContent, Snapshot, compare, read_chunks, scan
from runtime.treesink import TreeSink

ROOT = os.geteuid() == 0
BLOCK = 1 << 16


def over_the_wire(change: Change) -> Change:
    """As the target gets it: through msgpack, and without what does not travel."""
    return Change.from_message(msgpack.unpackb(msgpack.packb(change.to_message())))


def no_inodes(_snapshot: Snapshot) -> frozenset[int]:
    return frozenset()


def carry(
    source: Path,
    sink: TreeSink,
    old: Snapshot | None = None,
    *,
    sent: SentContent | None = None,
    always: Callable[[Snapshot], frozenset[int]] = no_inodes,
    settle: bool = False,
) -> tuple[Snapshot, list[Change], int]:
    """One pass. Returns the snapshot, the changes, and how many bytes of content went over."""
    new = scan(source, previous=old, settle=settle)
    changes = compare(old, new, always=always(new), sent=sent)
    return new, changes, send(source, sink, changes, sent)


def send(source: Path, sink: TreeSink, changes: Iterable[Change], sent: SentContent | None = None) -> int:
    content_bytes = 0
    for change in changes:
        received = over_the_wire(change)
        sink.apply(received)
        if change.has_content:
            for offset, piece in read_chunks(source, change, sent=sent):
                content_bytes += len(piece)
                sink.write(received, offset, bytes(piece))
    return content_bytes


def look(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that a program could tell about the tree, read by the plainest means there are."""
    found: dict[str, tuple[Any, ...]] = {}
    names: dict[int, str] = {}
    inside = (Path(base, name) for base, folders, files in os.walk(root) for name in (*folders, *files))
    for path in sorted([root, *inside]):
        status = path.lstat()
        what: object = None
        if path.is_symlink():
            what = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            what = path.read_bytes()
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            what = status.st_rdev
        first = path.relative_to(root)
        if not stat.S_ISDIR(status.st_mode):
            first = Path(names.setdefault(status.st_ino, str(first)))
        is_whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
        attributes: tuple[object, ...] = () if is_whiteout else (status.st_uid, status.st_gid, status.st_mtime_ns)
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in _xattr_names(path)}
        kind = stat.S_IFMT(status.st_mode) if is_whiteout else status.st_mode
        same = "" if is_whiteout else str(first)
        found[str(path.relative_to(root))] = (kind, what, same, *attributes, xattrs)
    return found


def _xattr_names(path: Path) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))


def data_bytes(path: Path) -> int:
    """Room the file takes."""
    return path.stat().st_blocks * 512


# What random steps start from: something of everything, with the names that they use.
FIRST_STEPS: tuple[tuple[Any, ...], ...] = (
    ("mkdir", "a"),
    ("mkdir", "a/b"),
    ("mkdir", "b"),
    ("write", "a/a", 0, 3 * BLOCK + 5, b"abc"),
    ("write", "a/b/c", 1 << 20, BLOCK + 1, b"sparse"),
    ("write", "c", 0, (1 << 20) + 17, b"long"),
    ("write", "a/e f", 0, 10, b"small"),
    ("link", "a/a", "a/b/a"),
    ("link", "a/a", "b/a"),
    ("link", "c", "b/c"),
    ("symlink", "d\udcff", "a"),
    ("node", "b/b", "fifo"),
    ("link", "b/b", "a/d\udcff"),
)

# A step is a plain value, so that a failure can be read; one that does not fit what is there does nothing. Names are
# few, so that steps meet.

names = st.sampled_from(["a", "b", "c", "d\udcff", "e f"])
paths = st.lists(names, min_size=1, max_size=3).map("/".join) | st.sampled_from([step[1] for step in FIRST_STEPS])
modes = st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o2755, 0o1777, 0o000])
owners = st.sampled_from([0, 1, 1000, 65534, 2**31]) if ROOT else st.just(os.getuid())
# Around the borders of blocks and pieces.
sizes = st.sampled_from([0, 1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, (1 << 20) + 17])
offsets = st.sampled_from([0, 1, 4096, BLOCK - 1, BLOCK, 2 * BLOCK + 3, 1 << 20])
fills = st.binary(min_size=1, max_size=8)
times_ns = st.integers(-(10**18), 2 * 10**18)
values = st.binary(max_size=20)

steps = st.one_of(
    st.tuples(st.just("mkdir"), paths),
    st.tuples(st.just("write"), paths, offsets, sizes, fills),
    st.tuples(st.just("write"), paths, offsets, sizes, fills),
    st.tuples(st.just("replace"), paths, sizes, fills),
    st.tuples(st.just("truncate"), paths, st.one_of(sizes, offsets)),
    st.tuples(st.just("symlink"), paths, st.sampled_from(["a", "/etc/passwd", "../../b", "x" * 300])),
    st.tuples(st.just("link"), paths, paths),
    st.tuples(st.just("rename"), paths, paths),
    st.tuples(st.just("remove"), paths),
    st.tuples(st.just("chmod"), paths, modes),
    st.tuples(st.just("chown"), paths, owners, owners),
    st.tuples(st.just("utime"), paths, times_ns),
    st.tuples(st.just("xattr"), paths, st.sampled_from(["user.one", "user.two"]), values),
    st.tuples(st.just("no-xattr"), paths, st.sampled_from(["user.one", "user.two"])),
    st.tuples(st.just("node"), paths, st.sampled_from(["fifo", "socket", "char", "block", "whiteout"]))
    if ROOT
    else st.tuples(st.just("node"), paths, st.sampled_from(["fifo", "socket"])),
    st.tuples(st.just("opaque"), paths) if ROOT else st.nothing(),
)


def perform(root: Path, *to_do: tuple[Any, ...]) -> None:
    for step in to_do:
        with contextlib.suppress(OSError):
            _perform(root / step[1], root, step)


def _perform(path: Path, root: Path, step: tuple[Any, ...]) -> None:
    # Never through a symlink of the tree: it may lead out.
    for parent in [*path.parents][: len(path.relative_to(root).parts) - 1]:
        if parent.is_symlink() or not parent.is_dir():
            return
    plain = not path.is_symlink()
    match step[0], *step[2:]:
        case "mkdir", *_:
            path.mkdir()
        case "write", offset, size, fill if plain:
            with open(path, "r+b" if path.exists() else "xb") as file:
                file.seek(offset)
                file.write((fill * (size // len(fill) + 1))[:size])
        case "replace", size, fill:
            fresh = path.with_name("fresh")
            fresh.write_bytes((fill * (size // len(fill) + 1))[:size])
            fresh.rename(path)
        case "truncate", size if plain:
            os.truncate(path, size)
        case "symlink", target:
            path.symlink_to(target)
        case "link", other:
            os.link(path, root / other, follow_symlinks=False)
        case "rename", other:
            path.rename(root / other)
        case "remove", *_:
            shutil.rmtree(path) if path.is_dir() and plain else path.unlink()
        case "chmod", mode if plain:
            path.chmod(mode if ROOT or not path.is_dir() else 0o755)
        case "chown", uid, gid:
            os.chown(path, uid, gid, follow_symlinks=False)
        case "utime", when_ns:
            os.utime(path, ns=(when_ns, when_ns), follow_symlinks=False)
        case "xattr", name, value if plain:
            os.setxattr(path, name, value)
        case "no-xattr", name if plain:
            os.removexattr(path, name)
        case "opaque", *_ if plain and path.is_dir():
            os.setxattr(path, "trusted.overlay.opaque", b"y")
        case "node", kind:
            types = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "block": stat.S_IFBLK}
            number = os.makedev(0, 0) if kind == "whiteout" else os.makedev(1, 3)
            os.mknod(path, types.get(kind, stat.S_IFCHR) | 0o600, number)
