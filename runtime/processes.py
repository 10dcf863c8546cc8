"""Processes of a container: what ``cmigrate top`` shows of one, and signals to the first of them."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from runtime.api import Container
from runtime.store import process_start_ticks


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """One process of a container; ``pid`` as the container sees it, ``host_pid`` as this host does."""

    pid: int
    host_pid: int
    user: str
    cpu_s: float
    command: str


def read_process(pid: int) -> ProcessInfo | None:
    """None when the process has gone meanwhile."""
    directory = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":\t", 1) for line in (directory / "status").read_text().splitlines() if ":\t" in line)
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    ticks = int(fields[11]) + int(fields[12])
    return ProcessInfo(
        pid=int(status["NSpid"].split()[-1]),
        host_pid=pid,
        user=status["Uid"].split()[1],
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
        command=command or f"[{status['Name']}]",
    )


def send_signal(container: Container, number: int) -> None:
    """To the container's first process and no other: the pid is checked against its start time by a pidfd."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(container.state.init_pid)
        try:
            if process_start_ticks(container.state.init_pid) == container.state.init_start_ticks:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
