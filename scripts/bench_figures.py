"""What ``scripts/bench --figures`` runs: what a pre-copy costs beside its blackout, against its goals.

One line of JSON for each figure: {"figure", "median", "runs", "goal", "met"}. Each run moves a container once;
everything that a run compares is from that run.

throughput  steps a second of a busy program from the first round to the freeze, as a share of those before the move
p99         Redis' 99th percentile from the begin of the move to the last page, without the blackout, by that before;
            p99_prepare, p99_rounds, p99_after (the freeze): of its parts
target      most memory on the target at once, beyond 1.15 of the container: the container, stores, our processes
source      most memory of the mover; agent: of the target's session
traffic     bytes of pages sent, by the container's own memory and what was written meanwhile
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrate.lab.cgroups import find_hierarchies
from migrate.lab.lab import Lab
from migrate.lab.plan import CGROUP_ROOT
from migrate.serve import SESSION_COMM

MIB = 1 << 20
TOP = Path(__file__).resolve().parents[1]
WORKLOADS = TOP / "tests" / "workloads"
NAME = "figures"
SAMPLE_S = 0.02
BEFORE_S = 3.0
TIMEOUT_S = 300.0
REDIS_VALUES, REDIS_VALUE_BYTES = 4096, 64 << 10
"""256 MiB."""
GOALS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "throughput": ("at least 0.85", lambda value: value >= 0.85),
    **{name: ("at most 2", lambda value: value <= 2) for name in ("p99", "p99_prepare", "p99_rounds", "p99_after")},
    "target": ("at most 100 MiB", lambda value: value <= 100),
    "source": ("at most 100 MiB", lambda value: value <= 100),
    "agent": ("at most 100 MiB", lambda value: value <= 100),
    "traffic": ("at most 1.05", lambda value: value <= 1.05),
}


@dataclass(kw_only=True)
class Seen:
    """One move: lines of ``move --json`` with the wall clock at which each came, and the most memory of each kind."""

    began: float = 0.0
    lines: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    peaks_bytes: dict[str, int] = field(default_factory=dict)
    ended: float = 0.0

    @property
    def report(self) -> dict[str, Any]:
        return self.lines[-1][1]

    def rounds(self) -> list[dict[str, Any]]:
        return [line for _at, line in self.lines if line["type"] == "round-ended"]

    def at(self, phase: str) -> float:
        return next(at for at, line in self.lines if line["type"] == "phase-started" and line["name"] == phase)

    def note(self, kind: str, size_bytes: int) -> None:
        self.peaks_bytes[kind] = max(size_bytes, self.peaks_bytes.get(kind, 0))


class Figures:
    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def run(self, host: str, *argv: str) -> str:
        done = self._lab.exec(
            host, list(argv), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)} on {host}: {done.returncode}\n{done.stdout}{done.stderr}")
        return str(done.stdout)

    @contextmanager
    def container(self, *command: str) -> Iterator[str]:
        words = ("--rootfs", "host", "-v", f"{WORKLOADS}:/workloads:ro", "-e", "PYTHONDONTWRITEBYTECODE=1", "--")
        identity = self.run("host1", "cmigrate", "run", "-d", "--name", NAME, *words, *command).split()[-1]
        try:
            yield identity
        finally:
            for host in ("host1", "host2"):
                self._lab.exec(host, ["cmigrate", "rm", "-f", NAME], capture_output=True, stdin=subprocess.DEVNULL)

    def move(self, identity: str, *, watched: bool = False) -> Seen:
        """``watched``: sees how much memory is taken, which costs a quarter of a processor."""
        seen = Seen(began=time.time())
        words = ["cmigrate", "move", NAME, "--to", "host2", "--mode", "precopy", "--transport", "stream", "--json"]
        over = threading.Event()
        process = self._lab.popen("host1", words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        watcher = threading.Thread(target=self._watch, args=(process.pid, identity, seen, over))
        if watched:
            watcher.start()
        try:
            assert process.stdout is not None
            with process.stdout:
                seen.lines = [(time.time(), json.loads(line)) for line in process.stdout]
            if process.wait(TIMEOUT_S):
                raise RuntimeError(f"the move failed: {seen.lines[-1:]}")
        finally:
            seen.ended = time.time()
            over.set()
            if watched:
                watcher.join()
        return seen

    def _watch(self, mover: int, identity: str, seen: Seen, over: threading.Event) -> None:
        """Samples: what is taken for less than 20 ms may be missed, but for the processes' own peaks."""
        holder = self._lab.host("host2").holder.pid
        network = os.stat(f"/proc/{holder}/ns/net").st_ino
        while not over.wait(SAMPLE_S):
            seen.note("source", status_bytes(mover, "VmHWM"))
            ours = [pid for pid in pids() if in_network(pid, network)]
            sessions = [pid for pid in ours if comm(pid) == SESSION_COMM]
            for pid in sessions:
                seen.note("agent", status_bytes(pid, "VmHWM"))
            anonymous = sum(status_bytes(pid, "RssAnon") for pid in ours)
            seen.note("target", container_bytes("host2", identity) + anonymous + store_bytes(sessions))

    # What each run gives

    @contextmanager
    def busy(self, mib: int) -> Iterator[str]:
        with self.container("python3", "/workloads/rate.py", str(mib), "16") as identity:
            deadline = time.monotonic() + TIMEOUT_S
            while "ready" not in self.run("host1", "cmigrate", "logs", NAME):
                if time.monotonic() > deadline:
                    raise RuntimeError("the workload does not become ready")
                time.sleep(0.1)
            time.sleep(BEFORE_S)
            yield identity

    def throughput(self, mib: int) -> dict[str, float]:
        with self.busy(mib) as identity:
            seen = self.move(identity)
            rates = self.run("host2", "cmigrate", "exec", NAME, "cat", "/rates.jsonl")
        lines = [json.loads(line) for line in rates.splitlines()]
        frozen_at = seen.at("rounds") + phase_s(seen, "rounds")
        before = rate(lines, seen.began - BEFORE_S, seen.began)
        return {"throughput": rate(lines, seen.at("rounds"), frozen_at) / before}

    def memory(self, mib: int) -> dict[str, float]:
        with self.busy(mib) as identity:
            memory_bytes = container_bytes("host1", identity)
            before_container = target_before(self._lab)
            seen = self.move(identity, watched=True)
        rounds, sent = seen.rounds(), seen.report["sent_bytes"]["pages"]
        # What the last round found goes in the freeze, with what was written after that.
        frozen_bytes = sent - sum(line["sent_bytes"] for line in rounds)
        dirtied = frozen_bytes + sum(line["dirty_bytes"] for line in rounds[:-1])
        return {
            "target": (seen.peaks_bytes["target"] - before_container - 1.15 * memory_bytes) / MIB,
            "source": seen.peaks_bytes["source"] / MIB,
            "agent": seen.peaks_bytes["agent"] / MIB,
            "traffic": sent / (memory_bytes + dirtied),
        }

    def redis(self) -> dict[str, float]:
        command = ("redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no")
        with self.container(*command) as identity:
            spec = json.loads(self.run("host1", "cmigrate", "inspect", NAME))["spec"]
            address = spec["network"]["address"].partition("/")[0]
            with asking(self._lab, address) as end:
                time.sleep(BEFORE_S)
                seen = self.move(identity)
                asked = end()
        blackout = max((one for one in asked if seen.began <= one[0] < seen.ended), key=lambda one: one[1])
        asked.remove(blackout)
        first = seen.at("rounds")
        last = first + phase_s(seen, "rounds")
        before = p99(asked, seen.began - BEFORE_S, seen.began)
        return {
            "p99": p99(asked, seen.began, seen.ended) / before,
            "p99_prepare": p99(asked, seen.began, first) / before,
            "p99_rounds": p99(asked, first, last) / before,
            "p99_after": p99(asked, last, seen.ended) / before,
        }


@contextmanager
def asking(lab: Lab, address: str) -> Iterator[Callable[[], list[tuple[float, float]]]]:
    """A client that asks a full Redis each millisecond. The function ends it: (when, seconds until the answer) of each
    question."""
    words = [sys.executable, "-m", "scripts.figures_client", address, str(REDIS_VALUES), str(REDIS_VALUE_BYTES)]
    process = lab.popen("client", words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TOP)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def end() -> list[tuple[float, float]]:
        stdin.close()
        return [(at, took) for at, took in json.loads(stdout.readline())["asked"]]

    try:
        if "filled" not in stdout.readline():
            raise RuntimeError("Redis can not be filled")
        yield end
    finally:
        stdin.close()
        stdout.close()
        process.wait(TIMEOUT_S)


def rate(lines: list[dict[str, Any]], start: float, end: float) -> float:
    """Steps a second of what was noted within."""
    within = [line for line in lines if start <= line["at"] <= end]
    if len(within) < 3:
        raise RuntimeError("too little was noted in that time: give the container more memory")
    steps, seconds = sum(line["steps"] for line in within[1:]), within[-1]["at"] - within[0]["at"]
    return float(steps / seconds)


def phase_s(seen: Seen, name: str) -> float:
    return float(next(phase["ms"] for phase in seen.report["phases"] if phase["name"] == name)) / 1000


def p99(asked: list[tuple[float, float]], start: float, end: float) -> float:
    took = sorted(seconds for at, seconds in asked if start <= at < end)
    return took[min(len(took) - 1, int(len(took) * 0.99))]


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def in_network(pid: int, inode: int) -> bool:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/net").st_ino == inode
    return False


def comm(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def status_bytes(pid: int, name: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0


def store_bytes(sessions: list[int]) -> int:
    """Memory files, each once, however many descriptors there are."""
    found: dict[int, int] = {}
    for pid in sessions:
        with suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("/memfd:"):
                        status = os.stat(f"/proc/{pid}/fd/{fd}")
                        found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def container_bytes(host: str, identity: str) -> int:
    """Private memory of everything in the container."""
    groups = find_hierarchies().unified.glob(f"{CGROUP_ROOT}/*/{host}/containers/{identity}/cgroup.procs")
    with suppress(OSError):
        return sum(status_bytes(int(pid), "RssAnon") for group in groups for pid in group.read_text().split())
    return 0


def target_before(lab: Lab) -> int:
    """Anonymous memory of the target's processes before anything comes."""
    network = os.stat(f"/proc/{lab.host('host2').holder.pid}/ns/net").st_ino
    return sum(status_bytes(pid, "RssAnon") for pid in pids() if in_network(pid, network))


def measure(lab: Lab, *, memory_mib: int, repeat: int) -> list[dict[str, Any]]:
    """Every figure's line."""
    figures = Figures(lab)
    runs: dict[str, list[float]] = {name: [] for name in GOALS}
    for number in range(repeat):
        for name, value in {**figures.throughput(memory_mib), **figures.memory(memory_mib), **figures.redis()}.items():
            runs[name].append(round(value, 3))
            print(f"{number + 1}/{repeat} {name}: {value:.3f} ({GOALS[name][0]})", file=sys.stderr, flush=True)
    return [
        {
            "figure": name,
            "median": statistics.median(values),
            "runs": values,
            "goal": GOALS[name][0],
            "met": GOALS[name][1](statistics.median(values)),
        }
        for name, values in runs.items()
    ]
