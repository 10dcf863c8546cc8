"""Answering page faults by userfaultfd: ioctl_userfaultfd(2) of the side that fills memory, and its events.

Stdlib only: the pager, a program of its own, imports it. (userfaultfd.py is the side that watches writes.)
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from errno import EAGAIN, EEXIST, EINTR, ENOENT, ESRCH

from runtime.errors import KernelCallFailed

PAGE_BYTES = 4096

# linux/userfaultfd.h
UFFD_API = 0xAA
UFFD_EVENT_PAGEFAULT = 0x12
UFFD_EVENT_FORK = 0x13
UFFD_EVENT_REMAP = 0x14
UFFD_EVENT_REMOVE = 0x15
UFFD_EVENT_UNMAP = 0x16
# struct uffd_msg: u8 event, 7 reserved bytes, then a union of 24 bytes
_MESSAGE = struct.Struct("=B7xQQQ")
_MESSAGES_PER_READ = 64
# sys/mman.h
_MCL_CURRENT = 1
_MCL_FUTURE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


class _Copy(ctypes.Structure):
    """struct uffdio_copy"""

    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),
    )


class _ZeroPage(ctypes.Structure):
    """struct uffdio_zeropage"""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("zeropage", ctypes.c_int64),
    )


class _Range(ctypes.Structure):
    """struct uffdio_range"""

    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


def _request(direction: int, number: int, size: int) -> int:
    """_IOR (2) or _IOWR (3) of asm-generic/ioctl.h for the type UFFDIO."""
    return direction << 30 | size << 16 | UFFD_API << 8 | number


UFFDIO_WAKE = _request(2, 0x02, ctypes.sizeof(_Range))
UFFDIO_COPY = _request(3, 0x03, ctypes.sizeof(_Copy))
UFFDIO_ZEROPAGE = _request(3, 0x04, ctypes.sizeof(_ZeroPage))


@dataclass(frozen=True, slots=True)
class FaultMessage:
    """One struct uffd_msg. The numbers mean, by ``event``:

    PAGEFAULT flags, address     FORK new descriptor     REMAP from, to, length     REMOVE, UNMAP start, end
    """

    event: int
    first: int
    second: int
    third: int


class TryAgain(Exception):
    """The memory is about to change; an event that says how waits to be read first."""


class NotRegistered(Exception):
    """There is no such memory, or it is not for this descriptor."""


class ProcessGone(Exception):
    """The address space behind the descriptor is no more."""


def read_messages(descriptor: int) -> list[FaultMessage]:
    """What waits now, page faults before other events; empty when nothing does. The descriptor must not block.

    A FORK message's descriptor is open in this process from now on.
    """
    try:
        data = os.read(descriptor, _MESSAGE.size * _MESSAGES_PER_READ)
    except BlockingIOError:
        return []
    except OSError as error:
        raise KernelCallFailed("read", "userfaultfd", error.errno or 0) from error
    return [FaultMessage(*numbers) for numbers in _MESSAGE.iter_unpack(data)]


def copy(descriptor: int, address: int, source: int, length_bytes: int) -> int:
    """UFFDIO_COPY from our memory at ``source``, waking who waits: the bytes done, which may be fewer; 0: the first
    page exists already. Raises TryAgain, NotRegistered, ProcessGone, or KernelCallFailed (ENOMEM: its limit)."""
    argument = _Copy(address, source, length_bytes, 0, 0)
    if _libc.ioctl(descriptor, UFFDIO_COPY, ctypes.byref(argument)) == 0:
        return length_bytes
    return _progress("UFFDIO_COPY", address, int(argument.copy), ctypes.get_errno())


def zero(descriptor: int, address: int, length_bytes: int) -> int:
    """UFFDIO_ZEROPAGE; as ``copy``."""
    argument = _ZeroPage(address, length_bytes, 0, 0)
    if _libc.ioctl(descriptor, UFFDIO_ZEROPAGE, ctypes.byref(argument)) == 0:
        return length_bytes
    return _progress("UFFDIO_ZEROPAGE", address, int(argument.zeropage), ctypes.get_errno())


def _progress(call: str, address: int, done: int, errno: int) -> int:
    # Part of it was done: the kernel says EAGAIN, and the count is how much.
    if done > 0:
        return done
    if errno == EEXIST:
        return 0
    if errno in (EAGAIN, EINTR):
        raise TryAgain
    if errno == ENOENT:
        raise NotRegistered
    if errno == ESRCH:
        raise ProcessGone
    raise KernelCallFailed(call, f"{address:#x}", errno)


def wake(descriptor: int, address: int, length_bytes: int) -> None:
    """UFFDIO_WAKE: who waits for a page in the range looks again."""
    argument = _Range(address, length_bytes)
    if _libc.ioctl(descriptor, UFFDIO_WAKE, ctypes.byref(argument)) < 0:
        raise KernelCallFailed("UFFDIO_WAKE", f"{address:#x}", ctypes.get_errno())


def lock_memory() -> None:
    """mlockall(2) of what is mapped and what will be: nothing of this process is ever swapped out."""
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) < 0:
        raise KernelCallFailed("mlockall", "this process", ctypes.get_errno())
