"""Where in a process a system call can be run for us: which thread, which instruction. Reads /proc, stops nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import RuntimeFault
from runtime.linux.processes import PIDFD_THREAD
from runtime.linux.registers import Architecture
from runtime.memory.maps import Mapping, parse_mappings

MOST_THREADS_LOOKED_AT = 32
MAX_CODE_BYTES = 1 << 20


class NotInjected(RuntimeFault):
    """The process is as it was before; ``str()`` says why."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """``memory_fd`` is /proc/PID/mem; both descriptors are closed by the stack that ``find_place`` was given."""

    pid: int
    tid: int
    memory_fd: int
    pidfd: int
    instruction: int
    seccomp: bool

    def read(self, address: int, length: int) -> bytes:
        """Raises OSError where nothing is mapped."""
        return os.pread(self.memory_fd, length, address)


def find_place(pid: int, machine: Architecture, stack: ExitStack) -> Place:
    """Raises NotInjected, also when the process has gone."""
    try:
        return _find_place(pid, machine, stack)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotInjected("the process has gone") from error
    except OSError as error:
        raise NotInjected(f"the process can not be looked into: {error}") from error


def _find_place(pid: int, machine: Architecture, stack: ExitStack) -> Place:
    fields = status_fields(Path(f"/proc/{pid}/status").read_text())
    if int(fields["TracerPid"]):
        raise NotInjected(f"it is traced by process {fields['TracerPid']}")
    tid = _best_thread(pid, machine)
    # A leader that has ended while its threads run on has no memory; every thread's own entry has.
    memory_fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, memory_fd)
    pidfd = os.pidfd_open(tid, 0 if tid == pid else PIDFD_THREAD)
    stack.callback(os.close, pidfd)
    mappings = parse_mappings(Path(f"/proc/{tid}/maps").read_text())
    return Place(
        pid=pid,
        tid=tid,
        memory_fd=memory_fd,
        pidfd=pidfd,
        instruction=_find_instruction(memory_fd, mappings, machine),
        seccomp=fields.get("Seccomp", "0") != "0",
    )


def status_fields(text: str) -> dict[str, str]:
    """/proc/PID/status as it is."""
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _best_thread(pid: int, machine: Architecture) -> int:
    """A thread that stops at once and does not notice: best one that runs, then one in a call the kernel restarts."""
    threads = sorted(map(int, os.listdir(f"/proc/{pid}/task")), key=lambda tid: (tid != pid, tid))
    ranked = [(rank, tid) for tid in threads[:MOST_THREADS_LOOKED_AT] if (rank := _rank(pid, tid, machine)) is not None]
    if not ranked:
        raise NotInjected("it has no thread that is alive")
    rank, tid = min(ranked, key=lambda pair: pair[0])
    if rank == _FROZEN:
        raise NotInjected("it is frozen")
    if rank == _UNINTERRUPTIBLE:
        raise NotInjected("it sleeps in the kernel where it can not be woken")
    return tid


_UNINTERRUPTIBLE, _FROZEN = 4, 5
# Where the v2 freezer lets tasks sleep, with and without the inner function inlined. A frozen task would stop for us,
# and then not run: where these names do not fit, it takes half a second to find that out.
_FREEZER = ("do_freezer_trap", "get_signal")


def _rank(pid: int, tid: int, machine: Architecture) -> int | None:
    """Lower is better; None for a thread that has ended."""
    directory = f"/proc/{pid}/task/{tid}"
    try:
        state = Path(directory, "stat").read_text().rpartition(")")[2].split()[0]
        call = Path(directory, "syscall").read_text().split()[0]
        sleeps_in = Path(directory, "wchan").read_text()
    except OSError:
        return None
    if state in "ZXx":
        return None
    if state == "R":
        return 0
    if state in "DK":
        return _UNINTERRUPTIBLE
    if state in "Tt":
        return 3
    if sleeps_in in _FREEZER:
        return _FROZEN
    return 2 if call.isdigit() and machine.never_restarts(int(call)) else 1


def _find_instruction(memory_fd: int, mappings: list[Mapping], machine: Architecture) -> int:
    """An instruction that enters the kernel: in the vdso, which every program has, or else in any code at all."""
    for mapping in _code(mappings):
        try:
            code = os.pread(memory_fd, min(mapping.end - mapping.start, MAX_CODE_BYTES), mapping.start)
        except OSError:
            continue
        at = code.find(machine.instruction)
        while at >= 0 and at % machine.instruction_step:
            at = code.find(machine.instruction, at + 1)
        if at >= 0:
            return mapping.start + at
    raise NotInjected("no instruction that enters the kernel was found in its code")


def _code(mappings: list[Mapping]) -> Iterator[Mapping]:
    executable = [mapping for mapping in mappings if mapping.permissions[2] == "x"]
    yield from (mapping for mapping in executable if mapping.name == "[vdso]")
    # [vsyscall] is executable and is not there: what jumps into it is emulated.
    yield from (mapping for mapping in executable if mapping.name not in ("[vdso]", "[vsyscall]"))
