"""`cmigrate plan`, and the table of predictions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from migrate.cli.choices import bandwidth_option, consent_option, direct_option, transport_option
from migrate.cli.output import json_option, open_host

if TYPE_CHECKING:
    from migrate.observe import Event, Planned


def predictions_table(planned: Planned) -> list[str]:
    """For people: each mode with what it would take, the chosen one marked."""
    from migrate.observe import mebibytes
    from migrate.plan import NEED_CONSENT

    lines = [f"  {'MODE':<10}{'BLACKOUT':>12}{'TOTAL':>12}{'COMPLETE':>12}{'TRAFFIC':>14}  "]
    for found in planned.predictions:
        mark = "*" if found.mode == planned.mode else " "
        times = "".join(f"{value:>9.0f} ms" for value in (found.blackout_ms, found.total_ms, found.complete_ms))
        consent = " (needs --allow-postcopy)" if found.mode in NEED_CONSENT else ""
        lines.append(f"{mark} {found.mode:<10}{times}{mebibytes(found.sent_bytes):>14}  {found.why}{consent}")
    return [*lines, f"* {planned.mode}: {planned.why}"]


class Planning:
    """An observer that keeps the plan and tells warnings."""

    def __init__(self) -> None:
        self.planned: Planned | None = None

    def on_event(self, event: Event) -> None:
        from migrate.observe import Planned, Warning

        if isinstance(event, Planned):
            self.planned = event
        if isinstance(event, Warning):
            click.echo(f"warning: {event.what}" + (f" ({event.remedy})" if event.remedy else ""), err=True)


@click.command("plan")
@click.argument("container")
@click.option("--to", metavar="HOST", required=True, help="Where to; `cmigrate host ls` lists hosts.")
@click.option(
    "--downtime-limit",
    "downtime_limit_ms",
    type=click.FloatRange(min=1),
    metavar="MS",
    default=300.0,
    show_default=True,
    help="The blackout that is to be met.",
)
@transport_option
@direct_option
@bandwidth_option
@consent_option
@json_option
def plan_command(
    container: str,
    to: str,
    downtime_limit_ms: float,
    transport: str,
    direct: str,
    bandwidth_Bps: float | None,
    allow_postcopy: bool,
    as_json: bool,
) -> int:
    """Predict what moving a container would take in each mode, and which one `move --mode auto` takes with the same
    options.

    Measures the link, and how fast the container writes, for a tenth of a second. Checks what `move` checks.
    """
    host = open_host()
    from migrate.observe import JsonLines
    from migrate.precopy import Budget
    from migrate.wiring import MoveOptions, move

    planning = Planning()
    observer = JsonLines(sys.stdout) if as_json else planning
    options = MoveOptions(
        dry_run=True,
        transport=transport,  # type: ignore[arg-type]  # click.Choice has checked it
        direct=direct == "auto",
        bandwidth_Bps=bandwidth_Bps,
        allow_postcopy=allow_postcopy,
        budget=Budget(downtime_limit_ms=downtime_limit_ms),
    )
    move(host, container, to, options, observer)
    if planning.planned is not None:
        click.echo("\n".join(predictions_table(planning.planned)))
    return 0
