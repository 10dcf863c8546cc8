"""Open a file below a directory as if that were the root: openat2(2) with RESOLVE_IN_ROOT."""

from __future__ import annotations

import ctypes
import os
import stat

from runtime.errors import KernelCallFailed

# linux/openat2.h; the number is the same on every architecture since 5.6.
SYS_OPENAT2 = 437
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_regular_in_root(root: int, path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the regular file ``path`` below the directory ``root``; links stay inside it. It is for reading
    where no ``flags`` are given.

    Raises FileNotFoundError when there is none, or something else than a regular file: devices and pipes are not even
    opened. Raises KernelCallFailed for other errors.
    """
    how = _OpenHow(os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    name = ctypes.c_char_p(os.fsencode(path))
    descriptor = int(_libc.syscall(SYS_OPENAT2, root, name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))))
    if descriptor < 0:
        number = ctypes.get_errno()
        error = OSError(number, os.strerror(number), path)
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise FileNotFoundError(number, os.strerror(number), path)
        raise KernelCallFailed("openat2", path, number)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(2, "no regular file", path)
        return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC)
    finally:
        os.close(descriptor)
