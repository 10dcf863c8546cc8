"""What a container's processes may ask of the kernel: capabilities, and a seccomp filter as a BPF program.

The filter admits what docker's default profile admits: the system calls known here, up to ``LAST_KNOWN``, without those
that reach outside a container; some of these are opened by a capability. What is refused fails with EPERM. Newer calls
fail with ENOSYS, as do those of which CRIU cannot dump the traces (io_uring, secret memory), and clone3, whose flags a
filter cannot see: programs then do without. All known numbers but a few is the same set as a list of the many, and a
kernel that learns a new call does not open it.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable, Mapping

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
ALL = "ALL"

# removexattrat, of Linux 6.13.
LAST_KNOWN = 466
# Refused system calls by machine: asm/unistd_64.h, and asm-generic/unistd.h for aarch64.
_X86_64 = {
    "acct": 163, "add_key": 248, "bpf": 321, "clock_settime": 227, "delete_module": 176, "fanotify_init": 300,
    "finit_module": 313, "get_mempolicy": 239, "init_module": 175, "ioperm": 173, "iopl": 172, "kcmp": 312,
    "kexec_file_load": 320, "kexec_load": 246, "keyctl": 250, "lookup_dcookie": 212, "mbind": 237,
    "migrate_pages": 256, "mount": 165, "move_pages": 279, "nfsservctl": 180, "open_by_handle_at": 304,
    "perf_event_open": 298, "pivot_root": 155, "quotactl": 179, "reboot": 169, "request_key": 249,
    "set_mempolicy": 238, "setdomainname": 171, "sethostname": 170, "setns": 308, "settimeofday": 164, "swapoff": 168,
    "swapon": 167, "sysfs": 139, "syslog": 103, "umount2": 166, "unshare": 272, "uselib": 134, "userfaultfd": 323,
    "ustat": 136, "vhangup": 153,
}  # fmt: skip
_AARCH64 = {
    "acct": 89, "add_key": 217, "bpf": 280, "clock_settime": 112, "delete_module": 106, "fanotify_init": 262,
    "finit_module": 273, "get_mempolicy": 236, "init_module": 105, "kcmp": 272, "kexec_file_load": 294,
    "kexec_load": 104, "keyctl": 219, "lookup_dcookie": 18, "mbind": 235, "migrate_pages": 238, "mount": 40,
    "move_pages": 239, "nfsservctl": 42, "open_by_handle_at": 265, "perf_event_open": 241, "pivot_root": 41,
    "quotactl": 60, "reboot": 142, "request_key": 218, "set_mempolicy": 237, "setdomainname": 162, "sethostname": 161,
    "setns": 268, "settimeofday": 170, "swapoff": 225, "swapon": 224, "syslog": 116, "umount2": 39, "unshare": 97,
    "userfaultfd": 282, "vhangup": 58,
}  # fmt: skip
_EVERYWHERE = {
    "clone3": 435, "fsconfig": 431, "fsmount": 432, "fsopen": 430, "fspick": 433, "io_uring_enter": 426,
    "io_uring_register": 427, "io_uring_setup": 425, "memfd_secret": 447, "mount_setattr": 442, "move_mount": 429,
    "open_tree": 428, "pidfd_getfd": 438, "process_madvise": 440, "quotactl_fd": 443, "set_mempolicy_home_node": 450,
}  # fmt: skip
_NOT_THERE = ("clone3", "io_uring_enter", "io_uring_register", "io_uring_setup", "memfd_secret")
# Calls of which an argument decides.
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_PERSONALITY = {"x86_64": 135, "aarch64": 92}
REFUSED = {"x86_64": _X86_64 | _EVERYWHERE, "aarch64": _AARCH64 | _EVERYWHERE}

# What a capability opens, as docker has it. None of them is of use without it.
OPENED_BY: Mapping[str, tuple[str, ...]] = {
    "BPF": ("bpf",),
    "DAC_READ_SEARCH": ("open_by_handle_at",),
    "PERFMON": ("perf_event_open",),
    "SYSLOG": ("syslog",),
    "SYS_ADMIN": (
        "bpf", "clone3", "fanotify_init", "fsconfig", "fsmount", "fsopen", "fspick", "lookup_dcookie", "mount",
        "mount_setattr", "move_mount", "open_tree", "perf_event_open", "pivot_root", "quotactl", "quotactl_fd",
        "setdomainname", "sethostname", "setns", "syslog", "umount2", "unshare",
    ),
    "SYS_BOOT": ("reboot",),
    "SYS_MODULE": ("delete_module", "finit_module", "init_module"),
    "SYS_NICE": ("get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"),
    "SYS_PACCT": ("acct",),
    "SYS_PTRACE": ("kcmp", "pidfd_getfd", "process_madvise"),
    "SYS_RAWIO": ("ioperm", "iopl"),
    "SYS_TIME": ("clock_settime", "settimeofday"),
    "SYS_TTY_CONFIG": ("vhangup",),
}  # fmt: skip

_NAMESPACE_FLAGS = (
    calls.CLONE_NEWNS
    | calls.CLONE_NEWCGROUP
    | calls.CLONE_NEWUTS
    | calls.CLONE_NEWIPC
    | calls.CLONE_NEWUSER
    | calls.CLONE_NEWPID
    | calls.CLONE_NEWNET
)
# Sockets that belong to no network namespace or cannot be dumped (linux/socket.h: AF_ALG, AF_VSOCK).
REFUSED_FAMILIES = (38, 40)
# PER_LINUX, PER_LINUX32, both with UNAME26, and the question (linux/personality.h).
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)

# linux/audit.h
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
# linux/seccomp.h
_RET_KILL_PROCESS, _RET_ERRNO, _RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_REFUSE, _ABSENT = _RET_ERRNO | errno.EPERM, _RET_ERRNO | errno.ENOSYS
# linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, JMP|JSET|K, RET|K
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data: nr, arch, args[0] (its low half; both machines are little endian).
_NR, _ARCH, _ARG0 = 0, 4, 16


def capability_set(add: Iterable[str], drop: Iterable[str]) -> frozenset[int]:
    """Numbers of docker's default set without ``drop`` and with ``add``; names with or without CAP_, or ALL.

    As in docker: ALL added is all without those dropped, ALL dropped is none but those added, and of a name in both
    the addition counts. Raises BadInput for what is no capability.
    """
    added, dropped = {_capability_name(name) for name in add}, {_capability_name(name) for name in drop}
    base = set(CAPABILITIES) if ALL in added else set(DEFAULT_CAPABILITIES)
    if ALL in dropped:
        base = set()
    names = (base - dropped) | (added - {ALL})
    return frozenset(CAPABILITIES.index(name) for name in names)


def _capability_name(text: str) -> str:
    name = text.upper().removeprefix("CAP_")
    if name != ALL and name not in CAPABILITIES:
        raise BadInput(f"no capability {text!r}", hint="names as in capabilities(7), or ALL")
    return name


def default_profile(cap_add: frozenset[str] = frozenset(), *, machine: str = "") -> bytes:
    """The filter as an array of struct sock_filter, for ``machine`` or this one.

    Raises MissingFeature on other machines than x86-64 and aarch64, BadInput for what is no capability.
    """
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        raise MissingFeature(f"no seccomp profile for {machine}", hint="--security-opt seccomp=unconfined")
    added = {_capability_name(name) for name in cap_add}
    opened = {call for name, opens in OPENED_BY.items() if added & {name, ALL} for call in opens}
    refused = {name: number for name, number in REFUSED[machine].items() if name not in opened}
    program = [_op(_LOAD, _ARCH), _op(_JEQ, _AUDIT_ARCH[machine], 1, 0), _op(_RET, _RET_KILL_PROCESS), _op(_LOAD, _NR)]
    # Numbers with the bit of x32 are among those that are too high.
    program += [_op(_JGE, LAST_KNOWN + 1, 0, 1), _op(_RET, _ABSENT)]
    # Only calls that need it get to look at an argument: the kernel remembers the answer for all others.
    program += _by_argument(_SOCKET[machine], _JEQ, REFUSED_FAMILIES, if_matching=_REFUSE, otherwise=_RET_ALLOW)
    program += _by_argument(_PERSONALITY[machine], _JEQ, PERSONALITIES, if_matching=_RET_ALLOW, otherwise=_REFUSE)
    if "unshare" in refused:
        program += _by_argument(_CLONE[machine], _JSET, (_NAMESPACE_FLAGS,), if_matching=_REFUSE, otherwise=_RET_ALLOW)
    absent = [number for name, number in refused.items() if name in _NOT_THERE]
    program += _all_of(absent, _ABSENT)
    program += _all_of([number for number in refused.values() if number not in absent], _REFUSE)
    program.append(_op(_RET, _RET_ALLOW))
    return b"".join(program)


def _by_argument(number: int, test: int, values: Iterable[int], *, if_matching: int, otherwise: int) -> list[bytes]:
    """For one system call: an answer where its first argument matches one of ``values``, another where none does."""
    tests = list(values)
    body = [_op(_LOAD, _ARG0)]
    body += [_op(test, value, len(tests) - place, 0) for place, value in enumerate(tests)]
    body += [_op(_RET, otherwise), _op(_RET, if_matching)]
    return [_op(_JEQ, number, 0, len(body)), *body]


def _all_of(numbers: Iterable[int], answer: int) -> list[bytes]:
    """One answer for all these system calls."""
    wanted = sorted(numbers)
    if not wanted:
        return []
    # The last one's "no" steps over the answer, all "yes" land on it.
    tests = [_op(_JEQ, number, len(wanted) - 1 - place, 0) for place, number in enumerate(wanted[:-1])]
    return [*tests, _op(_JEQ, wanted[-1], 0, 1), _op(_RET, answer)]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
