"""Applies changes of a tree (runtime/tree.py) below a root, from a peer that is not trusted.

Directories are opened by openat2(2) below the root through no symbolic link and into no other mount, and entries are
named relative to them: whatever a peer sends, nothing outside the root is reached.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import CorruptData, KernelCallFailed, MissingFeature, NoRoom
from runtime.linux.files import open_beneath, punch_hole, sync_file_system
from runtime.tree import digest
from runtime.tree_values import Change, Kind, Op, is_carried

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
# What comes of changes that do not fit each other, or that try to leave the root.
_LIES = (
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.ELOOP,
    errno.EXDEV,
    errno.ENAMETOOLONG,
    errno.EFBIG,
    errno.EINVAL,
    errno.EMLINK,
)
# More of them are faster synced with the whole file system.
SYNCED_ONE_BY_ONE = 500
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES = {
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
    Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.WHITEOUT: stat.S_IFCHR,
}


class TreeSink:
    """Makes the tree below ``root``, a directory that exists and that nobody else writes to. One thread.

    Errors of every method: CorruptData for changes that lie or do not fit, NoRoom, MissingFeature where the file system
    here lacks something, KernelCallFailed. After an error the tree is incomplete and of no use.
    """

    def __init__(self, root: Path) -> None:
        self._path = root
        self._root = os.open(root, _DIRECTORY)
        # The directory last worked in: path, descriptor, and the mtime to give back when leaving it.
        self._parent: tuple[str, int, int] | None = None
        # Attributes of a file come after its content: writing changes its times and takes setuid and capabilities.
        self._file: tuple[Change, int] | None = None
        self._changed: set[str] = set()

    def __enter__(self) -> TreeSink:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all descriptors; what was applied stays, whether or not it was complete. Idempotent."""
        if self._file is not None:
            os.close(self._file[1])
            self._file = None
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def apply(self, change: Change) -> None:
        """Make one change. The content of a file follows by ``write``, until the next ``apply`` or ``finish``."""
        self._complete_file()
        with self._explained(change.path):
            if not change.path:
                self._leave_parent()
                self._directory_attributes(change, ".", self._root)
                return
            parent_path, _, name = change.path.rpartition("/")
            self._changed.add(parent_path)
            if change.kind is Kind.FILE:
                self._changed.add(change.path)
            parent = self._open_parent(parent_path)
            match change.op:
                case Op.REMOVE:
                    _remove(name, parent)
                case Op.LINK:
                    self._link(change.target, name, parent)
                case Op.PUT:
                    self._put(change, name, parent)
                case Op.PATCH:
                    self._patch(change, name, parent)
                case Op.META:
                    self._meta(change, name, parent)

    def write(self, change: Change, offset: int, data: memoryview | bytes) -> None:
        """A piece of the content of the file whose change was applied last."""
        view = memoryview(data).cast("B")
        if self._file is None or self._file[0] != change:
            raise CorruptData(f"{change.path!r}: content came that does not belong to the last change")
        if offset < 0 or offset + len(view) > change.size:
            raise CorruptData(f"{change.path!r}: content came beyond the size of {change.size} bytes")
        with self._explained(change.path):
            if change.op is Op.PATCH and self._punched(offset, view):
                return
            while view:
                count = os.pwrite(self._file[1], view, offset)
                view, offset = view[count:], offset + count

    def finish(self) -> None:
        """Everything that was announced has come: complete the last file and directory.

        More may be applied afterwards, followed by ``finish`` again.
        """
        self._complete_file()
        self._leave_parent()

    def sync(self) -> None:
        """Everything applied is on the disk when this returns. It writes much: not for a blackout.

        Few files one by one: what others on the host have not written yet is not waited for. What the container has
        removed or replaced meanwhile is its own.
        """
        changed, self._changed = self._changed, set()
        if len(changed) > SYNCED_ONE_BY_ONE:
            sync_file_system(self._root)
            return
        for path in sorted(changed):
            try:
                descriptor = open_beneath(self._root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except KernelCallFailed:
                continue
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def verify(self, expected: bytes) -> None:
        """Raises CorruptData when the tree is not the one that ``digest`` gave ``expected`` for."""
        if digest(self._root) != expected:
            raise CorruptData(f"the files in {self._path} are not those that were sent", hint="move it again")

    # Changes, by kind

    def _link(self, target: str, name: str, parent: int) -> None:
        target_parent, _, target_name = target.rpartition("/")
        source = open_beneath(self._root, target_parent, os.O_PATH | os.O_DIRECTORY)
        try:
            if stat.S_ISDIR(os.stat(target_name, dir_fd=source, follow_symlinks=False).st_mode):
                raise CorruptData(f"{name!r} is to be a name of {target!r}, which is a directory")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            os.link(target_name, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)

    def _put(self, change: Change, name: str, parent: int) -> None:
        if change.kind is Kind.DIRECTORY:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            self._directory_attributes(change, name, parent)
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        if change.kind is Kind.FILE:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o600, dir_fd=parent)
            self._file = change, descriptor
            os.ftruncate(descriptor, change.size)
        elif change.kind is Kind.SYMLINK:
            os.symlink(change.target, name, dir_fd=parent)
            self._name_attributes(change, name, parent)
        else:
            os.mknod(name, _NODES[change.kind] | 0o600, change.rdev, dir_fd=parent)
            if change.kind is not Kind.WHITEOUT:
                self._name_attributes(change, name, parent)

    def _patch(self, change: Change, name: str, parent: int) -> None:
        descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        self._file = change, descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CorruptData(f"{change.path!r} is to be patched and is no file")
        os.ftruncate(descriptor, change.size)

    def _meta(self, change: Change, name: str, parent: int) -> None:
        if change.kind is Kind.DIRECTORY:
            self._directory_attributes(change, name, parent)
        else:
            self._name_attributes(change, name, parent)

    # Attributes

    def _directory_attributes(self, change: Change, name: str, parent: int) -> None:
        descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            _set_attributes(descriptor, change)
        finally:
            os.close(descriptor)

    def _name_attributes(self, change: Change, name: str, parent: int) -> None:
        """Of what is not opened: a symlink, device, pipe or socket; or a file that stays as it is."""
        if change.kind is Kind.SYMLINK:
            os.chown(name, change.uid, change.gid, dir_fd=parent, follow_symlinks=False)
            _set_xattrs(f"/proc/self/fd/{parent}/{name}", change, follow=False)
            os.utime(name, ns=(change.mtime_ns, change.mtime_ns), dir_fd=parent, follow_symlinks=False)
            return
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            if stat.S_ISLNK(os.fstat(descriptor).st_mode):
                raise CorruptData(f"{change.path!r} is a symlink and no {change.kind}")
            _set_attributes(f"/proc/self/fd/{descriptor}", change)
        finally:
            os.close(descriptor)

    def _complete_file(self) -> None:
        if self._file is None:
            return
        change, descriptor = self._file
        self._file = None
        try:
            with self._explained(change.path):
                _set_attributes(descriptor, change)
        finally:
            os.close(descriptor)

    # Help

    def _punched(self, offset: int, view: memoryview) -> bool:
        """Zeros over what is there become a hole, as they are one on the other side."""
        assert self._file is not None
        if view[0] or view[-1] or any(view.tobytes()):
            return False
        try:
            punch_hole(self._file[1], offset, len(view))
        except KernelCallFailed as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    def _open_parent(self, path: str) -> int:
        """The directory that an entry is in, kept for the next one.

        What is done in it changes its times, which are right now: ``_leave_parent`` puts them back.
        """
        if self._parent is None or self._parent[0] != path:
            self._leave_parent()
            descriptor = open_beneath(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
            self._parent = path, descriptor, os.fstat(descriptor).st_mtime_ns
        return self._parent[1]

    def _leave_parent(self) -> None:
        if self._parent is not None:
            path, descriptor, mtime_ns = self._parent
            self._parent = None
            try:
                with self._explained(path):
                    os.utime(descriptor, ns=(mtime_ns, mtime_ns))
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except (OSError, KernelCallFailed) as error:
            number = error.errno or 0
            if number in _NO_ROOM:
                raise NoRoom(
                    f"no room for {path!r} in {self._path}", hint="make room there, or choose a host that has it"
                ) from error
            if number in _LIES:
                raise CorruptData(f"{path!r} does not fit what is there: {os.strerror(number)}") from error
            if number == errno.EOPNOTSUPP:
                raise MissingFeature(
                    f"the file system of {self._path} can not hold all of {path!r}", hint="it needs extended attributes"
                ) from error
            if isinstance(error, KernelCallFailed):
                raise
            raise KernelCallFailed("writing", f"{path!r} in {self._path}", number) from error


def _remove(name: str, parent: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)


def _set_attributes(where: int | str, change: Change) -> None:
    """In the order in which one does not undo the other: chown(2) clears setuid and capabilities."""
    os.chown(where, change.uid, change.gid)
    os.chmod(where, change.mode)
    _set_xattrs(where, change, follow=True)
    os.utime(where, ns=(change.mtime_ns, change.mtime_ns))


def _set_xattrs(where: int | str, change: Change, *, follow: bool) -> None:
    """Exactly those of the change: a new entry may have inherited an ACL, an old one may have more."""
    wanted = dict(change.xattrs)
    for name in _listed(where, follow):
        if is_carried(name) and name not in wanted:
            os.removexattr(where, name, follow_symlinks=follow)
    for name, value in wanted.items():
        os.setxattr(where, name, value, follow_symlinks=follow)


def _listed(where: int | str, follow: bool) -> list[str]:
    try:
        return os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
