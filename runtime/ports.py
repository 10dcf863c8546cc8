"""Host ports that a container wants to publish: whether they can be had."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

from runtime.api import ContainerSpec, PortMapping
from runtime.errors import BadInput, NameTaken
from runtime.nft import ANY_ADDRESS

_KIND = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def refuse_taken_ports(spec: ContainerSpec, running: Iterable[ContainerSpec]) -> None:
    """Raises NameTaken naming who has a port that ``spec`` publishes, BadInput for one that this host has not.

    ``running`` are the other containers that publish theirs now; programs of this host are found by trying to bind.
    """
    if not spec.ports:
        return
    taken = [(port, f"container {other.name}") for other in running for port in other.ports]
    for place, port in enumerate(spec.ports):
        own = [(other, "this container itself") for other in spec.ports[:place]]
        holder = next((name for other, name in (*own, *taken) if overlap(port, other)), "")
        if not holder and not _can_bind(port):
            holder = "a program of this host"
        if holder:
            where = "" if port.host_address == ANY_ADDRESS else f" of {port.host_address}"
            raise NameTaken(
                f"port {port.host_port}/{port.protocol}{where} is taken by {holder}",
                hint="publish another: -p HOST:PORT",
            )


def overlap(one: PortMapping, other: PortMapping) -> bool:
    """Whether a packet could be meant for both."""
    addresses = {one.host_address, other.host_address}
    return (
        (one.host_port, one.protocol) == (other.host_port, other.protocol)
        and (len(addresses) == 1 or ANY_ADDRESS in addresses)
    )  # fmt: skip


def _can_bind(port: PortMapping) -> bool:
    with socket.socket(socket.AF_INET, _KIND[port.protocol]) as probe:
        if port.protocol == "tcp":
            # Connections that linger after their server has gone do not count; servers do.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host_address, port.host_port))
            if port.protocol == "tcp":
                probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            message = f"port {port.host_port} of {port.host_address} can not be published: {error.strerror}"
            raise BadInput(message, hint="an address of this host, or none for all of them") from error
    return True
