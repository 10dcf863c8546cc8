"""Calls about other processes that Python has no function for."""

from __future__ import annotations

import ctypes
import os
import platform

from runtime.errors import KernelCallFailed, MissingFeature

# linux/kcmp.h
KCMP_FILE = 0
KCMP_VM = 1
# linux/pidfd.h: PIDFD_THREAD, Linux 6.9
PIDFD_THREAD = os.O_EXCL
PIDFD_GETFD = 438  # the same on every machine
_KCMP = {"x86_64": 312, "aarch64": 272}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """A copy of another process's descriptor, close-on-exec. EBADF: it has no such descriptor."""
    result = int(_libc.syscall(PIDFD_GETFD, pidfd, descriptor, 0))
    if result < 0:
        raise KernelCallFailed("pidfd_getfd", f"descriptor {descriptor}", ctypes.get_errno())
    return result


def shares_memory(first_pid: int, second_pid: int) -> bool:
    """Whether two processes run in one address space, as after vfork; False when one has gone."""
    return _kcmp(first_pid, second_pid, KCMP_VM, 0, 0) == 0


def same_open_file(first_pid: int, first_fd: int, second_pid: int, second_fd: int) -> bool:
    """Whether two descriptors are copies of one; False when one of them has gone."""
    return _kcmp(first_pid, second_pid, KCMP_FILE, first_fd, second_fd) == 0


def _kcmp(first_pid: int, second_pid: int, kind: int, first: int, second: int) -> int:
    """kcmp(2): 0 is equal; -1 (gone, or a kernel without it) is taken as not equal by the callers."""
    number = _KCMP.get(platform.machine())
    if number is None:
        raise MissingFeature(f"{platform.machine()} is not supported", hint="x86-64 and aarch64 are")
    return int(_libc.syscall(number, first_pid, second_pid, kind, ctypes.c_ulong(first), ctypes.c_ulong(second)))
