"""What a tracker must know of a process besides its pages: which one it is, its mappings, whose memory it runs in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.linux.processes import shares_memory
from runtime.memory.maps import Mapping, parse_mappings

# Fields of /proc/PID/stat after the name (proc_pid_stat(5)), counted from 0.
_PARENT = 1
_START_TICKS = 19


@dataclass(frozen=True, kw_only=True)
class AddressSpace:
    """``tid``: a thread whose entries in /proc show this memory; the process's own pid nearly always.

    ``text`` is what the mappings were parsed from.
    """

    tid: int
    mappings: list[Mapping]
    text: str


def start_ticks(pid: int) -> str:
    """With the pid it names one process for good. Raises FileNotFoundError or ProcessLookupError when it has gone."""
    return _stat_fields(pid)[_START_TICKS]


def read_address_space(pid: int, before: AddressSpace | None = None) -> AddressSpace | None:
    """None when the process has ended and only waits to be reaped. ``before`` itself when nothing is mapped otherwise
    than then."""
    text = Path(f"/proc/{pid}/maps").read_text()
    if text:
        if before is not None and before.tid == pid and before.text == text:
            return before
        return AddressSpace(tid=pid, mappings=parse_mappings(text), text=text)
    # A leader that has ended before its threads has no memory any more; they have.
    for name in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            if text := Path(f"/proc/{name}/maps").read_text():
                return AddressSpace(tid=int(name), mappings=parse_mappings(text), text=text)
    return None


def owner_of_memory(pid: int, candidates: Iterable[int]) -> int:
    """The parent, when the process runs in its memory as between vfork and exec; 0 when its memory is its own."""
    parent = int(_stat_fields(pid)[_PARENT])
    return parent if parent in candidates and shares_memory(pid, parent) else 0


def with_descendants(pids: Iterable[int]) -> set[int]:
    """These, their children, and so on; who forks or is orphaned meanwhile may be missing."""
    found: set[int] = set()
    left = list(pids)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            with contextlib.suppress(OSError):
                for tid in os.listdir(f"/proc/{pid}/task"):
                    left += map(int, Path(f"/proc/{pid}/task/{tid}/children").read_text().split())
    return found


def pid_inside(pid: int) -> int:
    """The pid in its own namespace, which images use; 0 when the process has gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    except OSError:
        pass
    return 0


def tasks_inside(init_pid: int, pids: Iterable[int]) -> dict[int, int]:
    """By pid inside, those of ``pids`` that are in the pid namespace of ``init_pid``."""
    found = {}
    namespace = os.readlink(f"/proc/{init_pid}/ns/pid")
    for pid in pids:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace and (inside := pid_inside(pid)):
                found[inside] = pid
    return found


def _stat_fields(pid: int) -> list[str]:
    # The name may hold blanks and parentheses; the rest can not.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
