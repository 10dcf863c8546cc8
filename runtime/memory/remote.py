"""Makes another process call userfaultfd(2) for itself, and brings the descriptor here.

One thread of it is seized by ptrace, runs two system calls (userfaultfd, close) on an instruction of its vdso, and is
put back as it was: registers, signal mask, the system call it was sleeping in. Its other threads run on; this one
stands still for about a third of a millisecond. Seccomp filters are suspended for it meanwhile: they neither forbid
nor see it.

If the calling process is killed within that time, the thread goes on with registers that are not its own and its
process errs or dies: ptrace has no way to prevent that. So a running container's processes are stopped by one that does
nothing else (tracer_process.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import KernelCallFailed
from runtime.linux import ptrace
from runtime.linux.processes import pidfd_getfd
from runtime.linux.registers import Architecture, this_architecture
from runtime.linux.userfaultfd import UFFD_USER_MODE_ONLY
from runtime.memory.place import NotInjected, Place, find_place, status_fields

# A thread stops as soon as a processor is free for it: at once, unless the machine is busy or its cgroup has used up
# its share for this period (0.1 s). It runs or sleeps meanwhile. One that is frozen or waits for a disk does not stop.
STOP_WAIT_S = 0.5
# With our registers in it a thread is not left alone: the v1 freezer may hold it until it thaws.
RESCUE_WAIT_S = 10.0
# Busy waiting first: a thread that stands still must not wait for this one to be scheduled again.
SPIN_S = 0.0003
PAUSE_S = 0.00005
CRITICAL_RETRIES = 5
# struct rseq_cs of linux/rseq.h: version, flags, start_ip, post_commit_offset, abort_ip
_RSEQ_CS = struct.Struct("IIQQQ")
_RSEQ_CS_POINTER_AT = 8
# struct flock of asm-generic/fcntl.h: type, whence, start, length, pid
_FLOCK = struct.Struct("=hh4xqq8x")
_SCRATCH_BELOW_STACK = 1024
_ALL_SIGNALS = b"\xff" * ptrace.SIGSET_BYTES
_OPTIONS = ptrace.PTRACE_O_TRACESYSGOOD

Clock = Callable[[], float]


class Stuck(NotInjected):
    """The thread does not stop and is still seized: the calling thread must end, which lets go of it."""


class LeftBehind(NotInjected):
    """The process has kept ``descriptor``: it was frozen before it could close it. ``close_descriptor`` it later.

    ``ours``: the same open file here, for the caller to close; None where there is none.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__("it was frozen meanwhile")
        self.descriptor = descriptor
        self.ours: int | None = None


@dataclass(frozen=True, kw_only=True)
class Injected:
    """``descriptor`` is ours, and has had no UFFDIO_API yet. ``stop_ms``: how long the thread stood still."""

    descriptor: int
    stop_ms: float


def make_userfaultfd(pid: int, clock: Clock = time.perf_counter) -> Injected:
    """Each call must come from the same thread, one that can end. Raises NotInjected."""
    with contextlib.ExitStack() as stack:
        seized = _seize(pid, clock, stack)
        descriptor = seized.take_userfaultfd()
    return Injected(descriptor=descriptor, stop_ms=seized.stop_ms)


def close_descriptor(pid: int, descriptor: int, clock: Clock = time.perf_counter) -> None:
    """Make the process close one of its descriptors. As ``make_userfaultfd``."""
    with contextlib.ExitStack() as stack:
        _seize(pid, clock, stack).close(descriptor)


@dataclass(frozen=True, kw_only=True)
class RecordLock:
    """``type``: F_RDLCK or F_WRLCK; ``length`` 0 reaches to the end of the file, however it grows."""

    descriptor: int
    type: int
    start: int
    length: int


def take_locks(pid: int, locks: Iterable[RecordLock], clock: Clock = time.perf_counter) -> None:
    """Make the process take POSIX locks, which belong to it alone. As ``make_userfaultfd``; raises NotInjected also
    where it does not get one of them."""
    with contextlib.ExitStack() as stack:
        seized = _seize(pid, clock, stack)
        for lock in locks:
            seized.take_lock(lock)


def _seize(pid: int, clock: Clock, stack: contextlib.ExitStack) -> _Seized:
    """A thread that stands still, until the stack is unwound."""
    machine = this_architecture()
    place = find_place(pid, machine, stack)
    for _attempt in range(CRITICAL_RETRIES):
        seized = _Seized(place, machine, clock)
        try:
            seized.stop()
            critical = seized.in_critical_section()
        except BaseException:
            seized.let_go()
            raise
        if not critical:
            stack.callback(seized.let_go)
            return seized
        # With other registers the kernel would forget that the sequence is to start anew when it was disturbed.
        seized.let_go()
    raise NotInjected("its thread is in a restartable sequence each time")


class _Seized:
    """One thread of another process under ptrace."""

    def __init__(self, place: Place, machine: Architecture, clock: Clock) -> None:
        self._place = place
        self._tid = place.tid
        self._machine = machine
        self._clock = clock
        self._stopped_at = 0.0
        # When it was last seen running, which is at most one look before it stopped.
        self._running_at = 0.0
        self.stop_ms = 0.0
        # What has to be put back; None as long as it has not been read, or when there is nobody left.
        self._registers: bytes | None = None
        self._mask: bytes | None = None
        self._standing = False
        self._swallowed: list[int] = []

    def stop(self) -> None:
        self._attach()
        try:
            ptrace.interrupt(self._tid)
            self._wait_for_event_stop()
            self._standing = True
            self._stopped_at = self._running_at
            registers = ptrace.get_registers(self._tid, self._machine.register_bytes)
            if len(registers) != self._machine.register_bytes:
                raise NotInjected("it is a 32-bit program")
            if ptrace.dispatches_syscalls(self._tid):
                raise NotInjected("it handles its own system calls (syscall user dispatch)")
            if self._machine.interrupted_for_nothing(registers) and not self._has_signal():
                registers = self._machine.calling_again(registers)
            self._mask = ptrace.get_signal_mask(self._tid)
            self._registers = registers
        except KernelCallFailed as error:
            raise NotInjected(f"it ended meanwhile: {error}") from error

    def _attach(self) -> None:
        suspend = ptrace.PTRACE_O_SUSPEND_SECCOMP if self._place.seccomp else 0
        try:
            ptrace.seize(self._tid, _OPTIONS | suspend)
        except KernelCallFailed as error:
            why = "its seccomp filter can not be suspended, or it" if suspend else "it"
            raise NotInjected(f"{why} can not be traced: {error}") from error

    def _wait_for_event_stop(self) -> None:
        """Signals on their way are delivered first: the thread then stops in or before their handler."""
        while True:
            status = self._next_stop(STOP_WAIT_S)
            if ptrace.stop_event(status) == ptrace.PTRACE_EVENT_STOP:
                return
            ptrace.resume(self._tid, ptrace.stop_signal(status))

    def _next_stop(self, wait_s: float) -> int:
        begin = self._running_at = self._clock()
        while (status := ptrace.poll_stop(self._tid)) is None:
            self._running_at = self._clock()
            waited_s = self._running_at - begin
            if waited_s > wait_s:
                raise Stuck("its thread does not stop")
            if waited_s > SPIN_S:
                time.sleep(PAUSE_S)
        if not os.WIFSTOPPED(status):
            self._standing = False
            self._registers = None
            raise NotInjected("it ended meanwhile")
        return status

    def _has_signal(self) -> bool:
        """Whether a signal waits to be delivered: then EINTR is the truth."""
        fields = status_fields(Path(f"/proc/{self._place.pid}/task/{self._tid}/status").read_text())
        pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
        return bool(pending & ~int(fields["SigBlk"], 16))

    def in_critical_section(self) -> bool:
        """Whether the thread is inside a restartable sequence (rseq(2))."""
        if self._registers is None:
            return False
        try:
            address = ptrace.get_rseq_address(self._tid)
            if not address:
                return False
            pointer = int.from_bytes(self._place.read(address + _RSEQ_CS_POINTER_AT, 8), "little")
            if not pointer:
                return False
            _version, _flags, start, length, _abort = _RSEQ_CS.unpack(self._place.read(pointer, _RSEQ_CS.size))
        except (OSError, struct.error, KernelCallFailed):
            return False  # not a struct rseq that the kernel could follow either
        return 0 <= self._machine.program_counter(self._registers) - int(start) < int(length)

    def take_userfaultfd(self) -> int:
        """Our copy of a new userfaultfd of the process."""
        theirs = self.call("userfaultfd", os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
        if theirs < 0:
            raise NotInjected(f"userfaultfd in it: {os.strerror(-theirs)} ({errno.errorcode.get(-theirs, -theirs)})")
        try:
            ours = pidfd_getfd(self._place.pidfd, theirs)
        except KernelCallFailed as error:
            self.close(theirs)
            raise NotInjected(str(error)) from error
        try:
            self.close(theirs)
        except LeftBehind as error:
            error.ours = ours
            raise
        except BaseException:
            os.close(ours)
            raise
        return ours

    def close(self, descriptor: int) -> None:
        """Raises LeftBehind."""
        try:
            self.call("close", descriptor)
        except NotInjected as error:
            if self._standing:
                raise LeftBehind(descriptor) from error
            raise

    def take_lock(self, lock: RecordLock) -> None:
        assert self._registers is not None
        at = (self._machine.stack_pointer(self._registers) - _SCRATCH_BELOW_STACK) & -16
        wanted = _FLOCK.pack(lock.type, os.SEEK_SET, lock.start, lock.length)
        try:
            memory = os.open(f"/proc/{self._place.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
            try:
                before = os.pread(memory, len(wanted), at)
                os.pwrite(memory, wanted, at)
                result = self.call("fcntl", lock.descriptor, fcntl.F_SETLK, at)
                os.pwrite(memory, before, at)
            finally:
                os.close(memory)
        except OSError as error:
            raise NotInjected(f"its stack can not be written to: {error.strerror}") from error
        if result < 0:
            raise NotInjected(f"descriptor {lock.descriptor} can not be locked: {os.strerror(-result)}")

    def call(self, name: str, *arguments: int) -> int:
        """What the system call returned in the process: -errno for an error."""
        if self._registers is None:
            raise NotInjected("it ended meanwhile")
        registers = self._machine.calling(
            self._registers, self._place.instruction, self._machine.numbers[name], arguments
        )
        try:
            ptrace.set_signal_mask(self._tid, _ALL_SIGNALS)
            ptrace.set_registers(self._tid, registers)
            self._run_to_syscall_stop()  # on its way in
            self._run_to_syscall_stop()  # on its way out
            return self._machine.result(ptrace.get_registers(self._tid, self._machine.register_bytes))
        except KernelCallFailed as error:
            raise NotInjected(f"it ended meanwhile: {error}") from error

    def _run_to_syscall_stop(self) -> None:
        while True:
            self._standing = False
            ptrace.resume_to_syscall(self._tid)
            rescued = False
            try:
                status = self._next_stop(STOP_WAIT_S)
            except Stuck:
                # Perhaps frozen before the instruction was reached: a frozen task still stops for its tracer.
                rescued = True
                ptrace.interrupt(self._tid)
                status = self._next_stop(RESCUE_WAIT_S)
            self._standing = True
            # Also when rescued: a thread that was only slow may have entered meanwhile. Put back in its own registers
            # inside a system call, it would do its own last one again.
            if ptrace.stop_signal(status) == ptrace.SYSCALL_STOP:
                return
            if ptrace.stop_event(status) == 0:
                # Only SIGSTOP passes a full mask. It is sent again when all is as before.
                self._swallowed.append(ptrace.stop_signal(status))
            elif rescued:
                raise NotInjected("it is frozen")

    def let_go(self) -> None:
        """Put the thread back as it was and let it run on."""
        if not self._standing:
            return
        self._standing = False
        # Killed meanwhile: then there is nothing to put back.
        with contextlib.suppress(KernelCallFailed):
            if self._registers is not None and self._mask is not None:
                ptrace.set_signal_mask(self._tid, self._mask)
                ptrace.set_registers(self._tid, self._registers)
            ptrace.detach(self._tid)
        self.stop_ms = (self._clock() - self._stopped_at) * 1e3
        for number in self._swallowed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._place.pid, number)
