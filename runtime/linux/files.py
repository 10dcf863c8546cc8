"""Kernel calls on files that Python has no function for. Each raises KernelCallFailed naming call and object."""

from __future__ import annotations

import ctypes
import os
from errno import EINTR, ENOSYS

from runtime.errors import KernelCallFailed, MissingFeature

# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
# linux/fs.h
SYNC_FILE_RANGE_WAIT_BEFORE = 1
SYNC_FILE_RANGE_WRITE = 2
SYNC_FILE_RANGE_WAIT_AFTER = 4
# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
# asm-generic/unistd.h; x86-64 has the same number, as every architecture does for calls this new.
_NR_OPENAT2 = 437

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syncfs.argtypes = (ctypes.c_int,)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(directory: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2), close-on-exec always. Raises MissingFeature before Linux 5.6."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    while True:
        result = _libc.syscall(
            ctypes.c_long(_NR_OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if result >= 0:
            return int(result)
        errno = ctypes.get_errno()
        if errno == ENOSYS:
            raise MissingFeature("this kernel has no openat2", hint="Linux 5.6 or later is needed")
        if errno != EINTR:
            raise KernelCallFailed("openat2", repr(path), errno)


def open_beneath(directory: int, path: str, flags: int) -> int:
    """Open ``path`` below ``directory`` ("" is the directory itself), through no symlink and into no other mount.

    Raises KernelCallFailed: ELOOP for a symlink anywhere on the way, EXDEV for a way out of the tree.
    """
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
    return openat2(directory, path or ".", flags | os.O_NOFOLLOW, resolve)


def open_in_root(root: int, path: str, flags: int) -> int:
    """Open ``path`` as a process whose root directory is ``root`` would: absolute symlinks and ``..`` stay inside.

    The way to look at a path of a container: ``/proc/PID/root/path`` follows the container's symlinks on the host.
    """
    return openat2(root, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def write_back(fd: int) -> None:
    """sync_file_range(2) over the whole file: its dirty pages are on their way and done when this returns.

    Not durable (no metadata, no disk cache flush). What it is for: pages that were written back are write-protected
    again, so that the next store through a shared mapping faults and changes mtime and ctime.
    """
    flags = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
    if _libc.sync_file_range(fd, 0, 0, flags) < 0:
        raise KernelCallFailed("sync_file_range", f"fd {fd}", ctypes.get_errno())


def start_write_back(fd: int) -> None:
    """sync_file_range(2) that only queues the dirty pages of a file for writing: many files are written at once."""
    if _libc.sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE) < 0:
        raise KernelCallFailed("sync_file_range", f"fd {fd}", ctypes.get_errno())


def sync_file_system(fd: int) -> None:
    """syncfs(2): everything written to the file system that ``fd`` is on survives a power cut when this returns."""
    if _libc.syncfs(fd) < 0:
        raise KernelCallFailed("syncfs", f"fd {fd}", ctypes.get_errno())


def punch_hole(fd: int, offset: int, length_bytes: int) -> None:
    """fallocate(2) PUNCH_HOLE: the range reads as zeros and takes no room. EOPNOTSUPP where it is not known."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length_bytes) < 0:
        raise KernelCallFailed("fallocate", f"fd {fd}", ctypes.get_errno())
