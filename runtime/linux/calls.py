"""One function per kernel call that Python has no function for. Each raises KernelCallFailed naming call and object.

Only stdlib and ctypes: the stand-alone programs of runtime/sandbox import this before anything else exists.
Numbers are those of the kernel's headers, named as there; system call numbers are for x86-64 and aarch64.
"""

from __future__ import annotations

import ctypes
import os
import platform

from runtime.errors import KernelCallFailed, MissingFeature

# linux/sched.h
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
# linux/mount.h
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
# MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
MOUNT_ATTR_NO_PROGRAMS = 0x2 | 0x4 | 0x8
# linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
PR_SET_NO_NEW_PRIVS = 38
# linux/capability.h, version 3: two 32-bit halves
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
# linux/mount.h, enum fsconfig_command
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_FD_CLOEXEC_FLAG = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
# asm-generic/unistd.h: the same on every machine.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
# linux/seccomp.h
SECCOMP_SET_MODE_FILTER = 1

_NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "seccomp": 317},
    "aarch64": {"pivot_root": 41, "capset": 91, "seccomp": 277},
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.syscall.restype = ctypes.c_long


def _number(name: str) -> int:
    machine = platform.machine()
    try:
        return _NUMBERS[machine][name]
    except KeyError:
        raise MissingFeature(f"{machine} is not supported", hint="x86-64 and aarch64 are") from None


def _check(result: int, call: str, target: object) -> None:
    if result < 0:
        raise KernelCallFailed(call, str(target), ctypes.get_errno())


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); empty ``fstype`` and ``data`` mean NULL."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), fstype.encode() or None, flags, os.fsencode(data) or None
    )
    _check(result, "mount", f"{fstype or 'bind'} {source} on {target}")


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), "umount", target)


def unshare(flags: int) -> None:
    """unshare(2). For a user or mount namespace the caller must have one thread only."""
    _check(_libc.unshare(flags), "unshare", hex(flags))


def setns(fd: int, kind: int = 0) -> None:
    """setns(2) into the namespace behind ``fd``; ``kind`` 0 accepts any."""
    _check(_libc.setns(fd, kind), "setns", hex(kind))


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    result = _libc.syscall(_number("pivot_root"), ctypes.c_char_p(os.fsencode(new)), ctypes.c_char_p(os.fsencode(old)))
    _check(result, "pivot_root", new)


def prctl(option: int, value: int = 0, second: int = 0) -> None:
    """prctl(2) with up to two plain numbers."""
    _check(_libc.prctl(option, value, second, 0, 0), "prctl", option)


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapHalf(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2) of the calling thread; each argument is a bit mask over capability numbers."""
    header = _CapHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    halves = (_CapHalf * 2)()
    for index, half in enumerate(halves):
        half.effective = effective >> (32 * index) & 0xFFFFFFFF
        half.permitted = permitted >> (32 * index) & 0xFFFFFFFF
        half.inheritable = inheritable >> (32 * index) & 0xFFFFFFFF
    _check(_libc.syscall(_number("capset"), ctypes.byref(header), halves), "capset", hex(permitted))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install_seccomp_filter(program: bytes) -> None:
    """seccomp(2) SET_MODE_FILTER with an array of struct sock_filter (8 bytes each)."""
    fprog = _SockFprog(len(program) // 8, program)
    result = _libc.syscall(_number("seccomp"), SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(fprog))
    _check(result, "seccomp", f"filter of {len(program) // 8} instructions")


def detached_tmpfs(size: str = "100%") -> int:
    """A descriptor of a new tmpfs that is mounted nowhere: it goes with its last descriptor, whoever dies.

    fsopen(2), fsconfig(2), fsmount(2), Linux 5.2. ``size`` as tmpfs takes it; memory is used as files grow.
    """
    context = _libc.syscall(_FSOPEN, ctypes.c_char_p(b"tmpfs"), _FD_CLOEXEC_FLAG)
    _check(context, "fsopen", "tmpfs")
    try:
        for key, value in ((b"size", size.encode()), (b"mode", b"0700")):
            done = _libc.syscall(
                _FSCONFIG, context, _FSCONFIG_SET_STRING, ctypes.c_char_p(key), ctypes.c_char_p(value), 0
            )
            _check(done, "fsconfig", f"tmpfs {key.decode()}={value.decode()}")
        _check(_libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig", "tmpfs")
        mounted: int = _libc.syscall(_FSMOUNT, context, _FD_CLOEXEC_FLAG, MOUNT_ATTR_NO_PROGRAMS)
        _check(mounted, "fsmount", "tmpfs")
        return mounted
    finally:
        os.close(context)
