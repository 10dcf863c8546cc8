"""`cmigrate network`: user-defined networks of this host."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import click

from migrate.cli.output import json_line, json_option, open_host, print_table


@click.group("network")
def network_group() -> None:
    """User-defined networks.

    `run --network NAME` puts a container on one.
    """


@network_group.command("create")
@click.argument("name")
@click.option("--subnet", metavar="A.B.C.D/N", default="", help="Its addresses (default: a free one of 10.89.0.0/16).")
@click.option("--gateway", metavar="ADDRESS", default="", help="The bridge's own (default: the first).")
def create_command(name: str, subnet: str, gateway: str) -> None:
    """Make a network, with a bridge of its own.

    A container moves with its network: make it under the same name, subnet and gateway on every host, and join the
    bridges (`network inspect` names them), for example by a link that is a port of both.
    """
    host = open_host()
    from runtime.container import utc_now
    from runtime.network import ensure_bridge, remove_bridge
    from runtime.networks import Networks

    networks = Networks(host)
    network = networks.create(name, subnet=subnet, gateway=gateway, created_at=utc_now())
    try:
        ensure_bridge(networks.host_of(name))
    except BaseException:
        remove_bridge(networks.remove(name, ()).bridge)
        raise
    click.echo(network.name)


@network_group.command("ls")
@json_option
def ls_command(as_json: bool) -> None:
    """List the networks of this host."""
    host = open_host()
    from runtime.networks import Networks

    found = Networks(host).list()
    if as_json:
        for network in found:
            json_line({"type": "network", **asdict(network)})
        return
    print_table(("NAME", "SUBNET", "GATEWAY", "BRIDGE"), [(n.name, n.subnet, n.gateway, n.bridge) for n in found])


@network_group.command("inspect")
@click.argument("names", metavar="NETWORK...", nargs=-1, required=True)
def inspect_command(names: tuple[str, ...]) -> None:
    """Show networks and the containers on them, as JSON."""
    host = open_host()
    from runtime.container import Containers
    from runtime.networks import Networks

    networks = Networks(host)
    specs = Containers(host).store.known_specs()
    for name in names:
        members = {
            spec.name: spec.network.address for spec in specs if spec.network is not None and spec.network.name == name
        }
        click.echo(json.dumps({**asdict(networks.get(name)), "containers": members}, indent=2))


@network_group.command("rm")
@click.argument("names", metavar="NETWORK...", nargs=-1, required=True)
def rm_command(names: tuple[str, ...]) -> None:
    """Remove networks that no container belongs to."""
    host = open_host()
    from runtime.container import Containers
    from runtime.network import remove_bridge
    from runtime.networks import Networks

    for name in names:
        remove_bridge(Networks(host).remove(name, Containers(host).store.known_specs()).bridge)
        click.echo(name)


@network_group.command("wires")
@json_option
def wires_command(as_json: bool) -> None:
    """List the wires of containers that have moved between segments.

    `to` is one by which a container has left, `from` one by which it is reached from where it was.
    """
    open_host()
    from pyroute2 import IPRoute

    from runtime.wire import seconds_left, sweep, wires

    sweep()
    with IPRoute() as netlink:
        found = sorted(wires(netlink), key=lambda end: (end.container, end.link))
    left = {end.container_id: seconds_left(end.container_id) for end in found}
    if as_json:
        for end in found:
            seconds = left[end.container_id]
            json_line({"type": "wire", **asdict(end), "seconds_left": None if math.isinf(seconds) else seconds})
        return
    rows = [
        (end.container, "to" if end.toward else "from", end.peer, end.link, _lasting(left[end.container_id]))
        for end in found
    ]
    print_table(("CONTAINER", "LEADS", "PEER", "LINK", "ENDS WHEN IDLE IN"), rows)


def _lasting(seconds: float) -> str:
    return "never" if math.isinf(seconds) else f"{seconds:.0f} s"


@network_group.command("cut")
@click.argument("containers", metavar="CONTAINER...", nargs=-1, required=True)
def cut_command(containers: tuple[str, ...]) -> None:
    """End the wires of containers on this host, by name or id.

    What goes over them breaks off. Cut both ends: `network wires` names the peers.
    """
    open_host()
    from pyroute2 import IPRoute

    from runtime.errors import NotFound
    from runtime.wire import remove_wires, wires

    with IPRoute() as netlink:
        known = {name: end.container_id for end in wires(netlink) for name in (end.container, end.container_id)}
    for name in containers:
        if name not in known:
            raise NotFound(f"there is no wire of {name} here", hint="cmigrate network wires lists them")
    for name in containers:
        remove_wires(known[name])
        click.echo(name)
