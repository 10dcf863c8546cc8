"""Tasks inside vfork(): they wait in the kernel until their child has called execve() or ended.

Such a task counts as frozen for the cgroup freezer (kernel/fork.c, wait_for_vfork_done) but cannot be stopped by
ptrace, and its child, which is frozen as well, cannot go on and wake it. CRIU waits for it in vain.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

# Of x86-64 (asm/unistd_64.h): clone, vfork, clone3. posix_spawn is a clone with CLONE_VFORK.
VFORKING_CALLS = frozenset({"56", "58", "435"})


def waits_for_child(stat: str, syscall: str) -> bool:
    """Whether a task is inside vfork, from its /proc/PID/stat and /proc/PID/syscall.

    A clone without CLONE_VFORK does not sleep, so whoever sleeps in one waits for a child.
    """
    state = stat.rpartition(")")[2].split()[:1]
    return state == ["D"] and syscall.split(" ", 1)[0].strip() in VFORKING_CALLS


def tasks_in_vfork(pids: Iterable[int]) -> list[int]:
    """Threads of these processes that are inside vfork at the moment; asked while they are frozen, it stays true."""
    found = []
    for pid in pids:
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        for thread in threads:
            directory = Path(f"/proc/{pid}/task/{thread}")
            try:
                stat = (directory / "stat").read_text()
                if " D " in stat and waits_for_child(stat, (directory / "syscall").read_text()):
                    found.append(int(thread))
            except OSError:
                continue
    return found
