"""A wire between the bridges of two hosts that share no segment, for one container that moves from one to the other.

Once it has moved, its old bridge and its new one are one segment for it and for nothing else: whoever reached it goes
on reaching it, and what a move does in a shared segment (held frames, announcements, the way back) works over the wire.

Each host has at most one wire *toward* where the container went, and some *from* where it came: over moves they are a
tree whose root is where the container is, so nothing goes in circles. A wire joins the bridges when the container is
frozen, and one that leads away from where it arrives leaves its bridge in the same moment. It is a VXLAN device; rules
in table ``bridge cmigrate-ID`` (wire_rules.py) say what crosses and for how long, and the kernel counts the time: an
idle wire carries nothing any more when its grace is over. ``sweep`` removes those, at every move and network command.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from runtime import nft
from runtime.address import host_address
from runtime.announcements import ipv6_interface, solicited_mac
from runtime.api import ContainerSpec, NetworkSpec
from runtime.errors import BadInput, KernelCallFailed, NoRoom, ProgramFailed
from runtime.forwarding import forget_address
from runtime.host import HostConfig
from runtime.neighbours import gateway_of
from runtime.networks import host_for
from runtime.orders import Orders, route_socket
from runtime.wire_rules import ALIVE, PORT, toward_name, wire_rules

_NUD_PERMANENT = 0x80  # linux/neighbour.h
SLOTS = "0123456789abcdef"
_NAME = re.compile(r"cw([0-9a-f]{12})|cv([0-9a-f]{12})[0-9a-f]")


@dataclass(frozen=True, kw_only=True)
class WireSpec:
    """What both ends must agree on. ``number`` is VXLAN's; ``source`` and ``target`` are the hosts' own addresses;
    ``grace_s``: it ends when the container has sent nothing over it for so long; 0: it stays."""

    number: int
    source: str
    target: str
    grace_s: int


@dataclass(frozen=True, kw_only=True)
class WireEnd:
    """One that is on this host. ``toward``: the container, whose ``addresses`` these are, has left by it."""

    container_id: str
    container: str
    addresses: tuple[str, ...]
    link: str
    number: int
    toward: bool
    peer: str
    received_packets: int


def wires(netlink: IPRoute) -> Iterator[WireEnd]:
    """All of this host."""
    for link in netlink.get_links():
        match = _NAME.fullmatch(link.get("ifname"))
        data = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
        if match and data is not None:
            name, *addresses = (link.get("ifalias") or "?").split()
            yield WireEnd(
                container_id=match[1] or match[2],
                container=name,
                addresses=tuple(addresses),
                link=link.get("ifname"),
                number=int(data.get("vxlan_id")),
                toward=match[1] is not None,
                peer=str(data.get("vxlan_group") or data.get("vxlan_group6") or ""),
                received_packets=int(link.get("stats64")["rx_packets"]),
            )


class ContainerWire:
    """One end of the wire of a container that is about to move. Not thread safe; close it."""

    def __init__(self, host: HostConfig, container: ContainerSpec, spec: WireSpec) -> None:
        """``container`` must have a network."""
        assert container.network is not None
        self._host = host_for(host, container.network)
        self._id, self._name = container.id, container.name
        self._network = container.network
        self._spec = spec
        self._netlink = IPRoute()
        self._route = route_socket()
        self._link = ""
        self._grace_before_s: int | None = None
        self._join: Orders | None = None

    def prepare(self, *, toward: bool) -> None:
        """Make this end, beside the bridge. Raises BadInput for what a peer says, KernelCallFailed, ProgramFailed."""
        network, spec = self._network, self._spec if toward else check_wire(self._spec)
        self._grace_before_s = grace_of(self._id)
        self._set_rules(spec.grace_s)
        with _naming(f"wire of {self._id}"):
            bridge = socket.if_nametoindex(self._host.bridge)
            if toward:
                _delete(self._netlink, toward_name(self._id))  # of an earlier move: the container is here
            self._link = toward_name(self._id) if toward else self._free_slot()
            here, there = (spec.source, spec.target) if toward else (spec.target, spec.source)
            index = self._add(here, there, bridge)
            known = [host_address(network)]
            known += [str(ipv6_interface(network.address6).ip)] if network.address6 else []
            # Who removes the wire must know what to forget.
            self._netlink.link("set", index=index, ifalias=" ".join([self._name, *known]))
            if toward:
                self._know(known, bridge)
            away = None if toward else _index(toward_name(self._id))
            self._join = Orders(lambda batch: _fill(batch, index, bridge, away))

    def _set_rules(self, grace_s: int) -> None:
        network = self._network
        own_way_out = gateway_of(self._host, network)
        script = wire_rules(
            self._id,
            address=host_address(network),
            macs=[mac for mac in (network.mac, _text(solicited_mac(network))) if mac],
            gateway=network.gateway if own_way_out else "",
            gateway6=network.gateway6 if own_way_out else "",
            grace_s=grace_s,
        )
        nft.run_nft(script)

    def _free_slot(self) -> str:
        taken = {name for _index, name in socket.if_nameindex()}
        for slot in SLOTS:
            if (name := f"cv{self._id}{slot}") not in taken:
                return name
        raise NoRoom(f"container {self._id} is led to from {len(SLOTS)} hosts", hint="cmigrate network cut")

    def _add(self, here: str, there: str, bridge: int) -> int:
        (link,) = self._netlink.link("get", index=bridge)
        six = "6" if ":" in here else ""
        # As long as the bridge's own frames: what does not fit into the way between the hosts is told to its sender by
        # the kernel (ICMP, fragmentation needed), or sent in pieces where that is allowed.
        options = {f"vxlan_local{six}": here, f"vxlan_group{six}": there, "mtu": link.get("mtu")}
        self._netlink.link(
            "add",
            ifname=self._link,
            kind="vxlan",
            vxlan_id=self._spec.number,
            vxlan_port=PORT,
            vxlan_learning=0,
            **options,
        )
        # It speaks for others and has nothing to say itself.
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{self._link}/disable_ipv6").write_text("1")
        index = socket.if_nametoindex(self._link)
        self._netlink.link("set", index=index, state="up")
        return index

    def _know(self, addresses: Sequence[str], bridge: int) -> None:
        """This host asks nobody for the container: its question would tell the container that the gateway's address is
        here, and not where the container is."""
        for address in addresses:
            self._netlink.neigh("replace", dst=address, lladdr=self._network.mac, ifindex=bridge, state=_NUD_PERMANENT)

    def join(self) -> None:
        """From here on it carries frames; one that leads away from here carries none. One system call."""
        if self._join is not None:
            with _naming(self._link):
                self._join.perform(self._route, 0)

    def arrived(self) -> None:
        """On the target, when the container runs there: it need not be led away any more."""
        with _naming(self._link):
            _delete(self._netlink, toward_name(self._id))
        forget_address(host_address(self._network))

    def left(self) -> bool:
        """On the source, when the container runs on the target. Whether anything has come over the wire. Raises
        KernelCallFailed."""
        received = 0
        with _naming(self._link):
            for end in list(wires(self._netlink)):
                if end.container_id == self._id and not end.toward and end.peer == self._spec.target:
                    _delete(self._netlink, end.link)  # the target's end of it is gone
                if end.link == self._link:
                    received = end.received_packets
        return received > 0

    def undo(self) -> None:
        """As if it had not been; one that led away leads away again. Idempotent."""
        with _naming(self._link or self._id):
            if self._link:
                _delete(self._netlink, self._link)
            away, bridge = _index(toward_name(self._id)), _index(self._host.bridge)
            if away is not None and bridge is not None:
                self._netlink.link("set", index=away, master=bridge)
        if self._grace_before_s is not None:
            self._set_rules(self._grace_before_s)
        remove_unused_table(self._id)

    def close(self) -> None:
        self._netlink.close()
        self._route.close()


def _fill(batch: IPRoute, index: int, bridge: int, away: int | None) -> None:
    if away is not None:
        batch.link("set", index=away, master=0)
    batch.link("set", index=index, master=bridge)


def remove_wires(container_id: str, *, number: int | None = None) -> None:
    """All of a container's on this host, or the one with this number. Idempotent."""
    with IPRoute() as netlink, _naming(f"wires of {container_id}"):
        for end in list(wires(netlink)):
            if end.container_id == container_id and number in (None, end.number):
                _delete(netlink, end.link)
                if end.toward:
                    forget_address(end.addresses[0])
    remove_unused_table(container_id)


def drop_toward(container_id: str) -> None:
    """The container is here, and a move of it away was broken off. Idempotent."""
    with IPRoute() as netlink, _naming(toward_name(container_id)):
        for end in [end for end in wires(netlink) if end.container_id == container_id and end.toward]:
            _delete(netlink, end.link)
            forget_address(end.addresses[0])
    remove_unused_table(container_id)


def restore_lead(host: HostConfig, container_id: str, network: NetworkSpec) -> None:
    """A move into this host was broken off: the wire that led away from here does so again. Idempotent."""
    away, bridge = _index(toward_name(container_id)), _index(host_for(host, network).bridge)
    if away is not None and bridge is not None:
        with IPRoute() as netlink, _naming(toward_name(container_id)):
            netlink.link("set", index=away, master=bridge)


def remove_unused_table(container_id: str) -> None:
    """The rules, when no wire needs them."""
    with IPRoute() as netlink:
        needed = any(end.container_id == container_id for end in wires(netlink))
    if not needed and nft.container_table(container_id) in nft.tables("bridge"):
        nft.run_nft(f"delete table bridge {nft.container_table(container_id)}\n")


def seconds_left(container_id: str) -> float:
    """Of the grace of its wires, if nothing comes: 0 when it is over, infinite where they stay."""
    return (parse_grace(_alive(container_id)) or (0, 0.0))[1]


def grace_of(container_id: str) -> int | None:
    """What its wires were given, 0: for good; None when there are none, or it is over."""
    found = parse_grace(_alive(container_id))
    return found[0] if found is not None else None


def _alive(container_id: str) -> str:
    with contextlib.suppress(ProgramFailed):
        return nft.list_set("bridge", nft.container_table(container_id), ALIVE)
    return '{"nftables": []}'


def parse_grace(listing: str) -> tuple[int, float] | None:
    """Of the set's JSON: the grace and what is left of it, both in seconds."""
    for entry in json.loads(listing)["nftables"]:
        for element in entry.get("set", {}).get("elem", ()):
            if not isinstance(element, dict):
                return 0, math.inf
            return int(element["elem"]["timeout"]), float(element["elem"]["expires"])
    return None


def sweep() -> list[str]:
    """Remove the wires whose grace is over; ids of their containers."""
    with IPRoute() as netlink:
        found = {end.container_id for end in wires(netlink)}
    over = [container_id for container_id in sorted(found) if not seconds_left(container_id)]
    for container_id in over:
        remove_wires(container_id)
    return over


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _delete(netlink: IPRoute, name: str) -> None:
    index = _index(name)
    if index is None:
        return
    try:
        (link,) = netlink.link("get", index=index)
        for address in (link.get("ifalias") or "").split()[1:] if name.startswith("cw") else ():
            for entry in netlink.get_neighbours(dst=address):
                if entry["state"] & _NUD_PERMANENT:
                    netlink.neigh("del", dst=address, ifindex=entry["ifindex"])
        netlink.link("del", index=index)
    except NetlinkError as error:
        if error.code not in (errno.ENODEV, errno.ENOENT):
            raise


def _text(mac: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in mac)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        hint = {
            errno.EOPNOTSUPP: "the kernel has no VXLAN: load the module vxlan",
            errno.EADDRNOTAVAIL: "is that address this host's own?",
        }.get(error.code, "")
        raise KernelCallFailed("netlink", what, error.code, hint=hint) from error
    except OSError as error:
        raise KernelCallFailed("netlink", what, error.errno or 0) from error


def check_wire(spec: WireSpec) -> WireSpec:
    """Of a peer's. Raises BadInput unless the target's address is this host's own and both are of one family."""
    if (":" in spec.source) != (":" in spec.target):
        raise BadInput(f"no wire between {spec.source} and {spec.target}", hint="both IPv4 or both IPv6")
    with IPRoute() as netlink:
        if any(entry.get("address") == spec.target for entry in netlink.get_addr()):
            return spec
    raise BadInput(
        f"{spec.target}, under which the source knows this host, is not its own",
        hint="a wire needs hosts that reach each other without address translation: move with --network l2",
    )
