"""`cmigrate lab`: several hosts on one machine."""

from __future__ import annotations

import json
import os
import time

import click


@click.group("lab")
def lab_group() -> None:
    """Several hosts on this machine, to try moves and to test them.

    Each has its own network, mounts, /run, state, SSH server and agent; all are on one network with `client`, a pseudo
    host for clients. The lab lives in /var/lib/cmigrate-lab, or where CMIGRATE_LAB_DIR says.
    """


@lab_group.command("up")
@click.option("--hosts", type=int, default=2, show_default=True, metavar="N", help="How many hosts.")
@click.option(
    "--rate", default="", metavar="RATE", help="Rate of each host's link: 1gbit, 100mbit (default: no limit)."
)
@click.option("--routed", is_flag=True, help="Each host in a segment of its own; client is the router between them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def up_command(hosts: int, rate: str, routed: bool, as_json: bool) -> None:
    """Bring the lab up: host1, host2, … and client."""
    from migrate.lab.lab import Lab

    lab = Lab()
    begin = time.monotonic()
    fresh = lab.up(hosts, rate=rate, routed=routed)
    names = [host.name for host in lab.hosts]
    if as_json:
        click.echo(json.dumps({"type": "lab", "id": lab.id, "hosts": names, "fresh": fresh}))
        return
    if not fresh:
        click.echo(f"the lab is up already: {', '.join(names)}")
        return
    click.echo(f"{', '.join(names)} and client are up after {time.monotonic() - begin:.1f} s")
    click.echo(
        f"hint: cmigrate lab exec {names[0]} -- cmigrate run -d --name web1 --rootfs host -- sleep inf", err=True
    )


@lab_group.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(host: str, command: tuple[str, ...]) -> None:
    """Run COMMAND on HOST (or on client). Its exit code is ours, the terminal is its own."""
    from migrate.lab.lab import Lab

    words = command[1:] if command[0] == "--" else command
    if not words:
        raise click.UsageError("no command given: cmigrate lab exec HOST -- COMMAND [ARG ...]")
    argv, environment = Lab().entering(host, words)
    os.execvpe(argv[0], argv, environment)


@lab_group.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def status_command(as_json: bool) -> None:
    """Show the lab's hosts. Exit code 4 when it is down, or a part of it has died."""
    from migrate.lab.lab import Lab
    from runtime.errors import WrongState

    lab = Lab()
    record = lab.record
    hosts = record.hosts if record is not None and record.complete else ()
    for host in hosts:
        dead = host.dead()
        if as_json:
            line = {"name": host.name, "address": host.address, "pid": host.holder.pid, "up": not dead, "dead": dead}
            click.echo(json.dumps({"type": "lab-host", **line}))
        else:
            state = f"dead: {', '.join(dead)}" if dead else "up"
            click.echo(f"{host.name:8} {host.address:15} {state}")
    if not hosts:
        raise WrongState("the lab is down", hint="run `cmigrate lab up`")
    if any(host.dead() for host in hosts):
        raise WrongState("parts of the lab have died", hint="run `cmigrate lab down` and `cmigrate lab up`")


@lab_group.command("down")
def down_command() -> None:
    """Take the lab down: kill everything that runs in it, and remove what it has made."""
    from migrate.lab.lab import Lab

    lab = Lab()
    click.echo("the lab is down" if lab.down() else "the lab was down already")
