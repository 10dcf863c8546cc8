"""What ``scripts/bench`` runs: how long a move's blackout is, and how long plain CRIU with tar takes for the same.

One line of JSON for each memory size, mode and transport; mode ``plain`` is criu dump | tar | criu restore between the
same two lab hosts, measured in turn with the moves so that a busy moment of the machine hits both:
{"memory_mib", "mode", "transport", "blackout_ms", "total_ms", "paused_ms", "ratio_blackout", "ratio_paused", "phases",
"runs"}, where "phases" are the milliseconds of each in a move's report.

Figures are medians of "runs". ``blackout_ms`` is what the move reports, and for plain CRIU the time frozen that CRIU
itself counts plus everything up to the end of the restore. ``paused_ms`` is measured by the moved program itself, in
both cases the same way: the step of the wall clock between two rounds of its loop of 1 ms. A ratio says how many times
longer the plain way takes. The program holds random memory and writes to 1000 pages of it each second.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from migrate.lab.lab import Lab
from migrate.plan import NEED_CONSENT
from runtime.errors import RuntimeFault
from scripts.bench_figures import measure as measure_figures

TOP = Path(__file__).resolve().parents[1]
WORKLOAD = TOP / "tests" / "workloads"
LAB_DIR = Path("/var/lib/cmigrate-bench")
NAME = "bench"
HOT_MIB = 16
WRITES_PER_S = 1000
PLAIN = ("plain", "tar")
STEP_TIMEOUT_S = 300
SETTLE_S = 0.5

console = Console(stderr=True)


class BenchFailed(Exception):
    """A measurement could not be taken; the text is for the operator."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One move, or one plain transfer, in milliseconds; ``phases`` are a move's."""

    blackout_ms: float
    total_ms: float
    paused_ms: float
    phases: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, float]:
        figures = {"blackout_ms": self.blackout_ms, "total_ms": self.total_ms, "paused_ms": self.paused_ms}
        return {name: round(value, 1) for name, value in figures.items()}


class Bench:
    def __init__(self, lab: Lab, memory_mib: int) -> None:
        self._lab = lab
        self.memory_mib = memory_mib

    def _output(self, host: str, *argv: str) -> str:
        done = self._lab.exec(
            host,
            list(argv),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=STEP_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise BenchFailed(f"{' '.join(argv)} on {host}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return str(done.stdout)

    @contextlib.contextmanager
    def _container(self, host: str) -> Iterator[None]:
        self._output(
            host, "cmigrate", "run", "-d", "--name", NAME, "--rootfs", "host", "-v", f"{WORKLOAD}:/workloads:ro",
            "-e", "PYTHONDONTWRITEBYTECODE=1", "--",
            "python3", "/workloads/memory.py", str(self.memory_mib), str(HOT_MIB), str(WRITES_PER_S), "7000",
        )  # fmt: skip
        try:
            deadline = time.monotonic() + STEP_TIMEOUT_S
            while "ready" not in self._output(host, "cmigrate", "logs", NAME):
                if time.monotonic() > deadline:
                    raise BenchFailed("the workload does not become ready")
                time.sleep(0.1)
            yield
        finally:
            for name in ("host1", "host2"):
                self._lab.exec(
                    name,
                    ["cmigrate", "rm", "-f", NAME],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    stdin=subprocess.DEVNULL,
                )

    def move(self, mode: str, transport: str) -> Run:
        with self._container("host1"):
            words = ["cmigrate", "move", NAME, "--to", "host2", "--mode", mode, "--transport", transport, "--json"]
            shown = self._output("host1", *words, *(["--allow-postcopy"] if mode in NEED_CONSENT else []))
            report = json.loads(shown.splitlines()[-1])
            time.sleep(SETTLE_S)
            pauses = self._output("host2", "cmigrate", "exec", NAME, "cat", "/pauses.jsonl")
            return Run(
                blackout_ms=report["blackout_ms"],
                total_ms=report["total_ms"],
                paused_ms=longest_pause(pauses),
                phases={phase["name"]: phase["ms"] for phase in report["phases"]},
            )

    def plain(self) -> Run:
        """criu dump on host1's tmpfs, tar over TCP, criu restore from host2's tmpfs."""
        with self._container("host1"), contextlib.ExitStack() as undo:
            source, target = self._start("host1", "source", undo), self._start("host2", "target", undo)
            tell(source, {"name": NAME})
            tell(target, hear(source))
            port = hear(target)["port"]
            time.sleep(SETTLE_S)
            tell(source, {"address": self._lab.host("host2").address, "port": port})
            dumped, restored = hear(source), hear(target)
            time.sleep(SETTLE_S)
            pauses = Path(f"/proc/{restored['init_pid']}/root/pauses.jsonl").read_text()
            tell(target, {})
            if target.wait(STEP_TIMEOUT_S) + source.wait(STEP_TIMEOUT_S) != 0:
                raise BenchFailed("the plain way did not tidy up")
            return Run(
                blackout_ms=(dumped["frozen_s"] + restored["restored"] - dumped["dumped"]) * 1000,
                total_ms=(restored["restored"] - dumped["begin"]) * 1000,
                paused_ms=longest_pause(pauses),
            )

    def _start(self, host: str, end: str, undo: contextlib.ExitStack) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = self._lab.popen(
            host,
            [sys.executable, "-m", "scripts.bench_baseline", end],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TOP,
        )
        undo.enter_context(process)
        undo.callback(process.terminate)
        return process


def tell(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchFailed(f"{process.args!r} ended early; the lines above say why")
    message: dict[str, Any] = json.loads(line)
    return message


def longest_pause(jsonl: str) -> float:
    """The one that was the move: others are the machine's own and shorter, or the comparison would be pointless."""
    return max((float(json.loads(line)["pause_ms"]) for line in jsonl.splitlines()), default=0.0)


def measure(bench: Bench, ways: list[tuple[str, str]], repeat: int) -> dict[tuple[str, str], list[Run]]:
    """In turn, so that a busy moment of the machine does not hit one way alone."""
    runs: dict[tuple[str, str], list[Run]] = {way: [] for way in ways}
    for number in range(repeat):
        for way in ways:
            run = bench.plain() if way == PLAIN else bench.move(*way)
            runs[way].append(run)
            console.print(
                f"{bench.memory_mib:5} MiB, {number + 1}/{repeat}, {way[0]} {way[1]}: "
                f"blackout {run.blackout_ms:.0f} ms, total {run.total_ms:.0f} ms, paused {run.paused_ms:.0f} ms",
                highlight=False,
            )
    return runs


def summarise(memory_mib: int, runs: dict[tuple[str, str], list[Run]]) -> list[dict[str, Any]]:
    """One JSON value for each way, with medians and ratios to the plain one."""

    def median(way: tuple[str, str], figure: str) -> float:
        return statistics.median(run.to_json()[figure] for run in runs[way])

    return [
        {
            "memory_mib": memory_mib,
            "mode": way[0],
            "transport": way[1],
            **{figure: round(median(way, figure), 1) for figure in ("blackout_ms", "total_ms", "paused_ms")},
            "ratio_blackout": round(median(PLAIN, "blackout_ms") / median(way, "blackout_ms"), 2),
            "ratio_paused": round(median(PLAIN, "paused_ms") / median(way, "paused_ms"), 2),
            "phases": {
                name: round(statistics.median(run.phases.get(name, 0.0) for run in runs[way]), 1)
                for name in runs[way][0].phases
            },
            "runs": [run.to_json() for run in runs[way]],
        }
        for way in runs
    ]


def show(lines: list[dict[str, Any]]) -> None:
    title = "medians in ms; a ratio is plain CRIU's figure divided by this one"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("MiB", "mode", "transport"):
        table.add_column(name)
    figures = ("blackout_ms", "ratio_blackout", "paused_ms", "ratio_paused", "total_ms")
    for name in ("blackout", "ratio", "paused", "ratio", "total"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            str(line["memory_mib"]), line["mode"], line["transport"], *(f"{line[figure]:.1f}" for figure in figures)
        )
    console.print(table)


@contextlib.contextmanager
def lab_hosts() -> Iterator[Lab]:
    LAB_DIR.mkdir(parents=True, exist_ok=True)
    lock = os.open(LAB_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BenchFailed("another bench runs on this machine: figures of two at once would be worth nothing") from None
    lab = Lab(LAB_DIR / "lab")
    lab.down()  # what a killed run left
    try:
        lab.up()
        yield lab
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lab.down()
        shutil.rmtree(LAB_DIR, ignore_errors=True)
        os.close(lock)


def on_term(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Moves against plain criu dump, tar, restore.")
    parser.add_argument("--quick", action="store_true", help="64 MiB, three times each, stream only")
    parser.add_argument("--memory-mib", type=words, default=["64", "256", "1024"], metavar="N,N")
    parser.add_argument("--modes", type=words, default=["stopcopy", "diskless", "precopy"], metavar="MODE,MODE")
    parser.add_argument("--transports", type=words, default=["stream", "ssh"], metavar="NAME,NAME")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--figures", action="store_true", help="what a pre-copy costs beside its blackout, instead")
    options = parser.parse_args()
    if options.quick:
        options.memory_mib, options.transports, options.repeat = ["64"], ["stream"], 3
    signal.signal(signal.SIGTERM, on_term)
    ways = [PLAIN, *((mode, transport) for mode in options.modes for transport in options.transports)]
    results = []
    try:
        with lab_hosts() as lab:
            if options.figures:
                for line in measure_figures(lab, memory_mib=int(options.memory_mib[-1]), repeat=options.repeat):
                    print(json.dumps(line), flush=True)
                return 0
            for memory_mib in map(int, options.memory_mib):
                lines = summarise(memory_mib, measure(Bench(lab, memory_mib), ways, options.repeat))
                for line in lines:
                    print(json.dumps(line), flush=True)
                results += lines
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    except (BenchFailed, RuntimeFault) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
