"""`cmigrate probe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from migrate.cli.output import json_line, json_option


@click.command("probe")
@click.argument("kind", type=click.Choice(["tcp", "http", "udp", "redis", "echo"]))
@click.argument("address", metavar="HOST:PORT")
@click.option("--duration", "duration_s", type=click.FloatRange(min=0.01), metavar="S", help="End after so long.")
@click.option(
    "--interval-ms",
    type=click.FloatRange(min=0.1),
    metavar="MS",
    help="Between two requests. [default: 1; 5 for tcp without --send]",
)
@click.option("--send", metavar="TEXT", default="", help="tcp, udp: what to send; \\r and \\n are understood.")
@click.option("--path", default="/", show_default=True, help="http: what to get.")
@click.option("--key", default="probe", show_default=True, help="redis: the key to count in.")
@json_option
def probe_command(
    kind: str,
    address: str,
    duration_s: float | None,
    interval_ms: float | None,
    send: str,
    path: str,
    key: str,
    as_json: bool,
) -> int:
    """Ask a service again and again and tell the longest time without an answer.

    tcp: with --send one kept connection, any answer counts; without, a new connection each time. http: GET on a kept
    connection. udp: a datagram each time. redis: INCR of a key. echo: a line with a number that must come back.
    Ends after --duration or at Ctrl-C.
    """
    import argparse

    from migrate.probe import Question, make_probe, parse_address, run_until_told
    from transport.api import ConnectFailed

    if send and kind not in ("tcp", "udp"):
        raise click.UsageError("--send is for tcp and udp")
    try:
        where = parse_address(address)
    except argparse.ArgumentTypeError as error:
        raise click.UsageError(str(error)) from error
    question = Question(
        kind=kind,
        address=where,
        interval_ms=interval_ms,
        send=send.replace("\\r", "\r").replace("\\n", "\n").encode(),
        path=path,
        key=key,
    )
    try:
        run_until_told(make_probe(question), duration_s, json_line if as_json else _show)
    except OSError as error:
        hint = "does the service listen there? cmigrate ps shows addresses"
        raise ConnectFailed(f"{address}: {error.strerror or error}", hint=hint) from error
    return 0


def _show(seen: Mapping[str, Any]) -> None:
    click.echo(
        f"{seen['requests']} requests in {seen['duration_ms'] / 1000:.1f} s, {seen['failed']} failed, "
        f"{seen['resets']} resets, {seen['reconnects']} reconnects"
    )
    click.echo(
        f"longest gap {seen['longest_gap_ms']:.1f} ms (the probe itself was late by {seen['probe_late_ms']:.1f})"
    )
    for name, count in seen["gaps_ms"].items():
        click.echo(f"  {name + ' ms':>9} {count:>8}")
