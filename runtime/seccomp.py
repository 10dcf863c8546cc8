"""What a container's processes may ask of the kernel: capabilities, and a seccomp filter as a BPF program.

The filter refuses by name what reaches outside a container or cannot be checkpointed, and lets the rest through, so
that a new libc on a new kernel is not broken by an old list. Refused with EPERM, as docker's default profile does;
io_uring and clone3 with ENOSYS, because programs then fall back to what CRIU can dump and the filter can look into.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable

from runtime.errors import BadInput, MissingFeature
from runtime.linux import calls

# linux/capability.h, in order of their numbers.
_NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
    "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP "
    "MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)
CAPABILITIES = tuple(_NAMES.split())
# docker's default set.
_DEFAULT = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL "
    "AUDIT_WRITE"
)
DEFAULT_CAPABILITIES = frozenset(_DEFAULT.split())

# System call numbers by machine; those from 424 on are the same everywhere (asm-generic/unistd.h).
_X86_64 = {
    "acct": 163, "add_key": 248, "bpf": 321, "clock_adjtime": 305, "clock_settime": 227, "delete_module": 176,
    "finit_module": 313, "init_module": 175, "ioperm": 173, "iopl": 172, "kexec_file_load": 320, "kexec_load": 246,
    "keyctl": 250, "lookup_dcookie": 212, "mount": 165, "nfsservctl": 180, "open_by_handle_at": 304,
    "perf_event_open": 298, "pivot_root": 155, "quotactl": 179, "reboot": 169, "request_key": 249,
    "setdomainname": 171, "sethostname": 170, "setns": 308, "settimeofday": 164, "swapoff": 168, "swapon": 167,
    "umount2": 166, "unshare": 272, "uselib": 134, "userfaultfd": 323, "clone": 56,
}  # fmt: skip
_AARCH64 = {
    "acct": 89, "add_key": 217, "bpf": 280, "clock_adjtime": 266, "clock_settime": 112, "delete_module": 106,
    "finit_module": 273, "init_module": 105, "kexec_file_load": 294, "kexec_load": 104, "keyctl": 219,
    "lookup_dcookie": 18, "mount": 40, "nfsservctl": 42, "open_by_handle_at": 265, "perf_event_open": 241,
    "pivot_root": 41, "quotactl": 60, "reboot": 142, "request_key": 218, "setdomainname": 162, "sethostname": 161,
    "setns": 268, "settimeofday": 170, "swapoff": 225, "swapon": 224, "umount2": 39, "unshare": 97,
    "userfaultfd": 282, "clone": 220,
}  # fmt: skip
_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "clone3": 435, "mount_setattr": 442,
    "quotactl_fd": 443,
}  # fmt: skip
_NOT_THERE = ("io_uring_setup", "io_uring_enter", "io_uring_register", "clone3")
# What CAP_SYS_ADMIN opens inside a container, as docker has it.
_OPENED_BY_SYS_ADMIN = (
    "mount", "umount2", "pivot_root", "setns", "unshare", "sethostname", "setdomainname", "fsopen", "fsconfig",
    "fsmount", "fspick", "move_mount", "open_tree", "mount_setattr", "quotactl", "quotactl_fd", "bpf",
    "perf_event_open", "clone3",
)  # fmt: skip
_NAMESPACE_FLAGS = (
    calls.CLONE_NEWNS
    | calls.CLONE_NEWCGROUP
    | calls.CLONE_NEWUTS
    | calls.CLONE_NEWIPC
    | calls.CLONE_NEWUSER
    | calls.CLONE_NEWPID
    | calls.CLONE_NEWNET
)
# linux/audit.h
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
# linux/seccomp.h
_RET_KILL_PROCESS, _RET_ERRNO, _RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
# linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, JMP|JSET|K, RET|K
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data: nr, arch, args[0] (its low half; both machines are little endian).
_NR, _ARCH, _ARG0 = 0, 4, 16


def capability_set(add: Iterable[str], drop: Iterable[str]) -> frozenset[int]:
    """Numbers of docker's default set with ``add`` and without ``drop``; names with or without CAP_, or ALL."""
    names = set(DEFAULT_CAPABILITIES)
    for name in map(_capability_name, drop):
        names -= set(CAPABILITIES) if name == "ALL" else {name}
    for name in map(_capability_name, add):
        names |= set(CAPABILITIES) if name == "ALL" else {name}
    return frozenset(CAPABILITIES.index(name) for name in names)


def _capability_name(text: str) -> str:
    name = text.upper().removeprefix("CAP_")
    if name != "ALL" and name not in CAPABILITIES:
        raise BadInput(f"no capability {text!r}", hint="names as in capabilities(7), or ALL")
    return name


def default_profile(cap_add: frozenset[str] = frozenset()) -> bytes:
    """The filter as an array of struct sock_filter. Raises MissingFeature on other machines than x86-64 and aarch64."""
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise MissingFeature(f"no seccomp profile for {machine}", hint="--security-opt seccomp=unconfined")
    numbers = (_X86_64 if machine == "x86_64" else _AARCH64) | _EVERYWHERE
    added = {_capability_name(name) for name in cap_add}
    opened = set(_OPENED_BY_SYS_ADMIN) if added & {"SYS_ADMIN", "ALL"} else set()
    program = [_op(_LOAD, _ARCH), _op(_JEQ, _AUDIT_ARCH[machine], 1, 0), _op(_RET, _RET_KILL_PROCESS), _op(_LOAD, _NR)]
    if machine == "x86_64":
        program += [_op(_JGE, _X32_BIT, 0, 1), _op(_RET, _RET_ERRNO | errno.ENOSYS)]
    for name in sorted(numbers.keys() - opened - {"clone"}):
        answer = errno.ENOSYS if name in _NOT_THERE else errno.EPERM
        program += [_op(_JEQ, numbers[name], 0, 1), _op(_RET, _RET_ERRNO | answer)]
    if "unshare" not in opened:
        program += [
            _op(_JEQ, numbers["clone"], 0, 3),
            _op(_LOAD, _ARG0),
            _op(_JSET, _NAMESPACE_FLAGS, 0, 1),
            _op(_RET, _RET_ERRNO | errno.EPERM),
        ]
    program.append(_op(_RET, _RET_ALLOW))
    return b"".join(program)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
