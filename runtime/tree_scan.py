"""Reads a directory tree into a Snapshot. The tree may change meanwhile: what vanishes under the eye is left out."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import BadInput, KernelCallFailed
from runtime.linux.files import open_beneath, start_write_back, write_back
from runtime.tree_values import MAX_PATH_BYTES, MAX_XATTRS, Entry, Kind, Snapshot, is_carried

# Times of files are taken from a clock that ticks once a jiffy, 10 ms with HZ=100. A change within the tick of the last
# one gives the same ctime; an entry whose ctime is older than this will get another at its next change.
TICK_SLACK_NS = 20_000_000

_KINDS = {
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFREG: Kind.FILE,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
}
# The last two: it is a socket now, or a device that is not there.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENXIO, errno.ENODEV)


def scan(root: Path | int, *, previous: Snapshot | None = None, settle: bool = False) -> Snapshot:
    """Everything at and below ``root`` (a directory, or a descriptor of one) on its own file system.

    Other mounts are not entered: their directories are empty ones, their files are not there. ``previous`` is an
    earlier snapshot of the same tree: what did not change since is taken from it, which saves reading it again.

    A store through a shared mapping changes a file's times only when its page was clean. With ``settle`` each file's
    dirty pages are written back first, so that from here on every change shows in the times, mapped or not. That is for
    the first pass over a running container's disk; a tmpfs has no write-back and its times never tell of such stores.

    Raises BadInput for a name too long to carry, KernelCallFailed, OSError for the root itself.
    """
    with open_tree(root) as descriptor:
        return Snapshot(entries=_Scanner(descriptor, previous, settle).run())


@contextlib.contextmanager
def open_tree(root: Path | int) -> Iterator[int]:
    """A descriptor of the root directory; one that was given is not closed."""
    if isinstance(root, int):
        yield root
        return
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class _Scanner:
    def __init__(self, root: int, previous: Snapshot | None, settle: bool) -> None:
        self._root = root
        self._device = os.fstat(root).st_dev
        self._previous = previous.entries if previous is not None else {}
        self._settle = settle
        self._entries: dict[str, Entry] = {}
        self._pending: list[str] = []

    def run(self) -> dict[str, Entry]:
        self._entries[""] = _make_entry(os.fstat(self._root), f"/proc/self/fd/{self._root}/.")
        self._list(self._root, "")
        while self._pending:
            path = self._pending.pop()
            try:
                descriptor = open_beneath(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
            except KernelCallFailed as error:
                if error.errno in _GONE:
                    continue  # replaced since; what it is now is seen by the next pass
                raise
            try:
                self._list(descriptor, f"{path}/")
            finally:
                os.close(descriptor)
        if self._settle:
            self._settle_files()
        return self._entries

    def _settle_files(self) -> None:
        """Write the files back, then look at them again. All are queued before the first is waited for."""
        files = [path for path, entry in self._entries.items() if entry.kind is Kind.FILE and entry.size]
        for path in files:
            with self._opened(path) as descriptor:
                if descriptor is not None:
                    start_write_back(descriptor)
        for path in files:
            with self._opened(path) as descriptor:
                if descriptor is not None:
                    begin_ns = time.time_ns()
                    write_back(descriptor)
                    # A page dirtied since then may be dirty still, and take stores that show nowhere.
                    self._entries[path] = _make_entry(os.fstat(descriptor), descriptor, begin_ns)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int | None]:
        """The regular file, or None where it has gone."""
        try:
            descriptor = open_beneath(self._root, path, os.O_RDONLY | os.O_NONBLOCK)
        except KernelCallFailed as error:
            if error.errno in _GONE:
                yield None
                return
            raise
        try:
            yield descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
        finally:
            os.close(descriptor)

    def _list(self, directory: int, prefix: str) -> None:
        entries, previous = self._entries, self._previous
        with os.scandir(directory) as listing:
            for item in listing:
                try:
                    status = item.stat(follow_symlinks=False)
                    if status.st_dev != self._device and not stat.S_ISDIR(status.st_mode):
                        continue
                    path = prefix + item.name
                    known = previous.get(path)
                    if (
                        known is None
                        or not known.settled
                        or known.ctime_ns != status.st_ctime_ns
                        or known.inode != status.st_ino
                    ):
                        known = self._look(directory, item.name, path, status)
                except FileNotFoundError:
                    continue
                entries[path] = known
                if known.kind is Kind.DIRECTORY and status.st_dev == self._device:
                    self._pending.append(path)

    def _look(self, directory: int, name: str, path: str, status: os.stat_result) -> Entry:
        if len(os.fsencode(path)) >= MAX_PATH_BYTES:
            raise BadInput(f"{path[:80]!r}... is too deep to carry", hint="shorten the path inside the container")
        return _make_entry(status, f"/proc/self/fd/{directory}/{name}")


def _make_entry(status: os.stat_result, where: str | int, looked_ns: int | None = None) -> Entry:
    """``where`` (a descriptor, or a path at whose end no symlink is followed) is for what a status does not tell."""
    settled = status.st_ctime_ns < (time.time_ns() if looked_ns is None else looked_ns) - TICK_SLACK_NS
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    if kind is Kind.CHAR and status.st_rdev == 0:
        # All whiteouts are the same: owner, mode and times mean nothing.
        return Entry(kind=Kind.WHITEOUT, inode=status.st_ino, ctime_ns=status.st_ctime_ns, settled=settled)
    return Entry(
        kind=kind,
        inode=status.st_ino,
        ctime_ns=status.st_ctime_ns,
        settled=settled,
        nlink=status.st_nlink,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind is Kind.FILE else 0,
        mtime_ns=status.st_mtime_ns,
        rdev=status.st_rdev if kind in (Kind.CHAR, Kind.BLOCK) else 0,
        target=_read_link(str(where)) if kind is Kind.SYMLINK else "",
        xattrs=_read_xattrs(where),
    )


def _read_link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # it has become something else
            raise FileNotFoundError(error.errno, path) from error
        raise


def _read_xattrs(where: str | int) -> tuple[tuple[str, bytes], ...]:
    follow = isinstance(where, int)
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return ()
        raise
    if not names:
        return ()
    found = []
    for name in sorted(names):
        if is_carried(name):
            try:
                found.append((name, os.getxattr(where, name, follow_symlinks=follow)))
            except OSError as error:
                if error.errno != errno.ENODATA:  # removed meanwhile
                    raise
    if len(found) > MAX_XATTRS:
        raise BadInput(f"a file has {len(found)} extended attributes; {MAX_XATTRS} can be carried")
    return tuple(found)
