"""Control groups on v2, v1 and hybrid hosts: limits go to whichever hierarchy has the controller, freezing to v2.

The v2 freezer and ``cgroup.kill`` work on a v2 tree with no controllers at all (hybrid hosts), so v2 is preferred
wherever it is mounted; the v1 freezer is used only where there is none.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.api import Limits
from runtime.errors import KernelCallFailed, MissingFeature, RuntimeFault

WANTED_V1 = ("memory", "cpu", "pids", "freezer")
WANTED_V2 = ("memory", "cpu", "pids")
# The kernel's default period of CPU bandwidth control, in microseconds (Documentation/scheduler/sched-bwc.rst).
CPU_PERIOD_US = 100_000
POLL_S = 0.002


@dataclass(frozen=True, kw_only=True)
class CgroupLayout:
    """Where the hierarchies are mounted: ``v2`` (None when there is none) and v1 controllers by name."""

    v2: Path | None
    v1: tuple[tuple[str, Path], ...]

    @classmethod
    def probe(cls) -> CgroupLayout:
        """Of this process's mount namespace. Raises MissingFeature without any cgroup mount."""
        layout = parse_layout(Path("/proc/self/mountinfo").read_text())
        if layout.v2 is None and "freezer" not in dict(layout.v1):
            raise MissingFeature("no cgroup hierarchy is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup")
        return layout


def parse_layout(mountinfo: str) -> CgroupLayout:
    """Read the text of /proc/PID/mountinfo. A hierarchy seen from inside a cgroup namespace counts as it is."""
    v2: Path | None = None
    v1: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        point = Path(fields[4].encode().decode("unicode_escape"))
        if kinds[0] == "cgroup2" and v2 is None:
            v2 = point
        if kinds[0] == "cgroup":
            for name in kinds[2].split(","):
                if name in WANTED_V1:
                    v1.setdefault(name, point)
    return CgroupLayout(v2=v2, v1=tuple(sorted(v1.items())))


@dataclass(frozen=True, kw_only=True)
class CgroupStats:
    """Resource use. None where no controller counts it."""

    memory_bytes: int | None
    memory_limit_bytes: int | None
    cpu_usage_s: float | None
    pids: int
    oom_kills: int


class ContainerCgroup:
    """One container's directory in each hierarchy."""

    def __init__(self, layout: CgroupLayout, parent: str, container_id: str) -> None:
        self._parent = parent
        self._id = container_id
        self._v2 = layout.v2 / parent / container_id if layout.v2 else None
        self._v2_root = layout.v2
        controllers = self._v2_controllers()
        wanted = [name for name in WANTED_V1 if name not in controllers and not (name == "freezer" and self._v2)]
        self._v1 = {name: path / parent / container_id for name, path in layout.v1 if name in wanted}

    def _v2_controllers(self) -> tuple[str, ...]:
        if self._v2_root is None:
            return ()
        with contextlib.suppress(OSError):
            return tuple((self._v2_root / "cgroup.controllers").read_text().split())
        return ()

    def paths(self) -> tuple[Path, ...]:
        """Directories whose cgroup.procs a process must be written into to be a member."""
        return (*([self._v2] if self._v2 else []), *dict.fromkeys(self._v1.values()))

    def create(self, limits: Limits) -> None:
        """Make the directories and set the limits. Idempotent."""
        for path in self.paths():
            path.mkdir(parents=True, exist_ok=True)
        self._enable_v2_controllers()
        self.set_limits(limits)

    def _enable_v2_controllers(self) -> None:
        if self._v2 is None or self._v2_root is None:
            return
        available = set(self._v2_controllers()) & set(WANTED_V2)
        directory = self._v2_root
        for part in [*self._parent.split("/"), ""]:
            for name in sorted(available):
                # EBUSY: a process of somebody else's lives in an inner node; the limit then fails by name below.
                with contextlib.suppress(OSError):
                    (directory / "cgroup.subtree_control").write_text(f"+{name}")
            directory = directory / part if part else directory

    def set_limits(self, limits: Limits) -> None:
        """Raises MissingFeature naming the limit for which no hierarchy has a controller."""
        if limits.memory_bytes is not None:
            self._write("memory", "memory.max", "memory.limit_in_bytes", str(limits.memory_bytes), "--memory")
            # No swap on top, as docker has it without --memory-swap on a host that accounts swap.
            self._try_write("memory", "memory.swap.max", "memory.memsw.limit_in_bytes", "0", str(limits.memory_bytes))
        if limits.pids is not None:
            self._write("pids", "pids.max", "pids.max", str(limits.pids), "--pids-limit")
        self.set_cpu_quota(limits.cpus)

    def set_cpu_quota(self, cpus: float | None) -> None:
        """Limit to so many processors; None lifts the limit."""
        quota = None if cpus is None else max(1000, int(cpus * CPU_PERIOD_US))
        if "cpu" in self._v1:
            self._put(self._v1["cpu"] / "cpu.cfs_period_us", str(CPU_PERIOD_US))
            self._put(self._v1["cpu"] / "cpu.cfs_quota_us", str(-1 if quota is None else quota))
        elif self._v2 and (self._v2 / "cpu.max").exists():
            self._put(self._v2 / "cpu.max", f"{'max' if quota is None else quota} {CPU_PERIOD_US}")
        elif quota is not None:
            raise MissingFeature("--cpus needs the cpu controller, which no cgroup hierarchy here has")

    def _write(self, controller: str, v2_name: str, v1_name: str, value: str, option: str) -> None:
        if controller in self._v1:
            self._put(self._v1[controller] / v1_name, value)
        elif self._v2 and (self._v2 / v2_name).exists():
            self._put(self._v2 / v2_name, value)
        else:
            raise MissingFeature(f"{option} needs the {controller} controller, which no cgroup hierarchy here has")

    def _try_write(self, controller: str, v2_name: str, v1_name: str, v2_value: str, v1_value: str) -> None:
        with contextlib.suppress(RuntimeFault):
            if controller in self._v1 and (self._v1[controller] / v1_name).exists():
                self._put(self._v1[controller] / v1_name, v1_value)
            elif self._v2 and (self._v2 / v2_name).exists():
                self._put(self._v2 / v2_name, v2_value)

    @staticmethod
    def _put(path: Path, value: str) -> None:
        try:
            path.write_text(value)
        except OSError as error:
            raise KernelCallFailed("write", f"{value!r} to {path}", error.errno or 0) from error

    def add(self, pid: int) -> None:
        for path in self.paths():
            self._put(path / "cgroup.procs", str(pid))

    # Freezing

    def criu_freezer_path(self) -> str:
        """What CRIU takes as ``freeze_cgroup``."""
        directory = self._v2 or self._v1.get("freezer")
        return str(directory) if directory else ""

    def freeze(self, timeout_s: float = 10.0) -> None:
        """Every task is stopped when this returns. Raises RuntimeFault on timeout, with everything thawed."""
        if self._v2 is None:
            self._freeze_v1(timeout_s)
            return
        events = os.open(self._v2 / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._put(self._v2 / "cgroup.freeze", "1")
            deadline = time.monotonic() + timeout_s
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while b"frozen 1" not in os.pread(events, 256, 0):
                left = deadline - time.monotonic()
                if left <= 0:
                    self.thaw()
                    raise RuntimeFault(f"container {self._id} could not be frozen within {timeout_s:.0f} s")
                poller.poll(left * 1000)
        finally:
            os.close(events)

    def _freeze_v1(self, timeout_s: float) -> None:
        state = self._v1["freezer"] / "freezer.state"
        deadline = time.monotonic() + timeout_s
        while True:
            # Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst: write again until it holds.
            self._put(state, "FROZEN")
            if state.read_text().strip() == "FROZEN":
                return
            if time.monotonic() > deadline:
                self.thaw()
                raise RuntimeFault(f"container {self._id} could not be frozen within {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def thaw(self) -> None:
        """Let tasks run; nothing happens when the cgroup is not there."""
        with contextlib.suppress(FileNotFoundError):
            if self._v2 is not None:
                (self._v2 / "cgroup.freeze").write_text("0")
            elif "freezer" in self._v1:
                (self._v1["freezer"] / "freezer.state").write_text("THAWED")

    def frozen(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if self._v2 is not None:
                return "frozen 1" in (self._v2 / "cgroup.events").read_text()
            return (self._v1["freezer"] / "freezer.state").read_text().strip() == "FROZEN"
        return False

    # Ending

    def kill(self) -> None:
        """SIGKILL to every member, frozen or not."""
        if self._v2 is not None and (self._v2 / "cgroup.kill").exists():
            with contextlib.suppress(FileNotFoundError):
                (self._v2 / "cgroup.kill").write_text("1")
            return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.thaw()

    def pids(self) -> list[int]:
        """Host pids of the members, threads not counted."""
        found: set[int] = set()
        for path in self.paths()[:1]:
            for directory, _names, _files in os.walk(path):
                with contextlib.suppress(OSError):
                    found |= {int(line) for line in Path(directory, "cgroup.procs").read_text().split()}
        return sorted(found)

    def wait_empty(self, timeout_s: float) -> bool:
        """Whether the last member went within so long."""
        deadline = time.monotonic() + timeout_s
        while self.pids():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def remove(self) -> None:
        """Remove the directories, and the parents' when they are empty; members must be gone. Idempotent."""
        for path in self.paths():
            for directory, _names, _files in os.walk(path, topdown=False):
                _remove_directory(Path(directory))
            base = path.parent
            for _part in self._parent.split("/"):
                with contextlib.suppress(OSError):
                    base.rmdir()
                base = base.parent

    # Measuring

    def stats(self) -> CgroupStats:
        return CgroupStats(
            memory_bytes=self._number("memory", "memory.current", "memory.usage_in_bytes"),
            memory_limit_bytes=self._limit(),
            cpu_usage_s=self._cpu_usage_s(),
            pids=len(self.pids()),
            oom_kills=self._oom_kills(),
        )

    def _number(self, controller: str, v2_name: str, v1_name: str) -> int | None:
        path = self._v1[controller] / v1_name if controller in self._v1 else self._v2 / v2_name if self._v2 else None
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text()) if path else None
        return None

    def _limit(self) -> int | None:
        limit = self._number("memory", "memory.max", "memory.limit_in_bytes")
        # v1 says "no limit" as the largest multiple of the page size.
        return None if limit is None or limit >= 1 << 62 else limit

    def _cpu_usage_s(self) -> float | None:
        if self._v2 is not None:
            with contextlib.suppress(OSError, ValueError):
                for line in (self._v2 / "cpu.stat").read_text().splitlines():
                    if line.startswith("usage_usec "):
                        return int(line.split()[1]) / 1e6
        return None

    def _oom_kills(self) -> int:
        files = ([self._v2 / "memory.events"] if self._v2 else []) + [
            self._v1[name] / "memory.oom_control" for name in ("memory",) if name in self._v1
        ]
        total = 0
        for file in files:
            with contextlib.suppress(OSError, ValueError):
                for line in file.read_text().splitlines():
                    if line.startswith("oom_kill "):
                        total += int(line.split()[1])
        return total


def _remove_directory(path: Path) -> None:
    deadline = time.monotonic() + 1.0
    while True:
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            # The kernel counts a killed member until it is reaped.
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
