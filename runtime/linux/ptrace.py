"""ptrace(2), one function per request. Every call for one tracee must come from the thread that seized it.

None of these gives up the interpreter's lock: while a tracee stands still, another thread of ours must not come between
two calls that take a microsecond each. So nothing here may block: ``poll_stop`` asks and returns at once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal

from runtime.errors import KernelCallFailed

# linux/ptrace.h
PTRACE_CONT = 7
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211
PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
PTRACE_EVENT_STOP = 128
# linux/elf.h
NT_PRSTATUS = 1
# linux/wait.h
WNOHANG = 1
WALL = 0x40000000
# What a system call's entry and exit look like with PTRACE_O_TRACESYSGOOD.
SYSCALL_STOP = signal.SIGTRAP | 0x80
SIGSET_BYTES = 8

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long
_libc.waitpid.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int)


class _Iovec(ctypes.Structure):
    _fields_ = [("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t)]


class _RseqConfiguration(ctypes.Structure):
    """struct ptrace_rseq_configuration."""

    _fields_ = [
        ("rseq_abi_pointer", ctypes.c_uint64),
        ("rseq_abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class _DispatchConfiguration(ctypes.Structure):
    """struct ptrace_sud_config."""

    _fields_ = [
        ("mode", ctypes.c_uint64),
        ("selector", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
    ]


def _request(name: str, request: int, tid: int, address: int | None, data: int | None) -> int:
    result = int(_libc.ptrace(request, tid, address, data))
    if result < 0:
        raise KernelCallFailed(f"ptrace {name}", f"task {tid}", ctypes.get_errno())
    return result


def seize(tid: int, options: int) -> None:
    """Become the tracer of one thread, which goes on running. EPERM: traced already, a zombie, or not permitted."""
    _request("SEIZE", PTRACE_SEIZE, tid, 0, options)


def interrupt(tid: int) -> None:
    """Ask the thread to stop; ``poll_stop`` says when it has."""
    _request("INTERRUPT", PTRACE_INTERRUPT, tid, 0, 0)


def detach(tid: int) -> None:
    """Let go of a thread that stands still; it runs on, or stays stopped where it was stopped before."""
    _request("DETACH", PTRACE_DETACH, tid, 0, 0)


def resume(tid: int, signal_number: int = 0) -> None:
    """Run on, and deliver the signal at whose delivery the thread had stopped (0: it is swallowed)."""
    _request("CONT", PTRACE_CONT, tid, 0, signal_number)


def resume_to_syscall(tid: int) -> None:
    """Run on to the next entry into or exit from a system call; swallow the signal at which the thread had stopped."""
    _request("SYSCALL", PTRACE_SYSCALL, tid, 0, 0)


def get_registers(tid: int, size: int) -> bytes:
    """The general registers, at most ``size`` bytes; fewer for a task of another width."""
    buffer = ctypes.create_string_buffer(size)
    vector = _Iovec(ctypes.addressof(buffer), size)
    _request("GETREGSET", PTRACE_GETREGSET, tid, NT_PRSTATUS, ctypes.addressof(vector))
    return buffer.raw[: vector.iov_len]


def set_registers(tid: int, registers: bytes) -> None:
    buffer = ctypes.create_string_buffer(registers, len(registers))
    vector = _Iovec(ctypes.addressof(buffer), len(registers))
    _request("SETREGSET", PTRACE_SETREGSET, tid, NT_PRSTATUS, ctypes.addressof(vector))


def get_signal_mask(tid: int) -> bytes:
    """The mask that counts when no system call has set another for its own time."""
    buffer = ctypes.create_string_buffer(SIGSET_BYTES)
    _request("GETSIGMASK", PTRACE_GETSIGMASK, tid, SIGSET_BYTES, ctypes.addressof(buffer))
    return buffer.raw


def set_signal_mask(tid: int, mask: bytes) -> None:
    buffer = ctypes.create_string_buffer(mask, SIGSET_BYTES)
    _request("SETSIGMASK", PTRACE_SETSIGMASK, tid, SIGSET_BYTES, ctypes.addressof(buffer))


def get_rseq_address(tid: int) -> int:
    """Where the thread's struct rseq lies; 0 when it has none, or the kernel can not say."""
    found = _RseqConfiguration()
    try:
        _request("GET_RSEQ", PTRACE_GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(found), ctypes.addressof(found))
    except KernelCallFailed as error:
        # EIO: a kernel before 5.13, or one without CONFIG_RSEQ.
        if error.errno in (errno.EIO, errno.EINVAL):
            return 0
        raise
    return int(found.rseq_abi_pointer)


def dispatches_syscalls(tid: int) -> bool:
    """Whether prctl(PR_SET_SYSCALL_USER_DISPATCH) turns the thread's system calls into signals."""
    found = _DispatchConfiguration()
    request = PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG
    try:
        _request("GET_SYSCALL_USER_DISPATCH", request, tid, ctypes.sizeof(found), ctypes.addressof(found))
    except KernelCallFailed as error:
        # EIO, EINVAL: the kernel can not be asked (before 6.4) or does not have it.
        if error.errno in (errno.EIO, errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return bool(found.mode)


def poll_stop(tid: int) -> int | None:
    """The wait status when the thread has stopped or ended since last asked, None when it has not."""
    status = ctypes.c_int()
    result = int(_libc.waitpid(tid, ctypes.byref(status), WNOHANG | WALL))
    if result < 0:
        raise KernelCallFailed("waitpid", f"task {tid}", ctypes.get_errno())
    return status.value if result == tid else None


def stop_event(status: int) -> int:
    """PTRACE_EVENT_* of a stop, 0 when the stop is a signal's or a system call's."""
    return status >> 16


def stop_signal(status: int) -> int:
    return os.WSTOPSIG(status)
