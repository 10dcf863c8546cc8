"""What ``scripts/demo`` runs after the set-up: two lab hosts, a busy Redis, a move in each mode over each transport.

Tables and progress are for people; the last line of stdout is one JSON value:
{"moves": [{"mode", "transport", "outcome", "blackout_ms", "downtime_ms", "total_ms", "requests", "requests_failed",
"connections_reset"}, ...]}. Exits 0 only if every move ended with the container on the target, every value was still
there and the client's connection was the one it had opened at the start.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from migrate.lab.lab import Lab
from migrate.plan import MODES, NEED_CONSENT
from runtime.errors import RuntimeFault

TOP = Path(__file__).resolve().parents[1]
# Its own place, so that a lab in use on this machine is neither seen nor touched; a fixed one, so that what a killed
# demo left is found and removed by the next.
LAB_DIR = Path("/var/lib/cmigrate-demo")
NAME = "web1"
TRANSPORTS = ("ssh", "stream")
# Long enough to see a client that waits for its second retransmission.
SETTLE_S = 2.0
STEP_TIMEOUT_S = 120.0

console = Console(width=None if sys.stdout.isatty() else 120)


def consent(mode: str) -> list[str]:
    return ["--allow-postcopy"] if mode in NEED_CONSENT else []


class DemoFailed(Exception):
    """Something did not do what it is for; the text is for the operator."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move's report, what the probe saw meanwhile, and what the client found afterwards."""

    mode: str
    transport: str
    exit_code: int
    report: dict[str, Any]
    seen: dict[str, Any]
    found: dict[str, Any]

    @property
    def good(self) -> bool:
        return (
            self.exit_code == 0
            and self.report.get("outcome") == "migrated"
            and self.found.get("wrong") == 0
            and bool(self.found.get("same_connection"))
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "transport": self.transport,
            "outcome": self.report.get("outcome"),
            "blackout_ms": self.report.get("blackout_ms"),
            "downtime_ms": self.seen["downtime_ms"],
            "total_ms": self.report.get("total_ms"),
            "requests": self.seen["requests"],
            "requests_failed": self.seen["failed"],
            "connections_reset": self.seen["resets"],
        }


class Conversation:
    """A program in the client's network that answers with lines of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise DemoFailed(f"{self.process.args!r} ended early")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Demo:
    def __init__(self, lab: Lab, memory_mib: int) -> None:
        self._lab = lab
        self._memory_mib = memory_mib
        self._undo = ExitStack()
        self._seen: list[str] = []

    def __enter__(self) -> "Demo":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._undo.close()

    def cmigrate(self, host: str, *arguments: str) -> str:
        """Run a command that must succeed; its standard output."""
        done = self._lab.exec(
            host, ["cmigrate", *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        if done.returncode != 0:
            raise DemoFailed(f"cmigrate {' '.join(arguments)} on {host}: exit code {done.returncode}")
        return str(done.stdout)

    def _talk_to(self, *module: str) -> Conversation:
        process = self._lab.popen(
            "client",
            [sys.executable, "-m", *module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TOP,
            start_new_session=True,  # Ctrl-C is for us; we end it
        )
        conversation = Conversation(process)
        self._undo.callback(conversation.end)
        return conversation

    def start(self) -> None:
        self.cmigrate(
            "host1", "run", "-d", "--name", NAME, "--rootfs", "host", "-w", "/var/lib/redis", "--memory", "512m", "--",
            "redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no",
        )  # fmt: skip
        inspected = json.loads(self.cmigrate("host1", "inspect", NAME))
        address = str(inspected["spec"]["network"]["address"]).partition("/")[0]
        say(f"{NAME} runs on host1 with address {address}: filling Redis with {self._memory_mib} MiB")
        self._client = self._talk_to("scripts.demo_client", address, str(self._memory_mib))
        keys = self._client.hear()["filled"]
        say(f"{keys} keys are in; a client keeps its connection, a probe sends INCR every millisecond over another one")
        self._probe = self._talk_to("migrate.probe", "redis", f"{address}:6379")
        time.sleep(0.5)

    def move(self, mode: str, transport: str, source: str, target: str) -> Move:
        say(f"[bold]{source} -> {target}: --mode {mode} --transport {transport}[/bold]")
        self._mark()
        words = ["cmigrate", "move", NAME, "--to", target, "--mode", mode, "--transport", transport, *consent(mode)]
        done = self._lab.exec(source, words)
        kept = self.cmigrate(source, "history", "--json", "-n", "1").splitlines()
        report: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        if report.get("id") not in {None, *self._seen}:
            self._seen.append(report["id"])
            self._lab.exec(source, ["cmigrate", "report", report["id"]])
        else:
            report = {}  # refused before there was anything to report; the error is on the screen
        time.sleep(SETTLE_S)
        move = Move(
            mode=mode,
            transport=transport,
            exit_code=done.returncode,
            report=report,
            seen=self._mark(),
            found=self._client.ask(),
        )
        show_client(move)
        return move

    def _mark(self) -> dict[str, Any]:
        """What the probe has seen since the last mark."""
        self._probe.process.send_signal(signal.SIGUSR1)
        return self._probe.hear()


def say(text: str) -> None:
    console.print(f"demo: {text}", highlight=False, soft_wrap=True)


def show_client(move: Move) -> None:
    seen, found = move.seen, move.found
    table = Table(title="what the client saw", title_justify="left", show_header=False)
    table.add_row("longest gap", f"{seen['longest_gap_ms']:.1f} ms")
    table.add_row("requests", f"{seen['requests']}, {seen['failed']} failed, {seen['out_of_sequence']} out of sequence")
    table.add_row("connection", "the same" if found["same_connection"] and not seen["resets"] else "broken")
    table.add_row("data", f"{found['keys']} values compared, {found['wrong']} wrong")
    console.print(table)


def show_summary(moves: list[Move]) -> None:
    table = Table(title="all moves (times in ms)", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("mode", "transport", "outcome"):
        table.add_column(name)
    for name in ("blackout", "downtime", "total", "requests", "failed", "resets"):
        table.add_column(name, justify="right")
    for move in moves:
        figures = move.to_json().values()
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in figures))
    console.print(table)


@contextlib.contextmanager
def only_one_demo() -> Iterator[None]:
    LAB_DIR.mkdir(parents=True, exist_ok=True)
    lock = os.open(LAB_DIR, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DemoFailed("another demo runs on this machine: wait for it to end") from None
    finally:
        os.close(lock)


@contextlib.contextmanager
def lab_hosts() -> Iterator[Lab]:
    lab = Lab(LAB_DIR / "lab")
    lab.down()  # what a killed demo left
    try:
        begin = time.monotonic()
        lab.up()
        say(f"two lab hosts and a client are up after {time.monotonic() - begin:.1f} s")
        yield lab
    finally:
        # A second Ctrl-C must not stop the tidying up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lab.down()
        shutil.rmtree(LAB_DIR, ignore_errors=True)


def run(memory_mib: int) -> list[Move]:
    moves: list[Move] = []
    with only_one_demo(), lab_hosts() as lab, Demo(lab, memory_mib) as demo:
        demo.start()
        source, target = "host1", "host2"
        for mode in MODES:
            for transport in TRANSPORTS:
                move = demo.move(mode, transport, source, target)
                moves.append(move)
                if move.exit_code == 0:
                    source, target = target, source
    return moves


def on_term(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A busy Redis moves between two lab hosts.")
    parser.add_argument("--memory-mib", type=int, default=64, help="how much is put into Redis (default 64)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, on_term)
    try:
        moves = run(options.memory_mib)
    except KeyboardInterrupt:
        print("demo: interrupted; everything it had made is gone", file=sys.stderr)
        return 130
    except (DemoFailed, RuntimeFault) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    show_summary(moves)
    print(json.dumps({"moves": [move.to_json() for move in moves]}), flush=True)
    return 0 if all(move.good for move in moves) else 1


if __name__ == "__main__":
    sys.exit(main())
