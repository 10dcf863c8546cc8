"""A report as a table, by rich. Imported only when one is shown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrate.cli.output import human_bytes
from migrate.report import MoveReport, Outcome

STYLES = {
    Outcome.MIGRATED: "green",
    Outcome.ROLLED_BACK: "yellow",
    Outcome.IN_DOUBT: "bold red",
    Outcome.LOST: "bold red",
    Outcome.REFUSED: "yellow",
    Outcome.RETURNED: "yellow",
}


def print_report(report: MoveReport, console: Console | None = None) -> None:
    """To stdout. The demo prints its reports with this, too."""
    console = console or Console(highlight=False)
    console.print(report_table(report))
    if report.error is not None:
        console.print(f"error: {report.error.what}", markup=False)
        for line in report.error.log_lines:
            console.print(f"    {line}", markup=False)
        if report.error.hint:
            console.print(f"hint: {report.error.hint}", markup=False)
    for blocker in report.blockers:
        console.print(f"  - {blocker.get('what', '')}", markup=False)


def report_table(report: MoveReport) -> Table:
    """What was moved and how, the sizes, and each phase with its share of the blackout's clock."""
    table = Table(title=f"Move {report.id}", title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold")
    table.add_column()

    def row(name: str, value: str, style: str = "") -> None:
        # Text, not str: a name from another host is no markup.
        table.add_row(Text(name), Text(value, style=style))

    blackout = "--" if report.blackout_ms is None else f"{report.blackout_ms:.1f} ms"
    sent = report.sent_bytes
    row("container", report.container)
    row("from, to", f"{report.source} -> {report.target}")
    row("mode, transport", f"{report.mode}, {report.transport}")
    row("outcome", str(report.outcome), STYLES[report.outcome])
    row("started", report.started_at)
    row("blackout", blackout)
    if report.downtime_ms is not None:
        row("downtime", f"{report.downtime_ms:.1f} ms, as a probe saw it")
    row("total", f"{report.total_ms:.1f} ms")
    row("memory", human_bytes(report.memory_bytes))
    kinds = ", ".join(f"{name} {human_bytes(getattr(sent, name))}" for name in ("pages", "files", "images", "control"))
    row("sent", f"{human_bytes(sent.total)} ({kinds})")
    if report.rounds:
        row("rounds", str(report.rounds))
    if report.closed_connections:
        row("closed", "\n".join(report.closed_connections))
    if report.phases:
        table.add_section()
        for phase in report.phases:
            row(phase.name, f"{phase.ms:10.1f} ms")
    table.add_section()
    versions = report.versions
    row("cmigrate, Python", f"{versions.cmigrate or '--'}, {versions.python or '--'}")
    row("CRIU", f"{versions.criu_source or '--'} -> {versions.criu_target or '--'}")
    row("kernel", f"{versions.kernel_source or '--'} -> {versions.kernel_target or '--'}")
    return table
