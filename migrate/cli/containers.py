"""Commands that list containers and change their state."""

from __future__ import annotations

import datetime
import json
import shlex
import time
from typing import TYPE_CHECKING, Any

import click

from migrate.cli.output import ago, for_each, json_line, json_option, note, open_host, print_table

if TYPE_CHECKING:
    from runtime.api import Container
    from runtime.container import Containers

COMMAND_WIDTH = 30

names_argument = click.argument("names", nargs=-1, required=True, metavar="CONTAINER...")
timeout_option = click.option(
    "-t",
    "--time",
    "timeout_s",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds until SIGKILL.",
)


def open_containers() -> Containers:
    host = open_host()
    from runtime.container import Containers

    return Containers(host)


@click.command("ps")
@click.option("-a", "--all", "all_states", is_flag=True, help="Also those that do not run.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@click.option("--no-trunc", is_flag=True, help="Show whole commands.")
@json_option
def ps_command(all_states: bool, quiet: bool, no_trunc: bool, as_json: bool) -> None:
    """List containers."""
    containers = open_containers()
    found = containers.list(all_states=all_states)
    for warning in getattr(containers.store, "warnings", ()):
        note(f"warning: {warning}")
    if as_json:
        for container in found:
            json_line(container_line(container))
    elif quiet:
        for container in found:
            click.echo(container.id)
    else:
        now = time.time()
        print_table(
            ("CONTAINER ID", "ROOTFS", "COMMAND", "CREATED", "STATUS", "ADDRESS", "PORTS", "NAMES"),
            [table_row(container, now, full=no_trunc) for container in found],
        )


def container_line(container: Container) -> dict[str, Any]:
    """What ``--json`` shows of a container."""
    spec, state = container.spec, container.state
    return {
        "type": "container",
        "id": spec.id,
        "name": spec.name,
        "status": str(state.status),
        "rootfs": spec.rootfs,
        "command": list(spec.argv),
        "created_at": spec.created_at,
        "started_at": state.started_at,
        "finished_at": state.finished_at,
        "exit_code": state.exit_code,
        "restarts": state.restarts,
        "address": spec.network.address if spec.network else "",
        "ports": [port_text(port) for port in spec.ports],
        "labels": dict(spec.labels),
        "moved_to": state.moved_to,
        "kept_until": state.kept_until,
    }


def port_text(port: Any) -> str:
    return f"{port.host_address}:{port.host_port}->{port.container_port}/{port.protocol}"


def status_text(container: Container, now: float) -> str:
    """As docker says it: Up 5 minutes, Exited (0) 2 hours ago."""
    state = container.state
    match str(state.status):
        case "running":
            return f"Up {ago(state.started_at, now)}"
        case "paused":
            return f"Up {ago(state.started_at, now)} (Paused)"
        case "exited":
            code = "?" if state.exit_code is None else state.exit_code
            since = ago(state.finished_at, now)
            return f"Exited ({code})" + (f" {since} ago" if since else "")
        case "moved":
            return f"Moved to {state.moved_to}"
        case "kept":
            left_s = max(0.0, datetime.datetime.fromisoformat(state.kept_until).timestamp() - now)
            return f"Moved to {state.moved_to} (undo within {left_s:.0f} s)"
    return "Created"


def table_row(container: Container, now: float, *, full: bool = False) -> tuple[str, ...]:
    spec = container.spec
    command = " ".join(shlex.join(spec.argv).splitlines())
    if len(command) > COMMAND_WIDTH and not full:
        command = command[: COMMAND_WIDTH - 1] + "…"
    return (
        spec.id,
        spec.rootfs,
        command,
        f"{ago(spec.created_at, now)} ago",
        status_text(container, now),
        spec.network.address.partition("/")[0] if spec.network else "",
        ", ".join(port_text(port) for port in spec.ports),
        spec.name,
    )


@click.command("inspect")
@names_argument
@json_option
def inspect_command(names: tuple[str, ...], as_json: bool) -> None:
    """Show everything about containers, as JSON.

    One indented object for each container, or with --json one a line.
    """
    containers = open_containers()

    def show(name: str) -> str:
        container = containers.get(name)
        value = {
            "type": "container",
            "id": container.id,
            "name": container.name,
            "spec": container.spec.to_json(),
            "state": container.state.to_json(),
            "log_path": str(containers.log_path(container.id)),
        }
        return json.dumps(value) if as_json else json.dumps(value, indent=2)

    for_each(names, show, as_json=as_json)


@click.command("stop")
@names_argument
@timeout_option
def stop_command(names: tuple[str, ...], timeout_s: float) -> None:
    """Stop containers: SIGTERM, and SIGKILL after a while."""
    containers = open_containers()

    def stop(name: str) -> str:
        containers.stop(name, timeout_s)
        return name

    for_each(names, stop)


@click.command("kill")
@names_argument
@click.option(
    "-s", "--signal", "signal_text", metavar="SIGNAL", default="KILL", show_default=True, help="Name or number."
)
def kill_command(names: tuple[str, ...], signal_text: str) -> None:
    """Send a signal to containers."""
    from migrate.cli.options import parse_signal

    number = parse_signal(signal_text)
    containers = open_containers()

    def kill(name: str) -> str:
        containers.kill(name, number)
        return name

    for_each(names, kill)


@click.command("start")
@names_argument
def start_command(names: tuple[str, ...]) -> None:
    """Start containers that have ended."""
    containers = open_containers()

    def start(name: str) -> str:
        containers.start(name)
        return name

    for_each(names, start)


@click.command("restart")
@names_argument
@timeout_option
def restart_command(names: tuple[str, ...], timeout_s: float) -> None:
    """Stop containers and start them again."""
    containers = open_containers()

    def restart(name: str) -> str:
        containers.restart(name, timeout_s)
        return name

    for_each(names, restart)


@click.command("pause")
@names_argument
def pause_command(names: tuple[str, ...]) -> None:
    """Freeze containers."""
    containers = open_containers()

    def pause(name: str) -> str:
        containers.pause(name)
        return name

    for_each(names, pause)


@click.command("unpause")
@names_argument
def unpause_command(names: tuple[str, ...]) -> None:
    """Thaw containers that were paused."""
    containers = open_containers()

    def unpause(name: str) -> str:
        containers.unpause(name)
        return name

    for_each(names, unpause)


@click.command("wait")
@names_argument
def wait_command(names: tuple[str, ...]) -> None:
    """Wait until containers end; print their exit codes."""
    containers = open_containers()
    for_each(names, lambda name: str(containers.wait(name)))


@click.command("rm")
@names_argument
@click.option("-f", "--force", is_flag=True, help="Kill what runs.")
def rm_command(names: tuple[str, ...], force: bool) -> None:
    """Remove containers."""
    containers = open_containers()

    def remove(name: str) -> str:
        containers.remove(name, force=force)
        return name

    for_each(names, remove)
