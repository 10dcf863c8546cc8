"""`cmigrate host`: the hosts this one knows."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

if TYPE_CHECKING:
    from migrate.inventory import HostEntry, HostKeyEntry
    from migrate.links import TransportName
    from runtime.host import HostConfig

ADD_TIMEOUT_S = 60.0
TEST_TIMEOUT_S = 15.0
PINGS = 5


@click.group("host")
def host_group() -> None:
    """Hosts that this one can move containers to, and that may move containers here."""


@host_group.command("add")
@click.argument("name")
@click.argument("address", metavar="[ssh://][USER@]HOST[:PORT]")
@click.option("--fingerprint", metavar="SHA256:…", default="", help="The host key must be this one; asks nothing.")
@click.option("--yes", is_flag=True, help="Trust the host key that is shown now; asks nothing.")
@click.option("--identity", "-i", type=click.Path(path_type=Path), multiple=True, help="Private key to log in with.")
@click.option("--stream-port", type=click.IntRange(1, 65535), help="Port of the agent there, if not what it says.")
@click.option("--remote-command", metavar="COMMAND", default="cmigrate", help="How cmigrate is called there.")
@click.option("--own-address", metavar="HOST", default="", help="Where that host reaches this one, behind NAT.")
@click.option("--own-ssh-port", type=click.IntRange(1, 65535), default=22, help="Port of this host's SSH server.")
@click.option("--replace", is_flag=True, help="Replace what is known of a host that was set up again, on both sides.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def add_command(
    name: str,
    address: str,
    fingerprint: str,
    yes: bool,
    identity: tuple[Path, ...],
    stream_port: int | None,
    remote_command: str,
    own_address: str,
    own_ssh_port: int,
    replace: bool,
    as_json: bool,
) -> None:
    """Make this host and another one trust each other, in both directions.

    Logs in there by SSH with your own key, as root, once. Afterwards the two agents know each other's certificates and
    keys, and moves go both ways. Adding a host again brings its entry up to date.
    """
    from migrate.inventory import parse_ssh_url
    from migrate.trust import AddRequest, add_host
    from runtime.host import load_host_config
    from transport.api import Deadline

    request = AddRequest(
        name=name,
        address=parse_ssh_url(address),
        fingerprint=fingerprint,
        identity_files=identity or None,
        remote_command=remote_command,
        stream_port=stream_port,
        own_address=own_address,
        own_ssh_port=own_ssh_port,
        replace=replace,
    )

    def confirm(where: str, key: HostKeyEntry, shown: str) -> bool:
        click.echo(f"{where} shows host key {shown} ({key[0]}), which is not known here.", err=True)
        return yes or (sys.stdin.isatty() and click.confirm("Is that its key?", err=True))

    added = add_host(load_host_config(), request, confirm, deadline=Deadline.after(ADD_TIMEOUT_S))
    if as_json:
        click.echo(json.dumps({"type": "host", **entry_to_json(added.entry), "version": added.peer_version}))
        return
    for note in added.notes:
        click.echo(f"note: {name}: {note}", err=True)
    click.echo(f"{name} added: {added.entry.stream_text} and {added.entry.ssh_text}, cmigrate {added.peer_version}")


@host_group.command("exchange", hidden=True)
@click.option("--replace", is_flag=True)
def exchange_command(replace: bool) -> None:
    """The other side of `host add`: reads a line of JSON, stores who asks, answers with a line of JSON."""
    from migrate.trust import MAX_EXCHANGE_BYTES, answer_exchange
    from runtime.host import load_host_config
    from transport.api import Deadline

    line = sys.stdin.buffer.readline(MAX_EXCHANGE_BYTES + 1)
    host = load_host_config()
    answer = answer_exchange(host, line, os.environ, replace=replace, deadline=Deadline.after(ADD_TIMEOUT_S))
    sys.stdout.buffer.write(answer)
    sys.stdout.flush()


@host_group.command("ls")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def ls_command(as_json: bool) -> None:
    """List the hosts known here."""
    from migrate.inventory import Inventory
    from runtime.host import load_host_config

    inventory = Inventory(load_host_config())
    entries = inventory.list()
    for problem in inventory.problems():
        click.echo(f"warning: {problem}; {problem.hint}", err=True)
    if as_json:
        for entry in entries:
            click.echo(json.dumps({"type": "host", **entry_to_json(entry)}))
        return
    _print_table(
        ("NAME", "STREAM", "SSH", "ADDED"),
        [(entry.name, entry.stream_text or "-", entry.ssh_text or "-", entry.added_at) for entry in entries],
    )


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        click.echo("   ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def entry_to_json(entry: HostEntry) -> dict[str, Any]:
    """What `--json` shows of a host."""
    from transport.identity import fingerprint

    return {
        "name": entry.name,
        "stream": entry.stream_text,
        "ssh": entry.ssh_text,
        "certificate": fingerprint(entry.certificate_pem) if entry.certificate_pem else "",
        "added_at": entry.added_at,
    }


@host_group.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm_command(names: tuple[str, ...]) -> None:
    """Forget hosts: they may not come in any more, and nothing moves there."""
    from migrate.trust import remove_host
    from runtime.host import load_host_config

    host = load_host_config()
    for name in names:
        remove_host(host, name)
        click.echo(name)
    click.echo(f"hint: this host is still known there; `cmigrate host rm {host.name}` on it ends that too", err=True)


@host_group.command("test")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def test_command(name: str, as_json: bool) -> None:
    """Connect to a host over each transport, and show how long that took and who answered."""
    from migrate.links import TransportName
    from runtime.host import load_host_config

    host = load_host_config()
    ways = [way for way in get_args(TransportName) if way != "auto"]
    if "://" in name:
        ways = [way for way in ways if name.startswith(f"{way}://")]
    errors: list[Exception] = []
    for way in ways:
        result, error = _try(host, name, way)
        if error is not None:
            errors.append(error)
        if as_json:
            click.echo(json.dumps({"type": "host-test", "host": name, "transport": way, **result}))
        elif error is None:
            click.echo(
                f"{way:8} ok      connected in {result['connect_ms']:.0f} ms, "
                f"round trip {result['round_trip_ms']:.2f} ms, "
                f"cmigrate {result['version']} on {result['peer']}, protocol {result['protocol']}"
            )
        else:
            click.echo(f"{way:8} FAILED  {error}")
    if errors:
        raise errors[0]


def _try(host: HostConfig, name: str, way: TransportName) -> tuple[dict[str, Any], Exception | None]:
    from migrate.errors import MigrateError, UnknownHost
    from migrate.links import connect
    from migrate.session import ping
    from transport.api import Deadline, TransportError

    deadline = Deadline.after(TEST_TIMEOUT_S)
    begin = time.perf_counter()
    try:
        with connect(host, name, transport=way, deadline=deadline) as session:
            connected = time.perf_counter()
            rounds = []
            for token in range(PINGS):
                sent = time.perf_counter()
                ping(session.channel, token, deadline)
                rounds.append(time.perf_counter() - sent)
            hello = session.peer_hello
    except UnknownHost:
        raise
    except (MigrateError, TransportError) as error:
        return {"ok": False, "error": str(error)}, error
    return {
        "ok": True,
        "connect_ms": round((connected - begin) * 1000, 2),
        # The best of a few: the first one pays for what the others find warm.
        "round_trip_ms": round(min(rounds) * 1000, 3),
        "peer": hello.host,
        "version": hello.version,
        "protocol": hello.protocol,
    }, None
