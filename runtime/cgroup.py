"""Control groups on v2, v1 and hybrid hosts: limits go to whichever hierarchy has the controller, freezing to v2.

The v2 freezer and ``cgroup.kill`` work on a v2 tree with no controllers at all (hybrid hosts), so v2 is preferred
wherever it is mounted; the v1 freezer is used only where there is none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.api import Limits
from runtime.cgroup_layout import WANTED_V1, CgroupLayout
from runtime.errors import BadInput, KernelCallFailed, MissingFeature, RuntimeFault, WrongState

# What a v2 tree does by itself, controllers or not.
BUILT_INTO_V2 = ("freezer", "cpuacct")
WANTED_V2 = ("memory", "cpu", "pids")
# The kernel's default period of CPU bandwidth control, in microseconds (Documentation/scheduler/sched-bwc.rst).
CPU_PERIOD_US = 100_000
MIN_QUOTA_US = 1000
# The kernel tells of changes in cgroup.events at most every 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV in kernel/cgroup), and
# freezing takes a fraction of one: look often at first.
FIRST_LOOK_S, LONGEST_LOOK_S = 0.0001, 0.002
CREATE_ATTEMPTS = 20
REMOVE_TIMEOUT_S = 1.0


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
        elsewhere = (*self._v2_controllers(), *(BUILT_INTO_V2 if self._v2 else ()))
        wanted = [name for name in WANTED_V1 if name not in elsewhere]
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
        """Make the directories and set the limits. Idempotent. Raises MissingFeature, BadInput, KernelCallFailed."""
        for path in self.paths():
            _make_directory(path)
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
        """Make these the limits; None lifts one. Raises MissingFeature naming the limit that nothing here can keep."""
        if limits.memory_bytes is None:
            self._try_write("memory", "memory.swap.max", "memory.memsw.limit_in_bytes", "max", "-1")
            self._try_write("memory", "memory.max", "memory.limit_in_bytes", "max", "-1")
        else:
            memory = str(limits.memory_bytes)
            # On v1 the sum with swap may never be the smaller one: it goes up first and down last.
            self._try_write("memory", "memory.swap.max", "memory.memsw.limit_in_bytes", "0", memory)
            self._write("memory", "memory.max", "memory.limit_in_bytes", memory, "--memory")
            # No swap on top, as docker has it without --memory-swap on a host that accounts swap.
            self._try_write("memory", "memory.swap.max", "memory.memsw.limit_in_bytes", "0", memory)
        if limits.pids is None:
            self._try_write("pids", "pids.max", "pids.max", "max", "max")
        else:
            self._write("pids", "pids.max", "pids.max", str(limits.pids), "--pids-limit")
        self.set_cpu_quota(limits.cpus)

    def set_cpu_quota(self, cpus: float | None) -> None:
        """Limit to so many processors; None lifts the limit."""
        if cpus is not None and not cpus > 0:
            raise BadInput(f"{cpus} processors are none", hint="a positive number, such as 0.5")
        quota = None if cpus is None else max(MIN_QUOTA_US, int(cpus * CPU_PERIOD_US))
        if "cpu" in self._v1:
            self._put(self._v1["cpu"] / "cpu.cfs_period_us", str(CPU_PERIOD_US))
            self._put(self._v1["cpu"] / "cpu.cfs_quota_us", str(-1 if quota is None else quota))
        elif self._v2 and (self._v2 / "cpu.max").exists():
            self._put(self._v2 / "cpu.max", f"{'max' if quota is None else quota} {CPU_PERIOD_US}")
        elif quota is not None:
            raise MissingFeature("--cpus needs the cpu controller, which no cgroup hierarchy here has")

    @contextlib.contextmanager
    def _unthrottled(self) -> Iterator[None]:
        """No processor limit inside: a task that has used up its share does not run, and so does not freeze either."""
        if "cpu" in self._v1:
            file, unlimited = self._v1["cpu"] / "cpu.cfs_quota_us", "-1"
        elif self._v2 is not None:
            file, unlimited = self._v2 / "cpu.max", f"max {CPU_PERIOD_US}"
        else:
            yield
            return
        limit = _text(file)
        if not limit or limit.split()[0] in ("-1", "max"):
            yield
            return
        self._put(file, unlimited)
        try:
            yield
        finally:
            self._put(file, limit)

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
        """Every task is stopped when this returns.

        Raises RuntimeFault naming who does not stop within ``timeout_s``, with everything thawed; WrongState when
        the cgroup is gone.
        """
        file, word = self._freezer("1", "FROZEN")
        with self._unthrottled():
            self._order(file, word)
            # A v1 freezer may need to be told again (Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst).
            again = None if self._v2 else lambda: self._order(file, word)
            if _look_until(self.frozen, timeout_s, again):
                return
        running = self._running_tasks()
        self.thaw()
        raise RuntimeFault(
            f"container {self._id} could not be frozen within {timeout_s:g} s: {', '.join(running) or 'it was thawed'}",
            hint="a task hangs in the kernel: see dmesg, and whether a disk or a server is away",
        )

    def _freezer(self, v2_word: str, v1_word: str) -> tuple[Path, str]:
        if self._v2 is not None:
            return self._v2 / "cgroup.freeze", v2_word
        return self._v1["freezer"] / "freezer.state", v1_word

    def _order(self, file: Path, word: str) -> None:
        try:
            file.write_text(word)
        except FileNotFoundError:
            raise WrongState(f"the cgroup of container {self._id} is gone", hint="it has ended") from None
        except OSError as error:
            raise KernelCallFailed("write", f"{word} to {file}", error.errno or 0) from error

    def _running_tasks(self) -> list[str]:
        """Members that are not in a freezer's sleep, as far as /proc tells: those in the kernel (D)."""
        names = []
        for pid in self.pids():
            stat = _text(Path(f"/proc/{pid}/stat"))
            name, _, rest = stat.partition("(")[2].rpartition(")")
            if rest.split()[:1] == ["D"] and "freez" not in _text(Path(f"/proc/{pid}/wchan")):
                names.append(f"{name} (pid {pid})")
        return names

    def thaw(self) -> None:
        """Let tasks run; nothing happens when the cgroup is not there."""
        file, word = self._freezer("0", "THAWED")
        with contextlib.suppress(WrongState):
            self._order(file, word)

    def frozen(self) -> bool:
        if self._v2 is not None:
            return "frozen 1" in _text(self._v2 / "cgroup.events")
        return _text(self._v1["freezer"] / "freezer.state") == "FROZEN"

    # Ending

    def kill(self) -> None:
        """SIGKILL to every member, frozen or not. Nothing happens when the cgroup is not there."""
        if self._v2 is not None and (self._v2 / "cgroup.kill").exists():
            with contextlib.suppress(FileNotFoundError):
                (self._v2 / "cgroup.kill").write_text("1")
            return
        # Linux before 5.14, and v1. Frozen, nobody makes a child between our look and our signal.
        with contextlib.suppress(RuntimeFault):
            self.freeze(timeout_s=1.0)
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
        return _look_until(lambda: not self.pids(), timeout_s)

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
            with contextlib.suppress(ValueError):
                for line in _text(self._v2 / "cpu.stat").splitlines():
                    if line.startswith("usage_usec "):
                        return int(line.split()[1]) / 1e6
        nanoseconds = self._number("cpuacct", "", "cpuacct.usage") if "cpuacct" in self._v1 else None
        return None if nanoseconds is None else nanoseconds / 1e9

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


def _text(file: Path) -> str:
    """Without the line feed; empty when the file is not there."""
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace").strip()
    return ""


def _look_until(condition: Callable[[], bool], timeout_s: float, again: Callable[[], None] | None = None) -> bool:
    """Whether ``condition`` came true in time; ``again`` is done before every further look."""
    deadline = time.monotonic() + timeout_s
    pause = FIRST_LOOK_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_LOOK_S)
        if again:
            again()
    return True


def _make_directory(path: Path) -> None:
    for _ in range(CREATE_ATTEMPTS):
        try:
            path.mkdir(parents=True, exist_ok=True)
            return
        except OSError as error:
            failed = error.errno or 0
            # The last container of another command went, and the parent with it; or it is there, and gone at a look.
            if failed not in (errno.ENOENT, errno.EEXIST):
                break
    raise KernelCallFailed("mkdir", str(path), failed)


def _remove_directory(path: Path) -> None:
    """Raises KernelCallFailed when there are members still."""
    failed = 0

    def gone() -> bool:
        nonlocal failed
        try:
            path.rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            failed = error.errno or 0
            return False
        return True

    # The kernel counts a killed member until it is reaped.
    if not _look_until(gone, REMOVE_TIMEOUT_S):
        raise KernelCallFailed("rmdir", str(path), failed, hint="a process is in it still")
