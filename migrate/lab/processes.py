"""Programs that a lab runs: to their end, or for as long as it is up."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrate.lab.plan import DETACHED_SCRIPT, SYSTEM_PATH
from runtime.errors import MissingFeature, ProgramFailed
from runtime.store import process_start_ticks

TIMEOUT_S = 20.0
TAIL_LINES = 5


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """One process for good: its pid, and when it started (field 22 of /proc/PID/stat)."""

    pid: int
    start_ticks: int

    def alive(self) -> bool:
        return self.pid > 0 and process_start_ticks(self.pid) == self.start_ticks


def identify(pid: int) -> ProcessId:
    return ProcessId(pid=pid, start_ticks=process_start_ticks(pid) or 0)


def run(argv: Sequence[str], *, stdin: str = "") -> str:
    """A program that must succeed; its output. Raises ProgramFailed with what it says, MissingFeature."""
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={"PATH": SYSTEM_PATH},
            check=False,
        )
    except FileNotFoundError as error:
        raise MissingFeature(f"the program {error.filename} is missing", hint="run scripts/setup") from error
    except subprocess.TimeoutExpired as error:
        raise ProgramFailed(f"{' '.join(argv)}: no end after {TIMEOUT_S:g} s") from error
    if done.returncode:
        raise ProgramFailed(f"{' '.join(argv)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def start_detached(argv: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> ProcessId:
    """A program that outlives us, as a child of the system's first process; its output goes to the end of ``log``."""
    script = ["setsid", "--fork", "sh", "-c", DETACHED_SCRIPT, str(log), *argv]
    done = subprocess.run(
        script,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        env=dict(environment),
        check=False,
    )
    first = done.stdout.partition("\n")[0]
    if not first.isdigit():
        raise ProgramFailed(f"{' '.join(argv)} could not be started: {done.stdout.strip()}")
    return identify(int(first))


class Starting:
    """A holder on its way: started, not yet ready. Several may be under way at once."""

    def __init__(self, argv: Sequence[str], *, log: Path) -> None:
        self._argv = argv
        self._log = log
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                ["setsid", "--fork", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={"PATH": SYSTEM_PATH},
            )

    def finish(self) -> ProcessId:
        """Wait until it says that it is ready. Raises ProgramFailed with the end of its log."""
        try:
            # The end of the stream is when it goes to sleep, or fails.
            said, _ = self._process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            self._process.communicate()
            raise ProgramFailed(f"{self._argv[0]}: not ready after {TIMEOUT_S:g} s") from error
        match said.split():
            case [pid, "ready"]:
                return identify(int(pid))
        raise ProgramFailed(f"a lab host did not come up: {tail(self._log) or 'no reason given'}")

    def abandon(self) -> None:
        """Give back what is left of it here; nothing happens after ``finish``. Its process is killed by its cgroup."""
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()


def tail(log: Path) -> str:
    """The last lines of a log, for an error."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return " | ".join(lines[-TAIL_LINES:])


def listening_ports(tcp_tables: Sequence[str]) -> set[int]:
    """Ports on which somebody listens, from /proc/PID/net/tcp and tcp6."""
    found: set[int] = set()
    for table in tcp_tables:
        for line in table.splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # TCP_LISTEN of linux/tcp_states.h
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def read_tcp_tables(pid: int) -> list[str]:
    """Of the network namespace that ``pid`` is in."""
    paths = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    return [path.read_text() for path in paths if os.path.exists(path)]
