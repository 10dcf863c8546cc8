"""ioctl_userfaultfd(2): write-protection that the kernel itself resolves and only remembers (WP_ASYNC, Linux 6.7).

The descriptor is another process's: it was made there (runtime/memory/remote.py) and brought over. All of these
work on it from outside, and closing it undoes every one of them.
"""

from __future__ import annotations

import fcntl
import struct

from runtime.errors import KernelCallFailed

# linux/userfaultfd.h
UFFD_USER_MODE_ONLY = 1
UFFD_API = 0xAA
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_WP_ASYNC = 1 << 15
UFFDIO_REGISTER_MODE_WP = 1 << 1

_UFFDIO = struct.Struct("QQQ")  # struct uffdio_api, and struct uffdio_writeprotect
_REGISTER = struct.Struct("QQQQ")  # struct uffdio_register


def _iowr(number: int, size: int) -> int:
    """_IOWR(UFFDIO, number, size) of asm-generic/ioctl.h."""
    return (1 | 2) << 30 | size << 16 | UFFD_API << 8 | number


UFFDIO_REGISTER = _iowr(0x00, _REGISTER.size)
UFFDIO_WRITEPROTECT = _iowr(0x06, _UFFDIO.size)
UFFDIO_API = _iowr(0x3F, _UFFDIO.size)


def _ioctl(name: str, descriptor: int, request: int, argument: bytes, target: str) -> None:
    try:
        fcntl.ioctl(descriptor, request, bytearray(argument))
    except OSError as error:
        raise KernelCallFailed(name, target, error.errno or 0) from error


def enable(descriptor: int) -> None:
    """First call on a fresh descriptor. EINVAL: this kernel has no WP_ASYNC."""
    features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED
    _ioctl("UFFDIO_API", descriptor, UFFDIO_API, _UFFDIO.pack(UFFD_API, features, 0), "userfaultfd")


def register(descriptor: int, start: int, end: int) -> None:
    """Watch every mapping in the range for writes; no page is protected yet. Registered ones may be registered again.

    EINVAL: a mapping in the range can not be watched. EBUSY: another userfaultfd watches it. ENOMEM: the process has
    gone or runs another program, or nothing is mapped there.
    """
    argument = _REGISTER.pack(start, end - start, UFFDIO_REGISTER_MODE_WP, 0)
    _ioctl("UFFDIO_REGISTER", descriptor, UFFDIO_REGISTER, argument, f"{start:x}-{end:x}")


def unprotect(descriptor: int, start: int, end: int) -> None:
    """Forget the protection of all pages in a registered range: to the tracker all of them are written again."""
    argument = _UFFDIO.pack(start, end - start, 0)
    _ioctl("UFFDIO_WRITEPROTECT", descriptor, UFFDIO_WRITEPROTECT, argument, f"{start:x}-{end:x}")
