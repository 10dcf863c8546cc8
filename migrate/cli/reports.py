"""`cmigrate history` and `cmigrate report`."""

from __future__ import annotations

import click

from migrate.cli.output import human_bytes, json_line, json_option, note, open_host, print_table


@click.command("history")
@click.option("-n", "--limit", type=click.IntRange(1), metavar="N", help="Only the newest N.")
@json_option
def history_command(limit: int | None, as_json: bool) -> None:
    """List the moves this host took part in.

    Newest first.
    """
    host = open_host()
    from migrate.reports import ReportStore

    reports, warnings = ReportStore(host).list(limit=limit)
    for warning in warnings:
        note(f"warning: {warning}")
    if as_json:
        for report in reports:
            json_line({"type": "report", **report.to_json()})
        return
    print_table(
        (
            "REPORT",
            "STARTED",
            "CONTAINER",
            "SOURCE",
            "TARGET",
            "MODE",
            "TRANSPORT",
            "OUTCOME",
            "BLACKOUT",
            "TOTAL",
            "SENT",
        ),
        [
            (
                report.id,
                report.started_at.partition(".")[0].replace("T", " "),
                report.container,
                report.source,
                report.target,
                report.mode,
                report.transport,
                str(report.outcome),
                "--" if report.blackout_ms is None else f"{report.blackout_ms:.1f} ms",
                f"{report.total_ms:.0f} ms",
                human_bytes(report.sent_bytes.total),
            )
            for report in reports
        ],
    )


@click.command("report")
@click.argument("report_id", metavar="ID")
@json_option
def report_command(report_id: str, as_json: bool) -> None:
    """Show the report of one move.

    ID is the report's, or the beginning of it.
    """
    host = open_host()
    from migrate.reports import ReportStore

    report = ReportStore(host).get(report_id)
    if as_json:
        json_line({"type": "report", **report.to_json()})
        return
    from migrate.cli.tables import print_report

    print_report(report)
