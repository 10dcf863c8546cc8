"""Commands that look into containers: logs, stats, top."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from migrate.cli.containers import open_containers
from migrate.cli.output import human_bytes, json_line, json_option, print_table

if TYPE_CHECKING:
    from runtime.api import Container
    from runtime.container import Containers

STATS_INTERVAL_S = 1.0
# What --no-stream measures processor use over.
STATS_SAMPLE_S = 0.5
ALIVE_INTERVAL_S = 0.5


@click.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on while the container runs.")
@click.option("-n", "--tail", metavar="N", default="all", show_default=True, help="Only the last N lines.")
@click.option("--since", metavar="TIME", help="RFC 3339, or how long ago: 10m.")
@click.option("-t", "--timestamps", is_flag=True, help="Show when each line was written.")
@json_option
@click.argument("container")
def logs_command(container: str, follow: bool, tail: str, since: str | None, timestamps: bool, as_json: bool) -> None:
    """Show what a container has written.

    Its stdout goes to stdout and its stderr to stderr.
    """
    from migrate.cli.options import parse_since, parse_tail

    lines, begin = parse_tail(tail), parse_since(since, datetime.datetime.now(datetime.UTC))
    containers = open_containers()
    from runtime.logs import read_log

    found = containers.get(container)
    more = still_runs(containers, found.id) if follow else None
    for line in read_log(containers.log_path(found.id), since=begin, tail=lines, follow=more):
        if as_json:
            json_line({"type": "log", "at": line.at, "stream": line.stream, "text": line.text})
        else:
            prefix = f"{line.at} " if timestamps else ""
            click.echo(prefix + line.text, err=line.stream == "stderr")


def still_runs(containers: Containers, container_id: str) -> Callable[[], bool]:
    """Whether more may be written; looks at most every half second."""
    from runtime.errors import NotFound

    looked_at, alive = -ALIVE_INTERVAL_S, True

    def ask() -> bool:
        nonlocal looked_at, alive
        if alive and time.monotonic() - looked_at >= ALIVE_INTERVAL_S:
            looked_at = time.monotonic()
            try:
                alive = str(containers.get(container_id).state.status) in ("running", "paused")
            except NotFound:
                alive = False
        return alive

    return ask


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A container's use of resources at a moment. None where the host does not count it."""

    container_id: str
    name: str
    at_s: float
    cpu_usage_s: float | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    pids: int

    def to_json(self, before: Sample | None) -> dict[str, Any]:
        percent = self.cpu_percent(before)
        return {
            "type": "stats",
            "id": self.container_id,
            "name": self.name,
            "cpu_percent": None if percent is None else round(percent, 2),
            "cpu_usage_s": self.cpu_usage_s,
            "memory_bytes": self.memory_bytes,
            "memory_limit_bytes": self.memory_limit_bytes,
            "pids": self.pids,
        }

    def cpu_percent(self, before: Sample | None) -> float | None:
        """Of one processor, since ``before``."""
        if before is None or self.cpu_usage_s is None or before.cpu_usage_s is None or self.at_s <= before.at_s:
            return None
        return max(0.0, 100 * (self.cpu_usage_s - before.cpu_usage_s) / (self.at_s - before.at_s))


@click.command("stats")
@click.argument("names", nargs=-1, metavar="[CONTAINER...]")
@click.option("--no-stream", is_flag=True, help="Show it once.")
@json_option
def stats_command(names: tuple[str, ...], no_stream: bool, as_json: bool) -> None:
    """Show what containers use.

    Of all that run, or of those named; again every second until Ctrl-C.
    """
    containers = open_containers()
    before = sample_all(containers, names)
    time.sleep(STATS_SAMPLE_S)
    while True:
        samples = sample_all(containers, names)
        if as_json:
            for key, sample in samples.items():
                json_line(sample.to_json(before.get(key)))
        else:
            if not no_stream and sys.stdout.isatty():
                click.clear()
            print_table(
                ("CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "PIDS"),
                [stats_row(sample, before.get(key)) for key, sample in samples.items()],
            )
        sys.stdout.flush()
        if no_stream:
            return
        before = samples
        time.sleep(STATS_INTERVAL_S)


def sample_all(containers: Containers, names: Sequence[str]) -> Mapping[str, Sample]:
    """Named containers must run; of the others, one that ends meanwhile is left out."""
    from runtime.errors import NotFound, WrongState

    found: list[Container] = (
        [containers.get(name) for name in names] if names else list(containers.list(all_states=False))
    )
    samples = {}
    for container in found:
        try:
            stats = containers.stats(container.id)
        except (WrongState, NotFound):
            if names:
                raise
            continue
        samples[container.id] = Sample(
            container_id=container.id,
            name=container.name,
            at_s=time.monotonic(),
            cpu_usage_s=stats.cpu_usage_s,
            memory_bytes=stats.memory_bytes,
            memory_limit_bytes=stats.memory_limit_bytes,
            pids=stats.pids,
        )
    return samples


def stats_row(sample: Sample, before: Sample | None) -> tuple[str, ...]:
    percent = sample.cpu_percent(before)
    share = "--"
    if sample.memory_bytes is not None and sample.memory_limit_bytes:
        share = f"{100 * sample.memory_bytes / sample.memory_limit_bytes:.2f}%"
    return (
        sample.container_id,
        sample.name,
        "--" if percent is None else f"{percent:.2f}%",
        f"{human_bytes(sample.memory_bytes)} / {human_bytes(sample.memory_limit_bytes)}",
        share,
        str(sample.pids),
    )


@click.command("top")
@click.argument("container")
@json_option
def top_command(container: str, as_json: bool) -> None:
    """Show a container's processes."""
    processes = open_containers().top(container)
    if as_json:
        for process in processes:
            json_line(
                {
                    "type": "process",
                    "pid": process.pid,
                    "host_pid": process.host_pid,
                    "user": process.user,
                    "cpu_s": round(process.cpu_s, 2),
                    "command": process.command,
                }
            )
        return
    print_table(
        ("PID", "HOST PID", "USER", "CPU", "COMMAND"),
        [(str(p.pid), str(p.host_pid), p.user, f"{p.cpu_s:.2f}s", p.command) for p in processes],
    )
