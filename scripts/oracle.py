"""What ``scripts/oracle`` runs: programs that know what they hold, moved there and back, asked after each move.

sharing:   three processes that share memory in every way, forbidden, locked, huge pages and guards, 8 threads
segments:  shared memory of every kind, holes, sizes that change, writes by descriptor
churn:     memory that is mapped, moved, protected, given back and forked all the time
redis:     a million keys and their digest, under redis-benchmark
postgres:  pgbench, and the sums of its balances in one snapshot
sqlite:    two writers in WAL mode, integrity_check, and sums

{"workload", "number", "mode", "outcome", "blackout_ms", "total_ms", "compared_pages", "problem"}   for each move
{"workload", "moves", "problems", "compared_pages", "blackout_ms": {mode: median}}                  at the end
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.lab import HOSTS, CommandFailed, Running, TwoHosts, lab_of_two_hosts, nothing_left_on
from tests.support.loads import LoadedPostgres, LoadedRedis, SqliteWal
from tests.support.oracle import Churn, Segments, Sharing
from tests.support.services import Service

MODES = ("stopcopy", "diskless", "precopy", "postcopy", "hybrid")
WORKLOADS: dict[str, Callable[[], Service]] = {
    "sharing": Sharing,
    "segments": Segments,
    "churn": lambda: Churn(48),
    "redis": LoadedRedis,
    "postgres": LoadedPostgres,
    "sqlite": SqliteWal,
}
Line = dict[str, Any]


def moved(container: Running, service: Service, mode: str, transport: str, options: Sequence[str]) -> Line:
    """One move and what the program says to it."""
    line: Line = {"mode": mode, "outcome": "", "problem": ""}
    try:
        report = container.move(mode, transport, "--allow-postcopy", *options)
    except CommandFailed as error:
        return {**line, "problem": str(error)}
    verify = report["verify"] or {"pages": 0, "pages_later": 0}
    line |= {
        "outcome": report["outcome"],
        "blackout_ms": report["blackout_ms"],
        "total_ms": report["total_ms"],
        "compared_pages": verify["pages"] + verify["pages_later"],
    }
    try:
        service.check()
    except Exception as error:
        line["problem"] = f"{type(error).__name__}: {error}"
    return line


def run(hosts: TwoHosts, workload: str, asked: argparse.Namespace, tell: Callable[[Line], None]) -> Line:
    """So many moves, the modes in turn; ends at the first problem. The summary."""
    modes = asked.modes.split(",")
    options = () if asked.no_verify else ("--verify",)
    lines: list[Line] = []
    service = WORKLOADS[workload]()
    try:
        with nothing_left_on(hosts, *HOSTS):
            container = hosts.run(service)
            try:
                service.check()
                while len(lines) < asked.n and not (lines and lines[-1]["problem"]):
                    found = moved(container, service, modes[len(lines) % len(modes)], asked.transport, options)
                    lines.append({"workload": workload, "number": len(lines), **found})
                    tell(lines[-1])
            finally:
                service.close()
                container.remove()
    except AssertionError as error:
        lines.append({"workload": workload, "number": -1, "mode": "", "outcome": "", "problem": str(error)})
        tell(lines[-1])
    blackouts = defaultdict(list)
    for line in lines:
        if line["outcome"] == "migrated":
            blackouts[line["mode"]].append(line["blackout_ms"])
    return {
        "workload": workload,
        "moves": sum(line["outcome"] == "migrated" for line in lines),
        "problems": sum(bool(line["problem"]) for line in lines),
        "compared_pages": sum(line.get("compared_pages", 0) for line in lines),
        "blackout_ms": {mode: round(statistics.median(found), 1) for mode, found in blackouts.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/oracle", description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=int, default=100, metavar="N", help="moves of each workload")
    parser.add_argument("--workload", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--modes", default=",".join(MODES), metavar="MODE,MODE")
    parser.add_argument("--transport", choices=["stream", "ssh"], default="stream")
    parser.add_argument("--no-verify", action="store_true", help="only the programs judge")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each move")
    asked = parser.parse_args()
    for names, known in ((asked.workload.split(","), WORKLOADS), (asked.modes.split(","), MODES)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"no {unknown[0]!r}: one of {', '.join(known)}")

    def tell(line: Line) -> None:
        if asked.json:
            print(json.dumps(line), flush=True)
        if sys.stderr.isatty() or line["problem"]:
            print(line, file=sys.stderr, flush=True)

    failed = 0
    with (
        tempfile.TemporaryDirectory(prefix="cmigrate-oracle-", dir="/var/tmp") as directory,
        lab_of_two_hosts(Path(directory)) as hosts,
    ):
        for workload in asked.workload.split(","):
            summary = run(hosts, workload, asked, tell)
            print(json.dumps(summary), flush=True)
            failed += summary["problems"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
