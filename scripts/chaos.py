"""What ``scripts/chaos`` runs: moves during which something dies, and a judge outside who counts.

The container sends a number a millisecond to the judge in the lab's client, each one more than the one before. A number
that comes twice, or after a larger one, means that two copies ran, or one from an old state. After each fault the next
command on each host settles what is open; then one host, and only one, must have the container running, and the
numbers must go on. At the end neither host may hold anything of it.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.lab import HOSTS, TwoHosts, lab_of_two_hosts, nothing_left_on

NAME = "counter"
PORT = 9999
SETTLE_S = 40.0
MOVE_TIMEOUT_S = 120.0
LINK_DOWN_S = 1.0
FROZEN_POLL_S = 0.0005
# A move of this container takes about a second, and its blackout a tenth.
WHOLE_MOVE_S = 1.2
BLACKOUT_S = 0.15
FAULTS = ("mover", "agent", "both", "criu-source", "criu-target", "interrupt", "link")
MODES = ("stopcopy", "diskless", "precopy")
COUNTER = """
import mmap, socket, sys, time
area = mmap.mmap(-1, 40 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(area), 4096):
    area[at:at + 8] = (at + 1).to_bytes(8, "little")
judge = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
number = 0
while True:
    number += 1
    area[number * 4096 % len(area) + 8:number * 4096 % len(area) + 16] = number.to_bytes(8, "little")
    try:
        judge.sendto(str(number).encode(), (sys.argv[1], 9999))
    except OSError:
        pass
    time.sleep(0.001)
"""
# Answers each line on stdin with what it has counted.
JUDGE = """
import json, select, socket, sys
inbox = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
inbox.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
inbox.bind(("", 9999))
last = count = 0
wrong = []
print("ready", flush=True)
while True:
    ready, _, _ = select.select([inbox, sys.stdin], [], [])
    if inbox in ready:
        number = int(inbox.recv(100))
        count += 1
        if number <= last:
            wrong.append([last, number])
        last = max(last, number)
    elif not sys.stdin.readline():
        break
    else:
        print(json.dumps({"last": last, "count": count, "wrong": wrong[:5], "wrongs": len(wrong)}), flush=True)
"""


class Judge:
    """Outside of both hosts."""

    def __init__(self, hosts: TwoHosts) -> None:
        self._process = hosts.lab.popen(
            "client",
            [sys.executable, "-c", JUDGE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@dataclass(kw_only=True)
class Case:
    """One move with one fault, and what came of it."""

    number: int
    mode: str
    transport: str
    fault: str
    frozen: bool
    """The fault waits for the freeze, and then ``delay_s``; else it is so long after the start."""
    delay_s: float
    exit_code: int = 0
    outcome: str = ""
    runs_on: str = ""
    settled_s: float = 0.0
    problems: list[str] = field(default_factory=list)


class Chaos:
    def __init__(self, hosts: TwoHosts, judge: Judge) -> None:
        self.hosts = hosts
        self.judge = judge
        self.at = HOSTS[0]

    def start(self) -> None:
        address = self.hosts.client.address
        python = os.path.realpath("/usr/bin/python3")
        self.hosts.cmigrate(
            self.at, "run", "-d", "--name", NAME, "--rootfs", "host", "--", python, "-I", "-c", COUNTER, address
        )
        self._wait(lambda: self.judge.ask()["count"] > 0, 10.0)

    def run(self, case: Case) -> None:
        target = HOSTS[1 - HOSTS.index(self.at)]
        words = ("move", NAME, "--to", target, "--mode", case.mode, "--transport", case.transport, "--json")
        mover = self.hosts.lab.popen(
            self.at,
            ["cmigrate", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        with mover:
            try:
                self._wait_for_moment(case, mover)
                with self._fault(case, mover, target):
                    out, err = mover.communicate(timeout=MOVE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                mover.kill()
                case.problems.append("the mover did not end")
                return
        case.exit_code = mover.returncode
        last = out.splitlines()[-1] if out else ""
        with contextlib.suppress(ValueError):
            case.outcome = str(json.loads(last).get("outcome", ""))
        # Ended by the signal itself: it came before any line of ours ran.
        if "Traceback" in err and mover.returncode != -signal.SIGINT:
            case.problems.append(err[-2000:])
        self._judge(case, last)

    def _wait_for_moment(self, case: Case, mover: subprocess.Popen[str]) -> None:
        if case.frozen:
            files = self._freezers()
            while mover.poll() is None and not any(_is_frozen(file) for file in files):
                time.sleep(FROZEN_POLL_S)
        time.sleep(case.delay_s)

    def _freezers(self) -> list[Path]:
        parent = self.hosts.config(self.at).cgroup_parent
        names = ("cgroup.events", "freezer.state")
        return [file for name in names for file in Path("/sys/fs/cgroup").glob(f"**/{parent}/*/{name}")]

    @contextlib.contextmanager
    def _fault(self, case: Case, mover: subprocess.Popen[str], target: str) -> Iterator[None]:
        if case.fault in ("mover", "both"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(mover.pid, signal.SIGKILL)
        if case.fault == "interrupt":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(mover.pid, signal.SIGINT)
        if case.fault in ("agent", "both"):
            self._kill(target, "serve", newest=True)
        if case.fault == "criu-source":
            self._kill(self.at, "swrk")
        if case.fault == "criu-target":
            self._kill(target, "swrk")
        if case.fault != "link":
            yield
            return
        self.hosts.lab.exec(target, ["ip", "link", "set", "uplink", "down"], check=True)
        time.sleep(LINK_DOWN_S)
        self.hosts.lab.exec(target, ["ip", "link", "set", "uplink", "up"], check=True)
        yield

    def _kill(self, host: str, word: str, *, newest: bool = False) -> None:
        """Processes of that host with this word among their arguments; with ``newest`` the oldest is left alone."""
        own = os.stat(f"/proc/{self.hosts.lab.host(host).holder.pid}/ns/net").st_ino
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                argv = Path(f"/proc/{int(entry)}/cmdline").read_bytes().split(b"\0")
                if word.encode() in argv and os.stat(f"/proc/{entry}/ns/net").st_ino == own:
                    found.append(int(entry))
        for pid in sorted(found)[1 if newest else 0 :]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _judge(self, case: Case, last: str) -> None:
        begin = time.monotonic()
        running: list[str] = []

        def settled() -> bool:
            nonlocal running
            for host in HOSTS:
                other = HOSTS[1 - HOSTS.index(host)]
                self.hosts.cmigrate(host, "move", NAME, "--to", other, "--mode", "diskless", "--dry-run", check=False)
            running = [host for host in HOSTS if self._status(host) == "running"]
            if len(running) != 1:
                return False
            before = self.judge.ask()["last"]
            time.sleep(0.3)
            return bool(self.judge.ask()["last"] > before)

        if not self._wait(settled, SETTLE_S):
            states = {host: self._status(host) for host in HOSTS}
            case.problems.append(f"not settled: {states}, numbers {self.judge.ask()}")
        case.settled_s = round(time.monotonic() - begin, 2)
        seen = self.judge.ask()
        if seen["wrongs"]:
            case.problems.append(f"two copies, or an old state: {seen['wrong']}")
        if running:
            case.runs_on = self.at = running[0]
        if (case.outcome, case.exit_code) == ("refused", 4):
            # Whatever was killed in the move before, nothing of it may be in the way of this one.
            case.problems.append(f"refused: {last[:1000]}")
        if case.outcome == "migrated" and not case.problems and len(running) == 1 and case.exit_code not in (0, -9):
            case.problems.append(f"migrated, and exit code {case.exit_code}")

    def _status(self, host: str) -> str:
        found = [line for line in self.hosts.lines(host, "ps", "-a", "--json") if line.get("name") == NAME]
        return str(found[0]["status"]) if found else ""

    @staticmethod
    def _wait(condition: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.2)
        return True

    def remove(self) -> None:
        for host in HOSTS:
            self.hosts.cmigrate(host, "rm", "-f", NAME, check=False)


def _is_frozen(file: Path) -> bool:
    with contextlib.suppress(OSError):
        text = file.read_text()
        return "frozen 1" in text or text.strip() in ("FROZEN", "FREEZING")
    return False


def cases(count: int, seed: int, modes: list[str], faults: list[str]) -> Iterator[Case]:
    """Every fault with every mode in turn; moments and transports by chance."""
    chance = random.Random(seed)
    pairs = [(mode, fault) for fault in faults for mode in modes]
    for number in range(count):
        mode, fault = pairs[number % len(pairs)]
        frozen = chance.random() < 0.7
        yield Case(
            number=number,
            mode=mode,
            transport=chance.choice(("stream", "ssh")),
            fault=fault,
            frozen=frozen,
            delay_s=round(chance.uniform(0, BLACKOUT_S if frozen else WHOLE_MOVE_S), 4),
        )


def run_cases(hosts: TwoHosts, wanted: Iterator[Case], tell: Callable[[Case], None]) -> list[Case]:
    """All of them on one lab, stopped by none; leaves nothing on the hosts, or says what."""
    done: list[Case] = []
    judge = Judge(hosts)
    chaos = Chaos(hosts, judge)
    try:
        with nothing_left_on(hosts, *HOSTS):
            chaos.start()
            try:
                for case in wanted:
                    chaos.run(case)
                    done.append(case)
                    tell(case)
                    if case.problems and not case.runs_on:
                        break
            finally:
                chaos.remove()
    except AssertionError as error:
        done.append(Case(number=-1, mode="", transport="", fault="", frozen=False, delay_s=0, problems=[str(error)]))
    finally:
        judge.close()
    return done


def summary(done: list[Case]) -> dict[str, Any]:
    return {
        "moves": sum(case.number >= 0 for case in done),
        "problems": sum(bool(case.problems) for case in done),
        "outcomes": dict(Counter(case.outcome or "killed" for case in done if case.number >= 0)),
        "longest_settled_s": max((case.settled_s for case in done), default=0.0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=int, default=100, metavar="N", help="moves")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modes", default=",".join(MODES), metavar="MODE,MODE")
    parser.add_argument("--faults", default=",".join(FAULTS), metavar="FAULT,FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each move")
    asked = parser.parse_args()
    modes, faults = asked.modes.split(","), asked.faults.split(",")
    if unknown := [fault for fault in faults if fault not in FAULTS]:
        parser.error(f"no fault {unknown[0]!r}")

    def tell(case: Case) -> None:
        if asked.json:
            print(json.dumps(vars(case)), flush=True)
        moment = f"{'frozen' if case.frozen else 'start'} + {case.delay_s * 1000:.0f} ms"
        print(
            f"{case.number:5} {case.mode:9} {case.transport:7} {case.fault:12} {moment:18} -> {case.exit_code:4} "
            f"{case.outcome or '-':12} on {case.runs_on or 'nowhere'}, settled in {case.settled_s:.1f} s "
            + "; ".join(case.problems),
            file=sys.stderr,
            flush=True,
        )

    with (
        tempfile.TemporaryDirectory(prefix="cmigrate-chaos-", dir="/var/tmp") as directory,
        lab_of_two_hosts(Path(directory)) as hosts,
    ):
        done = run_cases(hosts, cases(asked.n, asked.seed, modes, faults), tell)
    found = summary(done)
    for case in done:
        if case.number < 0:
            print(case.problems[0], file=sys.stderr)
    print(json.dumps(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
