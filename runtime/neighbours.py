"""Who a container knows at link level, carried along: else its first words on the target wait for ARP.

A restored socket speaks the moment it leaves repair mode. Its link joins the bridge a moment later, so its question
who has the peer's address is lost, and asked again after 20 ms; until then the answer to a waiting client lies in the
kernel's queue. Entries that are set when the link has joined let that queue go at once.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Mapping

from pyroute2 import IPBatch, IPRoute

from runtime.address import subnet_of
from runtime.api import NetworkSpec
from runtime.errors import BadInput
from runtime.host import HostConfig
from runtime.inside import LINK_INSIDE
from runtime.network import ContainerNetwork, in_network_namespace
from runtime.networks import host_for
from runtime.orders import LATER, Orders

# linux/neighbour.h
_NUD_STALE, _NUD_PERMANENT = 0x04, 0x80
_NUD_REACHABLE, _NUD_DELAY, _NUD_PROBE = 0x02, 0x08, 0x10
_KNOWN = _NUD_STALE | _NUD_PERMANENT | _NUD_REACHABLE | _NUD_DELAY | _NUD_PROBE
MAX_NEIGHBOURS = 128
"""Few enough to be set with one system call and in less than a millisecond."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def known_neighbours(host: HostConfig, init_pid: int, network: NetworkSpec) -> dict[str, str]:
    """Address -> MAC of what the container of ``init_pid`` knows; its way out through this very host is left out.

    Takes milliseconds: not for a blackout. Whatever can not be read is left out: neighbours can be asked for again.
    """
    try:
        found = in_network_namespace(init_pid, _read)
    except OSError:
        return {}
    if gateway_of(host, network):
        found.pop(network.gateway, None)
        found.pop(network.gateway6, None)
    return dict(list(found.items())[:MAX_NEIGHBOURS])


def _read() -> dict[str, str]:
    found = {}
    with IPRoute() as netlink:
        index = socket.if_nametoindex(LINK_INSIDE)
        for entry in netlink.get_neighbours(ifindex=index):
            address, mac = entry.get("dst"), entry.get("lladdr")
            if entry["state"] & _KNOWN and address and mac and not ipaddress.ip_address(address).is_multicast:
                found[str(address)] = str(mac)
    return found


def gateway_of(host: HostConfig, network: NetworkSpec) -> str:
    """The MAC of this host's bridge, where that is the container's way out; else empty."""
    host = host_for(host, network)
    own = (host.bridge_address or f"{host.gateway}/{subnet_of(host).prefixlen}").partition("/")[0]
    if own != network.gateway:
        return ""
    with contextlib.suppress(OSError), IPRoute() as netlink:
        (link,) = netlink.link("get", index=socket.if_nametoindex(host.bridge))
        return str(link.get("address"))
    return ""


class NeighbourTable:
    """Of one container that is being restored: made ready on the way, set at the moment its link has joined."""

    def __init__(self, host: HostConfig, network: NetworkSpec) -> None:
        self._network = network
        self._gateway_mac = gateway_of(host, network)
        self._orders: Orders | None = None

    def get_ready(self, known: Mapping[str, str]) -> None:
        """Nothing is set yet. Raises BadInput for what is no address or no MAC: ``known`` comes from a peer."""
        entries = dict(list(known.items())[:MAX_NEIGHBOURS])
        if self._gateway_mac:
            entries[self._network.gateway] = self._gateway_mac
            if self._network.gateway6:
                entries[self._network.gateway6] = self._gateway_mac
        self._orders = Orders(lambda batch: _fill(batch, entries))

    def set(self, network: ContainerNetwork) -> None:
        """One system call. Without an entry a neighbour is asked for, as ever; so nothing here is an error."""
        if self._orders is not None:
            network.order(self._orders)


def _fill(batch: IPBatch, entries: Mapping[str, str]) -> None:
    for address, mac in entries.items():
        try:
            where = str(ipaddress.ip_address(address))
        except ValueError as error:
            raise BadInput(f"neighbour {address!r} is no address") from error
        if not _MAC.fullmatch(mac):
            raise BadInput(f"neighbour {address}: {mac!r} is no MAC address")
        # Stale: good for the first words, and asked for again soon afterwards.
        batch.neigh("replace", dst=where, lladdr=mac, ifindex=LATER, state=_NUD_STALE)
