"""What ``scripts/chaos`` runs: moves during which something dies, and a judge outside who counts.

The container sends a number a millisecond to the judge in the lab's client, each one more than the one before, and
looks after its own memory (chaos_judge.py). Processes are killed and links cut at the boundaries of a move's phases and
in between (chaos_faults.py). After each fault the next command on each host settles what is open; then one host, and
only one, must have the container running, the numbers must go on, and both hosts must look as they did before.

Only where memory follows after the switch may the container be lost, by the death of one who has a part in that and not
by its link's: it must then be so on both hosts, and told.
"""

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.chaos_faults import (
    FAULTS,
    MOMENTS,
    NOT_IN_A_WINDOW,
    WINDOW_RECORDS,
    Going,
    fault,
    known_journals,
)
from scripts.chaos_judge import NAME, Judge, Pictures, run_counter
from tests.support.lab import HOSTS, TwoHosts, lab_of_two_hosts, nothing_left_on

SETTLE_S = 60.0
MOVE_TIMEOUT_S = 240.0
GRACE_S, LINK_GRACE_S = 30.0, 60.0
"""In which processes end."""
# A move of this container takes about a second, and its blackout a tenth.
WHOLE_MOVE_S = 1.2
BLACKOUT_S = 0.15
AFTER_RECORD_S = 0.03
MODES = ("stopcopy", "diskless", "precopy", "postcopy", "hybrid")
CONSENT = {"postcopy", "hybrid"}
MENDED = ("sshd", "reset", "link", "agent")
"""Before the freeze none of these ends a move."""
REFILLED = ("sshd", "reset", "link")
"""Nor any of these after the switch, while memory follows."""
STARTED = ("COMMIT_LOGGED", "RESUMED", "CONFIRMED")
RUNNING, KEPT, GONE = "running", "kept", ("", "moved", "exited", "stopped")
WINDOW = ("--undo-window", "900")


@dataclass(kw_only=True)
class Case:
    """One move with one fault, and what came of it."""

    number: int
    mode: str
    transport: str
    fault: str
    moment: str
    """The fault comes ``delay_s`` after it."""
    delay_s: float
    hit: list[str] = field(default_factory=list)
    """What it met: nothing when the move was over, or no such process there, by then."""
    exit_code: int = 0
    outcome: str = ""
    runs_on: str = ""
    lost: bool = False
    settled_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def takes_back(self) -> bool:
        """The fault comes while it is taken back after a move without one."""
        return self.moment in WINDOW_RECORDS and self.moment != "KEEPING"

    @property
    def may_be_lost(self) -> bool:
        """Once it has run on the target; the pager is the one whose death that is in every mode."""
        return (self.mode in CONSENT and self.fault not in REFILLED) or self.fault == "pager"


class Chaos:
    def __init__(self, hosts: TwoHosts, judge: Judge) -> None:
        self.hosts = hosts
        self.judge = judge
        self.pictures = Pictures(hosts)
        self.at = HOSTS[0]
        self.id = ""
        self.life = 0
        self._log_ends: dict[Path, int] = {}

    @property
    def other(self) -> str:
        return HOSTS[1 - HOSTS.index(self.at)]

    def start(self) -> None:
        """A new container, which has been on both hosts when this returns: how they look with it is known then."""
        self.life += 1
        self.at = HOSTS[0]
        self.id = run_counter(self.hosts, self.at, self.life)
        self._must_go_on()
        self.pictures.learn(self.id, "")
        for _way in range(2):
            self.hosts.cmigrate(self.at, "move", NAME, "--to", self.other, "--mode", "precopy")
            self.at = self.other
            self._must_go_on()
            self.pictures.learn(self.id, self.at)

    def _must_go_on(self) -> None:
        assert self.judge.goes_on(20.0), "the container sends no numbers"

    def run(self, case: Case) -> None:
        consent = ("--allow-postcopy",) if case.mode in CONSENT else ()
        words: tuple[str, ...] = ("move", NAME, "--to", self.other, "--mode", case.mode, "--transport", case.transport)
        words = (*words, "--json", *consent, *(WINDOW if case.moment in WINDOW_RECORDS else ()))
        self._new_lines_of_agents()
        known = known_journals(self.hosts, *HOSTS)
        if case.takes_back:
            self.hosts.cmigrate(self.at, *words)
            self._must_go_on()
            self.judge.may_go_back(True)
            words = ("undo", NAME)
        going = Going(self.hosts, self.at, self.other, words, known)
        try:
            if going.wait_for(case.moment):
                time.sleep(case.delay_s)
                with fault(self.hosts, going, case.fault) as case.hit:
                    pass
        finally:
            if not going.wait(MOVE_TIMEOUT_S):
                case.problems.append("the mover did not end")
        case.exit_code = going.process.returncode
        if case.takes_back:
            case.outcome = "returned" if case.exit_code == 0 else ""
            said = "".join(going.errors)
            if "Traceback" in said or (case.exit_code and not case.hit):
                case.problems.append(f"undo ended with {case.exit_code}: {said[-2000:]}")
            self._judge_hosts(case, going)
            return
        report: dict[str, Any] = {}
        with contextlib.suppress(ValueError, IndexError):
            report = json.loads(going.lines[-1])
        case.outcome = str(report.get("outcome", ""))
        self._judge_mover(case, going, report)
        self._judge_hosts(case, going)

    def _judge_mover(self, case: Case, going: Going, report: dict[str, Any]) -> None:
        said = "".join(going.errors)
        # Ended by the signal itself: it came before any line of ours ran.
        if "Traceback" in said and case.exit_code != -signal.SIGINT:
            case.problems.append(said[-2000:])
        told = report.get("error") or {}
        if told.get("code") == "internal-error":
            case.problems.append(f"internal error: {told}")
        if (case.outcome, case.exit_code) == ("refused", 4):
            # Whatever was killed in the move before, nothing of it may be in the way of this one.
            case.problems.append(f"refused: {json.dumps(report)[:1000]}")
        if (case.outcome == "migrated") != (case.exit_code == 0) and case.exit_code != -9:
            case.problems.append(f"outcome {case.outcome}, and exit code {case.exit_code}")
        if case.fault in MENDED and case.outcome == "rolled_back" and report.get("blackout_ms") is None:
            case.problems.append(f"the link was not mended before the freeze: {told}")
        if not case.hit and case.outcome != "migrated":
            case.problems.append(f"nothing was hit, and: {json.dumps(report)[:1000]} {said[-1000:]}")

    def _judge_hosts(self, case: Case, going: Going) -> None:
        begin = time.monotonic()
        ran_there = any(phase in STARTED for phase in going.reached("target"))
        while not self._settled(case, ran_there):
            if time.monotonic() - begin > SETTLE_S:
                states = {host: self._status(host) for host in HOSTS}
                resolved = [self.hosts.cmigrate(host, "resolve", NAME, check=False) for host in HOSTS]
                said = [done.stdout + done.stderr for done in resolved]
                case.problems.append(f"not settled: {states}, numbers {self.judge.ask()}, resolve says {said}")
                break
        if (
            ran_there
            and case.mode in CONSENT
            and case.fault in REFILLED
            and case.outcome not in ("migrated", "returned")
        ):
            case.problems.append(f"the link was not mended after the switch: {case.outcome}")
        case.settled_s = round(time.monotonic() - begin, 2)
        if case.lost:
            self._must_be_told(case, going.move_id())
            self.remove()
        elif case.runs_on:
            if case.outcome == "migrated" and case.runs_on != going.target:
                case.problems.append(f"migrated, and it runs on {case.runs_on}")
            self._end_window(case, going)
            self.at = case.runs_on
        # A session behind a cut link ends when the kernel has sent its peer's farewell again, or keepalive gives up.
        grace_s = LINK_GRACE_S if "link" in case.hit else GRACE_S
        if left := self.pictures.left(self.id, case.runs_on, grace_s):
            case.problems.append("hosts differ:\n    " + "\n    ".join(left))
        self.judge.ask()
        if self.judge.wrong:
            case.problems.append(f"two copies, or an old state: {self.judge.wrong}")
            self.judge.wrong = []
        case.problems += [line for line in self._new_lines_of_agents() if "Traceback" in line or "internal" in line]

    def _end_window(self, case: Case, going: Going) -> None:
        """What was taken back has come back, whatever died; what is still kept is taken back or given up, in turn."""
        if "RETURNING" in going.reached("source") and case.runs_on != going.source:
            case.problems.append(f"it was to come back, and runs on {case.runs_on}")
        if self._status(going.source) == KEPT:
            back = case.number % 2 == 0
            self.judge.may_go_back(back)
            done = self.hosts.cmigrate(going.source, "undo", NAME, *(() if back else ("--forget",)), check=False)
            if done.returncode:
                case.problems.append(f"undo ended with {done.returncode}: {done.stderr}")
            elif not self.judge.goes_on(20.0):
                case.problems.append("no numbers after the window")
            case.runs_on = going.source if back else case.runs_on
        self.judge.may_go_back(False)

    def _settled(self, case: Case, ran_there: bool) -> bool:
        """Give each host its next command, and see whether one runs the container, or none can."""
        for host in HOSTS:
            other = HOSTS[1 - HOSTS.index(host)]
            self.hosts.cmigrate(host, "move", NAME, "--to", other, "--mode", "diskless", "--dry-run", check=False)
        states = {host: self._status(host) for host in HOSTS}
        running = [host for host in HOSTS if states[host] == RUNNING]
        if not running and KEPT in states.values() and case.may_be_lost:
            # What post-copy has lost there is kept here.
            self.judge.may_go_back(True)
            kept_on = next(host for host in HOSTS if states[host] == KEPT)
            self.hosts.cmigrate(kept_on, "undo", NAME, check=False)
        if len(running) == 1 and self.judge.goes_on(2.0):
            case.runs_on = running[0]
            return True
        case.lost = ran_there and case.may_be_lost and all(state in GONE for state in states.values())
        return case.lost

    def _must_be_told(self, case: Case, move_id: str) -> None:
        reports = [report for host in HOSTS for report in self.hosts.lines(host, "history", "--json")]
        told = [report["outcome"] for report in reports if report["id"] == move_id]
        if "lost" not in told:
            case.problems.append(f"lost, and the reports say {told}")

    def _status(self, host: str) -> str:
        found = [line for line in self.hosts.lines(host, "ps", "-a", "--json") if line.get("name") == NAME]
        return str(found[0]["status"]) if found else ""

    def _new_lines_of_agents(self) -> list[str]:
        """Of the logs of both hosts' agents, since this was last asked."""
        new = []
        for host in HOSTS:
            for name in ("serve.log", "sshd.log"):
                path = self.hosts.lab.directory / host / name
                text = path.read_text(errors="replace") if path.exists() else ""
                new += [f"{host} {name}: {line}" for line in text[self._log_ends.get(path, 0) :].splitlines()]
                self._log_ends[path] = len(text)
        return new

    def remove(self) -> None:
        for host in HOSTS:
            self.hosts.cmigrate(host, "rm", "-f", NAME, check=False)


def cases(
    count: int, seed: int, modes: list[str], faults: list[str], moments: list[str] | None = None
) -> Iterator[Case]:
    """Every fault with every mode in turn; moments and transports by chance."""
    chance = random.Random(seed)
    pairs = [(mode, fault) for fault in faults for mode in modes if (mode, fault) != ("stopcopy", "pager")]
    chance.shuffle(pairs)
    for number in range(count):
        mode, fault = pairs[number % len(pairs)]
        moment = chance.choice(moments or MOMENTS)
        while (moment == "rounds" and mode in ("stopcopy", "diskless")) or (
            moment in WINDOW_RECORDS and fault in NOT_IN_A_WINDOW
        ):
            moment = chance.choice(MOMENTS)
        longest_s = {"start": WHOLE_MOVE_S, "frozen": BLACKOUT_S}.get(moment, AFTER_RECORD_S)
        yield Case(
            number=number,
            mode=mode,
            transport="ssh" if fault == "sshd" else chance.choice(("stream", "ssh")),
            fault=fault,
            moment=moment,
            delay_s=round(chance.choice((0.0, 1.0)) * chance.uniform(0, longest_s), 4),
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
                    if not chaos.id:
                        chaos.start()
                    chaos.run(case)
                    done.append(case)
                    tell(case)
                    if case.lost:
                        chaos.id = ""
                    elif not case.runs_on:
                        break
            finally:
                chaos.remove()
    except AssertionError as error:
        done.append(Case(number=-1, mode="", transport="", fault="", moment="", delay_s=0, problems=[str(error)]))
    finally:
        judge.close()
    return done


def summary(done: list[Case]) -> dict[str, Any]:
    moves = [case for case in done if case.number >= 0]
    return {
        "moves": len(moves),
        "hit": sum(bool(case.hit) for case in moves),
        "problems": sum(bool(case.problems) for case in done),
        "outcomes": dict(Counter("lost" if case.lost else case.outcome or "killed" for case in moves)),
        "longest_settled_s": max((case.settled_s for case in done), default=0.0),
    }


def line_of(case: Case) -> str:
    return (
        f"{case.number:5} {case.mode:9} {case.transport:7} {case.fault:12} "
        f"{case.moment:15} + {case.delay_s * 1000:4.0f} ms {'hit' if case.hit else '   '} -> {case.exit_code:4} "
        f"{case.outcome or '-':12} {'lost' if case.lost else 'on ' + (case.runs_on or 'nowhere')}, "
        f"settled in {case.settled_s:.1f} s" + "".join(f"\n    PROBLEM {problem}" for problem in case.problems)
    )


def _names(text: str, known: tuple[str, ...], what: str, parser: argparse.ArgumentParser) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no {what} {unknown[0]!r}: choose of {', '.join(known)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=int, default=100, metavar="N", help="moves")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modes", default=",".join(MODES), metavar="MODE,MODE")
    parser.add_argument("--faults", default=",".join(FAULTS), metavar="FAULT,FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument(
        "--moments", default=",".join(MOMENTS), metavar="MOMENT,MOMENT", help=f"of {', '.join(MOMENTS)}"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each move")
    asked = parser.parse_args()
    modes = _names(asked.modes, MODES, "mode", parser)
    faults = _names(asked.faults, FAULTS, "fault", parser)
    moments = _names(asked.moments, MOMENTS, "moment", parser)

    # A lab must be taken down however this ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def tell(case: Case) -> None:
        if asked.json:
            print(json.dumps(vars(case)), flush=True)
        print(line_of(case), file=sys.stderr, flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="cmigrate-chaos-", dir="/var/tmp") as directory,
        lab_of_two_hosts(Path(directory)) as hosts,
    ):
        done = run_cases(hosts, cases(asked.n, asked.seed, modes, faults, moments), tell)
    found = summary(done)
    for case in done:
        if case.number < 0:
            print(case.problems[0], file=sys.stderr)
    print(json.dumps(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
