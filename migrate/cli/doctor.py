"""`cmigrate doctor`."""

from __future__ import annotations

import click

from migrate.cli.output import json_line, json_option, open_host

EXIT_MISSING = 8
MARKS = {"ok": "ok     ", "warning": "warning", "blocker": "BLOCKER"}


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> int:
    """Check what this host can do, and what it lacks.

    Exit code 8 when something is missing that cmigrate can not do without.
    """
    host = open_host()
    from migrate.preflight import doctor

    findings = doctor(host)
    for finding in findings:
        if as_json:
            json_line({"type": "finding", **finding.to_json()})
        else:
            click.echo(f"{MARKS.get(finding.level, finding.level)}  {finding.check}: {finding.what}")
            if finding.remedy and finding.level != "ok":
                click.echo(f"         {finding.remedy}")
    return EXIT_MISSING if any(finding.level == "blocker" for finding in findings) else 0
