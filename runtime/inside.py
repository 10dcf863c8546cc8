"""What is set inside a container's network namespace: sysctls, loopback, its one link, address and routes."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPBatch

from runtime.announcements import ipv6_interface
from runtime.api import NetworkSpec
from runtime.orders import LATER, Orders, route_socket

LINK_INSIDE = "eth0"
LOOPBACK_INDEX = 1  # in every network namespace
# Written in the container's namespace before its first instruction: path below /proc/sys/net -> value.
SYSCTLS = {
    # CRIU can not dump MPTCP sockets, and Go's listeners are MPTCP by default since 1.24.
    "mptcp/enabled": "0",
    "ipv4/ping_group_range": "0 2147483647",
    "ipv4/ip_unprivileged_port_start": "0",
    # A restored socket speaks the moment it leaves repair mode, before its link has joined the bridge, so its first ARP
    # request is lost: the next one comes after this time, and the default is a second.
    f"ipv4/neigh/{LINK_INSIDE}/retrans_time_ms": "20",
    f"ipv4/neigh/{LINK_INSIDE}/mcast_solicit": "50",
    f"ipv6/neigh/{LINK_INSIDE}/retrans_time_ms": "20",
    f"ipv6/neigh/{LINK_INSIDE}/mcast_solicit": "50",
    # Addresses are ours to give, at once: no second of waiting whether somebody else has one, no router's advice.
    f"ipv6/conf/{LINK_INSIDE}/accept_dad": "0",
    f"ipv6/conf/{LINK_INSIDE}/accept_ra": "0",
}


@dataclass(frozen=True, kw_only=True)
class InsideSockets:
    """Sockets of the container's namespace, kept here: ``packet`` for announcements, ``route`` for orders about the
    link with this index."""

    packet: socket.socket
    route: socket.socket
    link_index: int

    def close(self) -> None:
        self.packet.close()
        self.route.close()


def inside_orders(network: NetworkSpec) -> Orders:
    """For the link inside, whose index comes later. Raises ValueError for an address that is none."""
    address = ipaddress.IPv4Interface(network.address)

    def fill(batch: IPBatch) -> None:
        batch.link("set", index=LOOPBACK_INDEX, state="up")
        batch.addr("add", index=LATER, address=str(address.ip), prefixlen=address.network.prefixlen)
        batch.link("set", index=LATER, state="up")
        batch.route("add", dst="default", gateway=network.gateway)
        if network.address6:
            interface = ipv6_interface(network.address6)
            prefix = interface.network.prefixlen
            batch.addr("add", index=LATER, family=socket.AF_INET6, address=str(interface.ip), prefixlen=prefix)
            if network.gateway6:
                batch.route("add", family=socket.AF_INET6, dst="default", gateway=network.gateway6, oif=LATER)

    return Orders(fill)


def configure(orders: Orders) -> InsideSockets:
    """In the container's namespace, when its link is there. Raises NetlinkError and OSError."""
    for name, value in SYSCTLS.items():
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/sys/net", name).write_text(value)
    sockets = open_sockets()
    try:
        orders.perform(sockets.route, sockets.link_index)
    except BaseException:
        sockets.close()
        raise
    return sockets


def open_sockets() -> InsideSockets:
    """In the container's namespace."""
    index = socket.if_nametoindex(LINK_INSIDE)
    route = route_socket()
    # Of protocol 0 and not bound: it receives nothing, and binding it would take the kernel 10 ms (synchronize_net).
    packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    return InsideSockets(packet=packet, route=route, link_index=index)
