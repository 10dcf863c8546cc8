"""A lab's cgroups: every process of a lab is in its tree of the v2 hierarchy, however started, and dies with it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from migrate.lab.plan import CGROUP_ROOT
from runtime.errors import Busy, MissingFeature

POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Hierarchies:
    """Where the cgroup hierarchies are mounted. A host may have version 2 alone, or beside others of version 1."""

    unified: Path
    others: tuple[Path, ...]


def parse_hierarchies(mountinfo: str) -> Hierarchies:
    """From /proc/self/mountinfo. Raises MissingFeature where version 2 is not mounted."""
    unified: Path | None = None
    others: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        kind, _, options = after.partition(" ")
        if kind == "cgroup2":
            unified = unified or Path(point)
        elif kind == "cgroup":
            others.setdefault(options, Path(point))
    if unified is None:
        raise MissingFeature(
            "the cgroup v2 hierarchy is not mounted",
            hint="mount -t cgroup2 none /sys/fs/cgroup/unified (or where your system wants it)",
        )
    return Hierarchies(unified=unified, others=tuple(others.values()))


def find_hierarchies() -> Hierarchies:
    return parse_hierarchies(Path("/proc/self/mountinfo").read_text())


class LabCgroup:
    """The tree of one lab: ``CGROUP_ROOT/ID``, below it one group for each host.

    A host's daemons and commands are in HOST/system, its containers below HOST/containers: version 2 wants processes
    only in groups without groups.
    """

    def __init__(self, hierarchies: Hierarchies, lab: str) -> None:
        self._hierarchies = hierarchies
        self._path = f"{CGROUP_ROOT}/{lab}"
        self.root = hierarchies.unified / self._path

    def create(self, hosts: list[str]) -> None:
        for host in hosts:
            (self.root / host / "system").mkdir(parents=True, exist_ok=True)

    def exists(self) -> bool:
        return any((top / self._path).exists() for top in self._all())

    def procs_file(self, host: str) -> Path:
        """A process that writes its pid there is one of the host's."""
        return self.root / host / "system" / "cgroup.procs"

    def containers_parent(self, host: str) -> str:
        """What config.toml calls cgroup_parent."""
        return f"{self._path}/{host}/containers"

    def destroy(self, timeout_s: float) -> bool:
        """Kill every process in the tree, frozen ones too, and remove its directories in every hierarchy.

        Returns whether no other lab is left. Raises Busy when something does not go.
        """
        limit_s = time.monotonic() + timeout_s
        self._kill_once()
        while not self._removed():
            if time.monotonic() > limit_s:
                raise Busy(
                    f"what is in cgroup {self.root} does not end: processes {self._pids()}",
                    hint="see what they hang in: dmesg, /proc/PID/stack",
                )
            # Again and again: who is on its way in when the others are killed arrives after that, and a killed process
            # leaves its groups of version 1 a moment later.
            self._kill_once()
            self._wait_until_empty(POLL_S)
        for top in self._all():
            with contextlib.suppress(OSError):
                (top / CGROUP_ROOT).rmdir()
        return not (self._hierarchies.unified / CGROUP_ROOT).exists()

    def _all(self) -> tuple[Path, ...]:
        return (self._hierarchies.unified, *self._hierarchies.others)

    def _removed(self) -> bool:
        gone = [_remove_tree(top / self._path) for top in self._all()]
        return all(gone)

    def _kill_once(self) -> None:
        # cgroup.kill is in Linux 5.14; before that a fork could outrun us, which the caller's loop makes up for.
        try:
            (self.root / "cgroup.kill").write_text("1")
        except OSError:
            for pid in self._pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _pids(self) -> list[int]:
        found: list[int] = []
        for file in self.root.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found += [int(line) for line in file.read_text().split()]
        return found

    def _wait_until_empty(self, timeout_s: float) -> None:
        """cgroup.events is readable by POLLPRI when it has changed since it was read (cgroup-v2.rst)."""
        try:
            with open(self.root / "cgroup.events") as events:
                if "populated 1" in events.read():
                    poll = select.poll()
                    poll.register(events, select.POLLPRI)
                    poll.poll(timeout_s * 1000)
                    return
        except OSError:
            pass
        time.sleep(timeout_s)


def _remove_tree(top: Path) -> bool:
    """Directories of a cgroup tree, innermost first; whether it is gone."""
    for directory, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return not top.exists()
