"""Register layouts: how to make a stopped thread run one system call, and how to put it back as it was.

x86-64 is tested. aarch64 has been written from the kernel's sources and never run: it is reviewed on paper only.
"""

from __future__ import annotations

import errno
import platform
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from runtime.errors import MissingFeature


class Architecture(ABC):
    """One machine's registers, as PTRACE_GETREGSET gives them for NT_PRSTATUS."""

    register_bytes: int
    """What a task of this machine's own width has; a task of another width has fewer."""
    instruction: bytes
    """The instruction that enters the kernel."""
    instruction_step: int
    """The instruction may begin at multiples of this."""
    numbers: Mapping[str, int]

    @abstractmethod
    def program_counter(self, registers: bytes) -> int:
        """The next instruction's address."""

    @abstractmethod
    def stack_pointer(self, registers: bytes) -> int:
        """Below it, and the red zone of 128 bytes, is nothing that the thread needs."""

    @abstractmethod
    def calling(self, registers: bytes, instruction: int, number: int, arguments: Sequence[int]) -> bytes:
        """Registers that run one system call by the ``instruction`` at that address, and restart no earlier call."""

    @abstractmethod
    def result(self, registers: bytes) -> int:
        """What a system call has returned: -errno for an error."""

    @abstractmethod
    def never_restarts(self, number: int) -> bool:
        """Whether the call says EINTR after a stop, where others are restarted by the kernel and nobody notices."""

    @abstractmethod
    def interrupted_for_nothing(self, registers: bytes) -> bool:
        """Whether the thread is about to see EINTR from a call that the kernel never restarts by itself.

        Only calls that have done nothing when they say EINTR: they can be made again.
        """

    @abstractmethod
    def calling_again(self, registers: bytes) -> bytes:
        """Registers that repeat the call ``interrupted_for_nothing`` speaks of."""


class X86_64(Architecture):
    """struct user_regs_struct of asm/user_64.h: 27 words."""

    _WORDS = struct.Struct("27Q")
    _R10, _R9, _R8, _RAX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP, _RSP = 7, 8, 9, 10, 12, 13, 14, 15, 16, 19
    _NO_CALL = (1 << 64) - 1

    register_bytes = _WORDS.size
    instruction = b"\x0f\x05"
    instruction_step = 1
    numbers = {"userfaultfd": 323, "close": 3, "fcntl": 72}
    # signal(7): what fails with EINTR after a stop though no handler ran. accept, recv and send do so with a timeout
    # set on the socket. connect is not here: it goes on in the background, and calling it again gives another answer.
    _NEVER_RESTARTED = frozenset(
        {
            *(0, 1, 19, 20),  # read, write, readv, writev
            *(43, 288),  # accept, accept4
            *(44, 45, 46, 47, 299, 307),  # sendto, recvfrom, sendmsg, recvmsg, recvmmsg, sendmmsg
            *(232, 281, 441),  # epoll_wait, epoll_pwait, epoll_pwait2
            *(65, 220),  # semop, semtimedop
            *(128, 208, 333),  # rt_sigtimedwait, io_getevents, io_pgetevents
        }
    )

    def program_counter(self, registers: bytes) -> int:
        return self._words(registers)[self._RIP]

    def stack_pointer(self, registers: bytes) -> int:
        return self._words(registers)[self._RSP]

    def calling(self, registers: bytes, instruction: int, number: int, arguments: Sequence[int]) -> bytes:
        words = self._words(registers)
        # With a call's number in orig_rax and -ERESTART... in rax the kernel would set up that call again, over ours.
        words[self._ORIG_RAX] = self._NO_CALL
        words[self._RAX] = number
        words[self._RIP] = instruction
        places = (self._RDI, self._RSI, self._RDX, self._R10, self._R8, self._R9)
        for place, value in zip(places, arguments, strict=False):
            words[place] = value
        return self._WORDS.pack(*words)

    def result(self, registers: bytes) -> int:
        return _signed(self._words(registers)[self._RAX])

    def never_restarts(self, number: int) -> bool:
        return number in self._NEVER_RESTARTED

    def interrupted_for_nothing(self, registers: bytes) -> bool:
        words = self._words(registers)
        return words[self._ORIG_RAX] in self._NEVER_RESTARTED and _signed(words[self._RAX]) == -errno.EINTR

    def calling_again(self, registers: bytes) -> bytes:
        words = self._words(registers)
        words[self._RAX] = words[self._ORIG_RAX]
        words[self._ORIG_RAX] = self._NO_CALL
        words[self._RIP] -= len(self.instruction)
        return self._WORDS.pack(*words)

    def _words(self, registers: bytes) -> list[int]:
        return list(self._WORDS.unpack(registers))


class Aarch64(Architecture):
    """struct user_pt_regs of asm/ptrace.h: x0 to x30, sp, pc, pstate. On paper only, never run.

    When a thread stops on its way out of an interrupted call, arm64's do_signal() has already put pc back to the
    instruction and x0 back to the first argument, and has forgotten the call's number: nothing need be done for a
    restart, but a call that sleeps for a relative time (nanosleep, poll) begins its whole time again, and the first
    argument of a call that says EINTR is lost, so that such a call is not repeated here.
    """

    _WORDS = struct.Struct("34Q")
    _X0, _X8, _SP, _PC = 0, 8, 31, 32

    register_bytes = _WORDS.size
    instruction = b"\x01\x00\x00\xd4"  # svc #0
    instruction_step = 4
    numbers = {"userfaultfd": 282, "close": 57, "fcntl": 25}
    # epoll_pwait, epoll_pwait2, semop, semtimedop, rt_sigtimedwait, accept, accept4, recvfrom, recvmsg
    _NEVER_RESTARTED = frozenset({22, 441, 193, 192, 137, 202, 242, 207, 212})

    def program_counter(self, registers: bytes) -> int:
        return int(self._WORDS.unpack(registers)[self._PC])

    def stack_pointer(self, registers: bytes) -> int:
        return int(self._WORDS.unpack(registers)[self._SP])

    def calling(self, registers: bytes, instruction: int, number: int, arguments: Sequence[int]) -> bytes:
        words = list(self._WORDS.unpack(registers))
        words[self._X0 : self._X0 + len(arguments)] = arguments
        words[self._X8] = number
        words[self._PC] = instruction
        return self._WORDS.pack(*words)

    def result(self, registers: bytes) -> int:
        return _signed(self._WORDS.unpack(registers)[self._X0])

    def never_restarts(self, number: int) -> bool:
        return number in self._NEVER_RESTARTED

    def interrupted_for_nothing(self, registers: bytes) -> bool:
        return False

    def calling_again(self, registers: bytes) -> bytes:
        return registers


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_KNOWN: Mapping[str, type[Architecture]] = {"x86_64": X86_64, "aarch64": Aarch64}


def this_architecture(machine: str = "") -> Architecture:
    """Raises MissingFeature for a machine that is not known here."""
    name = machine or platform.machine()
    if name not in _KNOWN:
        raise MissingFeature(f"{name} is not supported", hint="x86-64 and aarch64 are")
    return _KNOWN[name]()
