"""Options that several commands about moves have."""

from __future__ import annotations

from typing import Any

import click


class Parsed(click.ParamType[float]):
    """A word that a function of migrate.cli.options understands; its errors are click's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from migrate.cli.options import parse_bytes, parse_rate_Bps

        if not isinstance(value, str):
            return float(value)
        return parse_rate_Bps(value) if self.name == "rate" else float(parse_bytes(value))


transport_option = click.option(
    "--transport",
    type=click.Choice(["auto", "ssh", "stream"]),
    default="auto",
    show_default=True,
    help="auto: stream where the agent there answers, else ssh.",
)
direct_option = click.option(
    "--direct",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Over SSH: a direct connection for the move, with keys that came by SSH, where the target lets one in.",
)
bandwidth_option = click.option(
    "--bandwidth",
    "bandwidth_Bps",
    type=Parsed("rate"),
    metavar="RATE",
    help="Send no faster than this, but for the blackout: 1gbit, 50m (bytes a second).",
)
consent_option = click.option(
    "--allow-postcopy",
    is_flag=True,
    help="Allow modes in which memory follows after the switch: until it is there, either host's death loses it all.",
)
