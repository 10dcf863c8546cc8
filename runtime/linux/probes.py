"""Does this kernel have it? One probe for each feature: the thing itself is tried, no version is compared."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

from runtime.linux import calls

T = TypeVar("T")

# linux/userfaultfd.h
UFFD_USER_MODE_ONLY = 1
UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F  # _IOWR(0xAA, 0x3F, struct uffdio_api), 24 bytes
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_WP_ASYNC = 1 << 15
# linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), 96 bytes
PAGEMAP_SCAN = 0xC0606610
PM_SCAN_ARG_BYTES = 96
PAGE_IS_PRESENT = 1 << 3
# adjtimex(2)
TIME_ERROR = 5
TIMEX_BYTES = 208

_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def has_async_write_protect() -> bool:
    """userfaultfd with write-protection that the kernel resolves by itself: the tracker of dirty pages."""
    number = _USERFAULTFD.get(platform.machine())
    if number is None:
        return False
    descriptor = int(_libc.syscall(number, os.O_CLOEXEC | UFFD_USER_MODE_ONLY))
    if descriptor < 0:
        return False
    try:
        wanted = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED
        fcntl.ioctl(descriptor, UFFDIO_API, bytearray(struct.pack("QQQ", UFFD_API, wanted, 0)))
        return True
    except OSError:
        # EINVAL: the kernel has userfaultfd, and not these features.
        return False
    finally:
        os.close(descriptor)


def has_pagemap_scan() -> bool:
    """ioctl PAGEMAP_SCAN: Linux 6.7 and backports; ENOTTY means it is not here."""
    page = mmap.PAGESIZE
    with mmap.mmap(-1, page) as memory, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        memory[0] = 1
        view = (ctypes.c_char * page).from_buffer(memory)
        start = ctypes.addressof(view)
        del view
        # size, flags, start, end, walk_end, vec, vec_len, max_pages, category_{inverted,mask,anyof_mask}, return_mask
        argument = struct.pack("12Q", PM_SCAN_ARG_BYTES, 0, start, start + page, 0, 0, 0, 0, 0, 0, PAGE_IS_PRESENT, 0)
        try:
            fcntl.ioctl(pagemap, PAGEMAP_SCAN, bytearray(argument))
        except OSError as error:
            return error.errno not in (errno.ENOTTY, errno.EINVAL)
        return True


def clock_is_synchronised() -> bool:
    """Whether something (NTP, PTP, the hypervisor) disciplines this machine's clock: adjtimex(2) without changes."""
    buffer = ctypes.create_string_buffer(TIMEX_BYTES + 64)
    return int(_libc.adjtimex(buffer)) != TIME_ERROR


def in_fresh_namespaces(flags: int, action: Callable[[], T]) -> T:
    """Run ``action`` in a thread of its own with new network and/or mount namespaces, which end with it."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            calls.unshare(flags)
            if flags & calls.CLONE_NEWNS:
                calls.mount("none", "/", "", calls.MS_REC | calls.MS_PRIVATE)
            result.append(action())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="probe")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
