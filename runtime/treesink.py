"""Applies changes of a tree (runtime/tree.py) below a root, from a peer that is not trusted.

Every path is walked from the root by directory descriptors that follow no symbolic link, so nothing outside the root
can be reached whatever a peer sends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path

from runtime.errors import CorruptData, NoRoom
from runtime.tree import OVERLAY_MARKS, XATTR_PREFIXES, Change, open_beneath

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


class TreeSink:
    """Writes into ``root``, a directory that exists."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file = -1
        self._change: Change | None = None

    def apply(self, change: Change) -> None:
        """Make one change; a file's content follows by ``write``. Raises CorruptData, NoRoom."""
        self._complete()
        try:
            self._apply(change)
        except FileNotFoundError as error:
            raise CorruptData(f"{change.path!r}: its directory was never made") from error
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise NoRoom(f"no room for the container's files in {self._root}", hint="make room there") from error
            raise

    def _apply(self, change: Change) -> None:
        if not change.path:
            self._set_metadata(change, open_beneath(self._root, "", os.O_RDONLY | os.O_DIRECTORY))
            return
        parent_path, _, name = change.path.rpartition("/")
        parent = open_beneath(self._root, parent_path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if change.kind == "remove":
                _remove(parent, name)
            elif change.kind == "file":
                self._open_file(change, parent, name)
            else:
                self._make(change, parent, name)
        finally:
            os.close(parent)

    def _make(self, change: Change, parent: int, name: str) -> None:
        if change.kind == "directory":
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._set_metadata(change, os.open(name, flags, dir_fd=parent))
            return
        _remove(parent, name)
        if change.kind == "link":
            self._link(change, parent, name)
            return
        if change.kind == "symlink":
            os.symlink(change.target, name, dir_fd=parent)
        else:
            types = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "char": stat.S_IFCHR, "block": stat.S_IFBLK}
            os.mknod(name, types[change.kind] | 0o600, change.device, dir_fd=parent)
            os.chmod(name, change.mode, dir_fd=parent)
        os.chown(name, change.uid, change.gid, dir_fd=parent, follow_symlinks=False)
        if change.kind not in ("symlink", "socket"):
            os.chmod(name, change.mode, dir_fd=parent)
        os.utime(name, ns=(change.mtime_ns, change.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _link(self, change: Change, parent: int, name: str) -> None:
        target_parent_path, _, target_name = change.target.rpartition("/")
        target_parent = open_beneath(self._root, target_parent_path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.link(target_name, name, src_dir_fd=target_parent, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(target_parent)

    def _open_file(self, change: Change, parent: int, name: str) -> None:
        # A file of several names keeps its inode; what lies there and is no file goes.
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                _remove(parent, name)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.open(name, flags, 0o600, dir_fd=parent)
        self._change = change
        if change.has_content:
            os.ftruncate(self._file, 0)
            os.ftruncate(self._file, change.size)

    def write(self, change: Change, offset: int, data: memoryview) -> None:
        """Content of the file whose change was applied last. Raises NoRoom, CorruptData."""
        if self._file < 0 or change is not self._change or offset < 0 or offset + len(data) > change.size:
            raise CorruptData(f"content for {change.path!r} that does not fit")
        try:
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise NoRoom(f"no room for the container's files in {self._root}", hint="make room there") from error
            raise

    def finish(self) -> None:
        """All that was announced has come."""
        self._complete()

    close = finish

    def _complete(self) -> None:
        """Metadata last: writing changes times, and chown clears setuid bits."""
        if self._file >= 0 and self._change is not None:
            descriptor, self._file = self._file, -1
            self._set_metadata(self._change, descriptor)

    @staticmethod
    def _set_metadata(change: Change, descriptor: int) -> None:
        """Owner, mode, attributes and times of an open file or directory, which is closed."""
        try:
            os.fchown(descriptor, change.uid, change.gid)
            os.fchmod(descriptor, change.mode)
            wanted = dict(change.xattrs)
            for name in os.listxattr(descriptor):
                if name not in wanted and (name in OVERLAY_MARKS or name.startswith(XATTR_PREFIXES)):
                    os.removexattr(descriptor, name)
            for name, value in wanted.items():
                os.setxattr(descriptor, name, value)
            os.utime(descriptor, ns=(change.mtime_ns, change.mtime_ns))
        finally:
            os.close(descriptor)


def _remove(parent: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        # Symlink-safe where the platform's rmtree is, which is so on Linux.
        shutil.rmtree(name, dir_fd=parent)
