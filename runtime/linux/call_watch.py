"""Whether any task of a group has made a system call that can change its mappings, counted by the kernel itself.

A counter of the tracepoint raw_syscalls:sys_enter for each thread, with a filter of call numbers; threads that are
started later are counted with the one that started them. For moments only: while one exists, each system call of the
host takes the kernel's slower way.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

from runtime.errors import MissingFeature

# linux/perf_event.h
_PERF_TYPE_TRACEPOINT = 2
_PERF_FLAG_FD_CLOEXEC = 8
_INHERIT = 1 << 1
# The size of struct perf_event_attr as it was first, which every kernel takes.
_ATTR = struct.Struct("=IIQQQQQIIQ")
_IOC_SET_FILTER = 0x40082406
_TRACE_ROOTS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
# A descriptor each.
MOST_THREADS = 256
_LISTINGS = 10

# asm/unistd.h and asm-generic/unistd.h
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
# In this order: mmap, mprotect, munmap, brk, mremap, madvise, shmat, shmdt, prctl, remap_file_pages, mlock, munlock,
# mlockall, munlockall, execve, io_setup, and on x86-64 arch_prctl (shadow stacks).
_CHANGING_CALLS = {
    "x86_64": (9, 10, 11, 12, 25, 28, 30, 67, 157, 216, 149, 150, 151, 152, 59, 206, 158),
    "aarch64": (222, 226, 215, 214, 216, 233, 196, 197, 167, 234, 228, 229, 230, 231, 221, 0),
}
# execveat, mlock2 and pkey_mprotect differ as well; the rest are the same everywhere: io_uring_enter (which can
# madvise), process_madvise, map_shadow_stack, mseal.
_NEWER_CALLS = {"x86_64": (322, 325, 329), "aarch64": (281, 284, 288)}
_COMMON_CALLS = (426, 440, 453, 462)
# x86-64: numbers of x32, which mean the same calls.
_OTHER_NUMBERS = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class CallWatch:
    """``threads`` gives the thread ids to watch. Raises MissingFeature where the kernel can not count, or where there
    are too many; a thread that ends meanwhile is no error."""

    def __init__(self, threads: Callable[[], Collection[int]]) -> None:
        self._fds: list[int] = []
        attributes = _attributes()
        calls = _filter()
        seen: set[int] = set()
        try:
            # What is started by a thread that is watched already needs no watching; whatever else comes is seen next.
            for _ in range(_LISTINGS):
                fresh = set(threads()) - seen
                if not fresh:
                    return
                seen |= fresh
                if len(seen) > MOST_THREADS:
                    raise MissingFeature(f"more than {MOST_THREADS} threads can not be watched")
                for thread in fresh:
                    self._watch(thread, attributes, calls)
            raise MissingFeature("new threads come faster than they can be watched")
        except BaseException:
            self.close()
            raise

    def _watch(self, thread: int, attributes: bytes, calls: bytes) -> None:
        number = _PERF_EVENT_OPEN[platform.machine()]
        fd = int(_libc.syscall(number, attributes, thread, -1, -1, _PERF_FLAG_FD_CLOEXEC))
        if fd < 0:
            error = ctypes.get_errno()
            if error == errno.ESRCH:
                return  # it has ended
            raise MissingFeature(f"system calls can not be counted: {os.strerror(error)}")
        self._fds.append(fd)
        try:
            fcntl.ioctl(fd, _IOC_SET_FILTER, calls)
        except OSError as failed:
            raise MissingFeature(f"system calls can not be counted by number: {failed.strerror}") from None

    def calls(self) -> int:
        """How many there were so far; exact while all threads stand still."""
        return sum(struct.unpack("=Q", os.read(fd, 8))[0] for fd in self._fds)

    def close(self) -> None:
        """Idempotent. Waits for the kernel's readers: not for a blackout."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _attributes() -> bytes:
    """struct perf_event_attr: count the tracepoint, in children too."""
    for root in _TRACE_ROOTS:
        with contextlib.suppress(OSError):
            number = int((root / "events/raw_syscalls/sys_enter/id").read_text())
            return _ATTR.pack(_PERF_TYPE_TRACEPOINT, _ATTR.size, number, 0, 0, 0, _INHERIT, 0, 0, 0)
    raise MissingFeature("system calls can not be counted", hint="mount -t tracefs none /sys/kernel/tracing")


def _filter() -> bytes:
    machine = platform.machine()
    if machine not in _PERF_EVENT_OPEN:
        raise MissingFeature(f"system calls can not be counted on {machine}", hint="on x86-64 and aarch64 they can")
    numbers = (*_CHANGING_CALLS[machine], *_NEWER_CALLS[machine], *_COMMON_CALLS)
    text = " || ".join(f"id == {number}" for number in numbers)
    # As x32 on x86-64; on aarch64 there are no such numbers.
    return f"{text} || id >= {_OTHER_NUMBERS}".encode() + b"\0"
