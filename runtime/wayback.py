"""Connections whose addresses were translated where a container came from: they go on through that host.

A host that is its containers' way out, or publishes their ports, remembers whose packets it translates (conntrack), and
that memory does not move. What comes in for the container still goes through it and reaches the container on the new
host. What the container answers would leave the new host untranslated, under an address the peer never spoke to. So it
is led back: packets of the container's that belong to no connection this host has seen begin go to the bridge of the
host it came from.

Table ``ip cmigrate-back`` is made when it is first needed and stays; empty maps lead nowhere. A container's entry ends
ten minutes after the container has left, so that a chain of moves holds as well; the kernel removes it. The route to a
host goes when no entry needs it and the next container comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import re
import socket
from collections.abc import Sequence

from pyroute2 import IPRoute

from runtime import nft
from runtime.address import host_address
from runtime.api import ContainerSpec, NetworkSpec, PortMapping
from runtime.errors import BadInput, KernelCallFailed, ProgramFailed
from runtime.host import HostConfig
from runtime.neighbours import gateway_of

TABLE = "cmigrate-back"
GRACE_S = 600
MARKS, MARK_MASK = 0x43000000, 0xFF000000
"""Marks of packets, and numbers of routing tables: this and three bytes made from the other bridge's MAC."""
_TRANSLATED = 0x30  # linux/netfilter/nf_conntrack_common.h: IPS_SRC_NAT | IPS_DST_NAT
_RTNH_F_ONLINK = 4  # linux/rtnetlink.h
_NUD_PERMANENT = 0x80  # linux/neighbour.h
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def way_back(host: HostConfig, spec: ContainerSpec) -> str:
    """For a container of this host: the MAC a target shall lead back to; empty where this host translates nothing."""
    return gateway_of(host, spec.network) if spec.network is not None else ""


def mark_of(mac: str) -> int:
    return MARKS | int.from_bytes(hashlib.sha256(mac.encode()).digest()[:3], "big")


def next_hop(mark: int) -> str:
    """Stands for the other bridge in the route: of a range nobody has, because bridges of two hosts may share their
    address."""
    return str(ipaddress.IPv4Address(0xF0000000 | mark & ~MARK_MASK))


def back_rules() -> str:
    """The table, without elements."""
    rule = f"add rule ip {TABLE}"
    mark = "meta mark set ip saddr map @way"
    translated = f"ct status & {_TRANSLATED:#x} == 0"
    return "\n".join(
        [
            f"add table ip {TABLE}",
            f"add map ip {TABLE} way {{ type ipv4_addr : mark; flags timeout; }}",
            f"add set ip {TABLE} answers {{ type ipv4_addr . inet_service; flags timeout; }}",
            f"add set ip {TABLE} comes_from {{ type ether_addr . mark; flags timeout; }}",
            f"add set ip {TABLE} here {{ type ipv4_addr; flags timeout; }}",
            f"add chain ip {TABLE} unseen {{ type filter hook prerouting priority raw; }}",
            f"flush chain ip {TABLE} unseen",
            # With br_netfilter this host would see what passes its bridge on the way to the container, and take that
            # for the beginning of a connection through itself.
            f'{rule} unseen meta iifkind "bridge" ip daddr @here notrack',
            f"add chain ip {TABLE} prerouting {{ type filter hook prerouting priority mangle; }}",
            f"flush chain ip {TABLE} prerouting",
            # In the middle of a connection, and nothing is translated: it began elsewhere. What begins here is
            # translated from its first packet on. Answers to what this host itself has led there are left alone.
            f"{rule} prerouting tcp flags & syn == 0 ct direction original {translated} {mark}",
            # The answer to a first packet that came by the other host: this one has not seen it.
            f"{rule} prerouting tcp flags & (syn | ack) == syn | ack ct state invalid {mark}",
            # A published UDP port answers; for as long as its questions may still come by the old host.
            f"{rule} prerouting ip saddr . udp sport @answers {translated} {mark}",
            # Known to neither host, after a move there and back: not to be sent round and round.
            f"{rule} prerouting ether saddr . meta mark @comes_from drop",
            f"add chain ip {TABLE} output {{ type filter hook output priority filter; }}",
            f"flush chain ip {TABLE} output",
            # It leaves by the bridge it came from, and the container must not learn to go there itself.
            f"{rule} output icmp type redirect icmp gateway & {0xFF000000} == {0xF0000000} drop",
            "",
        ]
    )


def back_elements(
    container_id: str, address: str, ports: Sequence[PortMapping], mark: int, mac: str, *, timeout_s: int = 0
) -> str:
    """A container's entries. ``timeout_s`` 0: as long as it is here."""
    lasting = f" timeout {timeout_s}s" if timeout_s else ""
    add = f"add element ip {TABLE}"
    lines = [
        f'{add} way {{ {address}{lasting} comment "{container_id}" : {mark} }}',
        f"{add} comes_from {{ {mac} . {mark} }}",
        f"{add} here {{ {address}{lasting} }}",
    ]
    lines += [
        f"{add} answers {{ {address} . {port.container_port} timeout {GRACE_S}s }}"
        for port in ports
        if port.protocol == "udp"
    ]
    return "\n".join([*lines, ""])


def lead_back(
    host: HostConfig, container_id: str, network: NetworkSpec, ports: Sequence[PortMapping], mac: str
) -> None:
    """The container comes from the host whose bridge has this MAC. Takes tens of milliseconds: not for a blackout.

    Raises BadInput for a MAC or address that is none (both come from a peer), ProgramFailed, KernelCallFailed.
    """
    if not _MAC.fullmatch(mac):
        raise BadInput(f"way back: {mac!r} is no MAC address")
    address, mark = host_address(network), mark_of(mac)
    nft.run_nft(back_rules())
    _drop_element(address)
    for port in ports:
        nft.rule(port, address)  # checks it
    nft.run_nft(back_elements(container_id, address, ports, mark, mac))
    try:
        with IPRoute() as netlink:
            _remove_unused(netlink, {marked for _address, marked, _comment in _elements()})
            _add_route(netlink, host, mark, mac)
    except OSError as error:
        raise KernelCallFailed("netlink", f"route back to {mac}", error.errno or 0) from error


def _add_route(netlink: IPRoute, host: HostConfig, mark: int, mac: str) -> None:
    index = socket.if_nametoindex(host.bridge)
    netlink.neigh("replace", dst=next_hop(mark), lladdr=mac, ifindex=index, state=_NUD_PERMANENT)
    netlink.route("replace", dst="default", gateway=next_hop(mark), oif=index, table=mark, flags=_RTNH_F_ONLINK)
    if mark not in _ruled(netlink):
        netlink.rule("add", fwmark=mark, table=mark)


def _ruled(netlink: IPRoute) -> set[int]:
    """Marks that lead somewhere."""
    found = (rule.get("fwmark") or 0 for rule in netlink.get_rules(family=socket.AF_INET))
    return {mark for mark in found if mark & MARK_MASK == MARKS}


def _remove_unused(netlink: IPRoute, used: set[int]) -> None:
    for mark in _ruled(netlink) - used:
        netlink.rule("del", fwmark=mark, table=mark)
        netlink.flush_routes(table=mark)
        for entry in netlink.get_neighbours(dst=next_hop(mark)):
            netlink.neigh("del", dst=next_hop(mark), ifindex=entry["ifindex"])


def let_expire(container_id: str) -> None:
    """The container is not here, or here no more: its entry ends after a while. Idempotent; never raises."""
    if TABLE not in nft.tables():
        return
    with contextlib.suppress(ProgramFailed):
        for address, mark, comment in _elements():
            if comment == container_id:
                _drop_element(address)
                element = f'{address} timeout {GRACE_S}s comment "{container_id}" : {mark}'
                nft.run_nft(f"add element ip {TABLE} way {{ {element} }}\n")


def sweep_ways() -> None:
    """Remove the routes back that no container needs any more. Raises KernelCallFailed, ProgramFailed."""
    try:
        with IPRoute() as netlink:
            if marks := _ruled(netlink):
                used = {mark for _address, mark, _comment in _elements()} if TABLE in nft.tables() else set()
                if marks - used:
                    _remove_unused(netlink, used)
    except OSError as error:
        raise KernelCallFailed("netlink", "routes back", error.errno or 0) from error


def _drop_element(address: str) -> None:
    for name in ("way", "here"):
        with contextlib.suppress(ProgramFailed):  # it is not there
            nft.run_nft(f"delete element ip {TABLE} {name} {{ {address} }}\n")


def _elements() -> list[tuple[str, int, str]]:
    return parse_elements(nft.list_map(TABLE, "way"))


def parse_elements(listing: str) -> list[tuple[str, int, str]]:
    """(address, mark, comment) of each, from the JSON of ``nft -j list map``."""
    found: list[tuple[str, int, str]] = []
    for entry in json.loads(listing)["nftables"]:
        for key, mark in entry.get("map", {}).get("elem", ()):
            told = key.get("elem", {}) if isinstance(key, dict) else {"val": key}
            found.append((str(told.get("val", "")), int(mark), str(told.get("comment", ""))))
    return found
