"""`cmigrate move`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from migrate.cli.choices import Parsed, bandwidth_option, consent_option, direct_option, transport_option
from migrate.cli.output import fail, json_option, open_host, terminated_like_interrupted
from migrate.cli.plan import predictions_table

if TYPE_CHECKING:
    from migrate.health import HealthCheck
    from migrate.observe import Event, Observer, Planned
    from migrate.precopy import Budget
    from migrate.report import MoveReport


class Noting:
    """In front of an observer: remembers the report, which says how the move ended."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.report: MoveReport | None = None
        self.planned: Planned | None = None

    def on_event(self, event: Event) -> None:
        from migrate.observe import MoveEnded, Planned

        if isinstance(event, MoveEnded):
            self.report = event.report
        if isinstance(event, Planned):
            self.planned = event
        self._observer.on_event(event)


def rounds_options(command: Callable[..., int]) -> Callable[..., int]:
    """When pre-copy's rounds end, and what becomes of a move that can not meet the limit."""
    options = (
        click.option(
            "--max-rounds", type=click.IntRange(min=1), default=30, show_default=True, help="At most so many rounds."
        ),
        click.option(
            "--max-time",
            "max_time_s",
            type=click.FloatRange(min=0, min_open=True),
            metavar="S",
            help="At most so many seconds of rounds.",
        ),
        click.option("--max-bytes", type=Parsed("size"), metavar="SIZE", help="Send at most this in rounds: 20g."),
        click.option(
            "--on-timeout",
            type=click.Choice(["abort", "stopcopy", "postcopy"]),
            default="stopcopy",
            show_default=True,
            help="When the downtime limit can not be met: roll back, freeze nevertheless, or let the rest follow.",
        ),
        click.option(
            "--throttle/--no-throttle",
            default=True,
            show_default=True,
            help="Slow the container down while no round meets the limit.",
        ),
        click.option(
            "--compress",
            type=click.Choice(["auto", "none", "lz4", "zstd"]),
            default="auto",
            show_default=True,
            help="Memory on the link; auto: where the link is slower than the processor.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def health_options(command: Callable[..., int]) -> Callable[..., int]:
    """A command in the container after the move, by docker's names, and whether it can come back."""
    options = (
        click.option(
            "--health-cmd",
            "health_command",
            metavar="COMMAND",
            help="Run this by sh in the container on the target; its failure is reported (exit code 14).",
        ),
        click.option(
            "--on-unhealthy",
            type=click.Choice(["report", "return"]),
            default="report",
            show_default=True,
            help="When it fails: leave the container there, or take it back as it was at the freeze. What it has done "
            "on the target meanwhile is lost then, and its connections end.",
        ),
        click.option(
            "--undo-window",
            "undo_window_s",
            type=click.FloatRange(min=0, max=7 * 86400),
            default=0.0,
            metavar="S",
            help="Keep the frozen copy here for so many seconds after the move: `cmigrate undo` takes the container "
            "back as it was then. Costs its memory on this host meanwhile.",
        ),
        click.option(
            "--health-timeout",
            "health_timeout_s",
            type=click.FloatRange(min=0.1, max=3600),
            default=10.0,
            show_default=True,
            metavar="S",
            help="Kill it after so long.",
        ),
        click.option(
            "--health-retries",
            type=click.IntRange(min=1, max=100),
            default=3,
            show_default=True,
            help="Try so often before it counts as failed.",
        ),
        click.option(
            "--health-interval",
            "health_interval_s",
            type=click.FloatRange(min=0, max=3600),
            default=1.0,
            show_default=True,
            metavar="S",
            help="Between tries.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _afterwards(grouped: dict[str, Any]) -> dict[str, Any]:
    """What ``health_options`` has put among the others, which it is taken out of, as MoveOptions names it."""
    health = {name: grouped.pop(name) for name in tuple(grouped) if name.startswith("health_")}
    kept = {name: grouped.pop(name) for name in ("on_unhealthy", "undo_window_s")}
    return {**kept, "health": _health(**health)}


def network_options(command: Callable[..., int]) -> Callable[..., int]:
    """How the container is reached where it arrives."""
    options = (
        click.option(
            "--network",
            type=click.Choice(["auto", "l2", "forward", "vxlan"]),
            default="auto",
            show_default=True,
            help="l2: both hosts' bridges are one segment; forward: this host leads its packets over a wire to the "
            "target as long as they come; vxlan: over a wire that stays; auto: l2 where they are, else forward.",
        ),
        click.option(
            "--forward-for",
            "grace_s",
            type=click.IntRange(min=1, max=30 * 86400),
            default=600,
            show_default=True,
            metavar="S",
            help="A wire ends when the container has sent nothing over it for so long.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _health(
    *, health_command: str | None, health_timeout_s: float, health_retries: int, health_interval_s: float
) -> HealthCheck | None:
    from migrate.health import HealthCheck

    if health_command is None:
        return None
    if not health_command.strip():
        raise click.UsageError("--health-cmd is empty")
    return HealthCheck(
        command=health_command, timeout_s=health_timeout_s, retries=health_retries, interval_s=health_interval_s
    )


def _budget(
    *,
    downtime_limit_ms: float,
    max_rounds: int,
    max_time_s: float | None,
    max_bytes: float | None,
    on_timeout: str,
    throttle: bool,
) -> Budget:
    from migrate.precopy import Budget

    return Budget(
        downtime_limit_ms=downtime_limit_ms,
        max_rounds=max_rounds,
        max_time_s=math.inf if max_time_s is None else max_time_s,
        max_bytes=math.inf if max_bytes is None else max_bytes,
        on_timeout=on_timeout,  # type: ignore[arg-type]  # click.Choice has checked it
        throttle=throttle,
    )


@click.command("move")
@click.argument("container")
@click.option("--to", metavar="HOST", required=True, help="Where to; `cmigrate host ls` lists hosts.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "stopcopy", "diskless", "precopy", "postcopy", "hybrid"]),
    default="auto",
    show_default=True,
    help="How.",
)
@click.option(
    "--downtime-limit",
    "downtime_limit_ms",
    type=click.FloatRange(min=1),
    metavar="MS",
    default=300.0,
    show_default=True,
    help="Rounds go on until a blackout below this is predicted.",
)
@click.option(
    "--max-blackout",
    "max_blackout_ms",
    type=click.FloatRange(min=1),
    metavar="MS",
    help="Roll back when it has been frozen so long and the target is not ready.  [default: no limit]",
)
@rounds_options
@transport_option
@direct_option
@bandwidth_option
@click.option(
    "--probe",
    metavar="ADDR|auto",
    default="",
    help="Ask this service all the while and report the downtime: [KIND://]HOST:PORT[/PATH], with a kind of "
    "`cmigrate probe`; auto: the first port the container listens on.",
)
@consent_option
@click.option(
    "--tcp",
    type=click.Choice(["auto", "keep", "close"]),
    default="auto",
    show_default=True,
    help="Which TCP connections to end at the freeze: auto: those that can not survive the move; close: all.",
)
@network_options
@click.option(
    "--verify",
    is_flag=True,
    help="Compare every page on both sides before it runs there; roll back if one differs. Lengthens the blackout.",
)
@health_options
@click.option("--dry-run", is_flag=True, help="Only check; list every reason why it could not be moved.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.1),
    default=20.0,
    show_default=True,
    help="Seconds to connect.",
)
@click.option(
    "--reconnect-for",
    "reconnect_s",
    type=click.FloatRange(min=0, max=3600),
    default=30.0,
    show_default=True,
    metavar="S",
    help="A link that breaks is tried again for so long, and the move goes on where it was; 0: not at all.",
)
@json_option
def move_command(
    container: str,
    to: str,
    mode: str,
    max_blackout_ms: float | None,
    bandwidth_Bps: float | None,
    compress: str,
    transport: str,
    direct: str,
    allow_postcopy: bool,
    tcp: str,
    dry_run: bool,
    as_json: bool,
    **grouped: Any,
) -> int:
    """Move a running container to another host.

    Exit code 0: it runs there. 4: refused, nothing happened. 5: rolled back, it runs on here. 6: in doubt, it is held
    here until the target answers. With --json: events, and the report last.
    """
    host = open_host()
    from migrate.errors import exit_code_for
    from migrate.observe import JsonLines, Terminal
    from migrate.wiring import MoveOptions, move

    afterwards = _afterwards(grouped)
    plain = ("network", "grace_s", "verify", "reconnect_s", "timeout_s", "probe")
    more = {name: grouped.pop(name) for name in plain}
    observer = Noting(JsonLines(sys.stdout) if as_json else Terminal(sys.stderr))
    options = MoveOptions(
        mode=mode,  # type: ignore[arg-type]  # click.Choice has checked these
        transport=transport,  # type: ignore[arg-type]
        direct=direct == "auto",
        allow_postcopy=allow_postcopy,
        tcp=tcp,  # type: ignore[arg-type]
        **more,
        dry_run=dry_run,
        budget=_budget(**grouped),
        bandwidth_Bps=bandwidth_Bps,
        compress=compress,  # type: ignore[arg-type]
        max_blackout_ms=max_blackout_ms,
        **afterwards,
    )
    try:
        with terminated_like_interrupted():
            report = move(host, container, to, options, observer)
    except BaseException as error:
        # The report is the last line, and it holds the error.
        if as_json and observer.report is not None:
            return exit_code_for(error)
        if not isinstance(error, KeyboardInterrupt):
            raise
        return fail(error, as_json=as_json)
    if dry_run and not as_json:
        _say_that_it_can(report, observer)
    return 0


def _say_that_it_can(report: MoveReport, observer: Noting) -> None:
    click.echo(f"{report.container} can move to {report.target}: {report.mode} by {report.transport}")
    if observer.planned is not None:
        click.echo("\n".join(predictions_table(observer.planned)))
