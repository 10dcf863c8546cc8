"""A container's network: one veth between its namespace and the host's bridge, address, routes, published ports.

The container owns its namespace (docs/adr/0001); everything here is done from outside by netlink, given the pid of its
first process. "The host" is the network namespace this runs in, which need not be the machine's first one.

What must be quick is quick: ``attach`` is six netlink messages, ``connect`` and ``disconnect`` are one each. Whatever
makes the kernel wait for all its processors (deleting links, closing packet sockets, nftables) happens outside.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from runtime import nft
from runtime.address import allocate_address, host_address, mac_for, subnet_of
from runtime.announcements import announcements, ipv6_interface, protocol_of
from runtime.api import NetworkSpec, PortMapping
from runtime.errors import KernelCallFailed, RuntimeFault
from runtime.forwarding import stop_forwarding
from runtime.host import HostConfig
from runtime.inside import LINK_INSIDE, InsideSockets, configure, inside_orders, open_sockets
from runtime.linux import calls
from runtime.networks import BRIDGE_PATTERN
from runtime.nft import run_nft
from runtime.orders import LATER, Orders, route_socket

# 50, 200 and 1000 ms after the first announcement.
AGAIN_S = (0.05, 0.15, 0.8)

T = TypeVar("T")


def link_name(container_id: str) -> str:
    """The host side's name: at most 15 characters, the kernel's limit."""
    return f"cm{container_id}"


def ensure_bridge(host: HostConfig) -> None:
    """The bridge with its address, forwarding, and masquerading towards the outside. Idempotent.

    Ports that others gave the bridge (an uplink), and a MAC that it has already, stay as they are.
    """
    own = host.bridge_address or f"{host.gateway}/{subnet_of(host).prefixlen}"
    with IPRoute() as netlink, _netlink_call(f"bridge {host.bridge}"):
        if _index(host.bridge) is None:
            with _tolerating(errno.EEXIST):
                # A MAC of its own: else the bridge takes the lowest of its ports', which come and go with containers,
                # and everybody who remembers the gateway's MAC would lose it.
                netlink.link("add", ifname=host.bridge, kind="bridge", address=_random_mac(), br_forward_delay=0)
        index = socket.if_nametoindex(host.bridge)
        with _tolerating(errno.EEXIST):
            address, _, prefix = own.partition("/")
            netlink.addr("add", index=index, address=address, prefixlen=int(prefix))
        if host.gateway6:
            gateway = ipv6_interface(host.gateway6)
            with _tolerating(errno.EEXIST):
                prefix6 = gateway.network.prefixlen
                netlink.addr("add", index=index, family=socket.AF_INET6, address=str(gateway.ip), prefixlen=prefix6)
        netlink.link("set", index=index, state="up")
    _set_sysctl("ipv4/ip_forward", "1")
    if host.gateway6:
        _set_sysctl("ipv6/conf/all/forwarding", "1")
    _set_sysctl(f"ipv4/conf/{host.bridge}/route_localnet", "1")
    table = bridge_table(host.bridge)
    chains = run_nft(nft.host_rules(bridge=host.bridge, subnet=host.subnet, table=table) + "list chains\n")
    nft.allow_forwarding(host.bridge, chains)


def bridge_table(bridge: str) -> str:
    """The nft table for all of a bridge's containers."""
    return f"{nft.HOST_TABLE}-{bridge}" if BRIDGE_PATTERN.fullmatch(bridge) else nft.HOST_TABLE


def remove_bridge(bridge: str) -> None:
    """Of a user-defined network, with its rules. Idempotent."""
    with IPRoute() as netlink, _netlink_call(f"bridge {bridge}"):
        index = _index(bridge)
        if index is not None:
            with _tolerating(errno.ENODEV):
                netlink.link("del", index=index)
    run_nft(nft.remove_table(bridge_table(bridge)))


def _random_mac() -> str:
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x43, *secrets.token_bytes(4)))


def _set_sysctl(name: str, value: str) -> None:
    file = Path("/proc/sys/net", name)
    try:
        if file.read_text().strip() != value:
            file.write_text(value)
    except OSError as error:
        raise KernelCallFailed(
            "write", f"{value} to {file}", error.errno or 0, hint="is /proc/sys read-only?"
        ) from error


@contextlib.contextmanager
def _netlink_call(target: str) -> Iterator[None]:
    """What the kernel refuses inside is raised as KernelCallFailed."""
    try:
        yield
    except NetlinkError as error:
        raise KernelCallFailed("netlink", target, error.code) from error
    except OSError as error:
        raise KernelCallFailed("netlink", target, error.errno or 0) from error


@contextlib.contextmanager
def _tolerating(*codes: int) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.code not in codes:
            raise


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def in_network_namespace(pid: int, action: Callable[[], T]) -> T:
    """Run ``action`` in the network namespace of ``pid``, in a thread of its own that ends afterwards.

    A network namespace can be entered by one thread of many (setns(2)), unlike a user or mount namespace.
    Raises OSError when the process is gone, and whatever ``action`` raises.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            with open(f"/proc/{pid}/ns/net") as namespace:
                calls.setns(namespace.fileno(), calls.CLONE_NEWNET)
            result.append(action())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


@dataclass(frozen=True, kw_only=True)
class LinkStatistics:
    """Since the container came to this host, as the container sees it."""

    received_bytes: int
    sent_bytes: int
    received_packets: int
    sent_packets: int
    dropped_packets: int


class ContainerNetwork:
    """The network of one container, as the host sees it. Keeps a netlink socket: use as context manager or close."""

    def __init__(self, host: HostConfig, container_id: str) -> None:
        self._host = host
        self._name = link_name(container_id)
        self._table = nft.container_table(container_id)
        self._netlink: IPRoute | None = None
        self._inside: InsideSockets | None = None
        self._outside: socket.socket | None = None
        self._orders: tuple[Orders, Orders] | None = None
        self._announcements: tuple[bytes, ...] = ()
        self._link_index: int | None = None
        self._bridge_index: int | None = None
        self._hairpin = False

    def __enter__(self) -> ContainerNetwork:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None
        if self._inside is not None:
            self._inside.close()
            self._inside = None
        if self._outside is not None:
            self._outside.close()
            self._outside = None

    def _socket(self) -> IPRoute:
        if self._netlink is None:
            self._netlink = IPRoute()
        return self._netlink

    def get_ready(self, network: NetworkSpec) -> None:
        """Make everything that ``attach`` needs, before there is a namespace. Raises BadInput for a bad address."""
        self._announcements = announcements(network)
        self.look_up()
        # Made where it belongs: moving a link from one namespace to another takes the kernel ten times as long.
        peer = {"ifname": LINK_INSIDE, "net_ns_pid": LATER, "address": network.mac}
        link = Orders(lambda batch: batch.link("add", ifname=self._name, kind="veth", state="up", peer=peer))
        self._orders = link, inside_orders(network)
        self._outside = route_socket()

    def attach(self, init_pid: int, network: NetworkSpec, *, connect: bool = True) -> None:
        """Give the namespace of ``init_pid`` its link, address and routes; ``connect`` joins the bridge as well.

        Raises KernelCallFailed, and BadInput for an address that is none; nothing is left on the host then.
        """
        if self._orders is None:
            self.get_ready(network)
        assert self._orders is not None
        link, inside = self._orders
        try:
            with _netlink_call(f"link {self._name}"):
                self._add_veth(link, init_pid)
                self._inside = in_network_namespace(init_pid, lambda: configure(inside))
            if connect:
                self.connect()
        except BaseException:
            self._delete_link()
            raise

    def _add_veth(self, order: Orders, init_pid: int) -> None:
        assert self._outside is not None
        try:
            order.perform(self._outside, init_pid)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            self._delete_link()  # of a container that ended while nobody looked
            order.perform(self._outside, init_pid)
        self._link_index = _index(self._name)

    def look_up(self) -> None:
        """Open the socket and find link and bridge now, so that ``connect`` and ``disconnect`` are one message each."""
        self._socket()
        self._link_index = _index(self._name)
        self._bridge_index = _index(self._host.bridge)
        if self._link_index is not None:
            with _netlink_call(f"link {self._name}"):
                (link,) = self._socket().link("get", index=self._link_index)
            self._hairpin = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_MODE") == 1

    def open_inside(self, init_pid: int, network: NetworkSpec) -> None:
        """For a container that runs already: get ready to ``announce`` its address."""
        self._announcements = announcements(network)
        with _netlink_call(f"namespace of {init_pid}"):
            self._inside = in_network_namespace(init_pid, open_sockets)

    def connect(self) -> None:
        """The container's frames reach the bridge from here on. Two messages for one that publishes ports."""
        if self._link_index is None or self._bridge_index is None:
            self.look_up()
        for name, index in ((self._name, self._link_index), (self._host.bridge, self._bridge_index)):
            if index is None:
                raise RuntimeFault(f"link {name} is gone", hint="was it deleted by hand?")
        with _netlink_call(f"link {self._name}, port of {self._host.bridge}"):
            self._socket().link("set", index=self._link_index, master=self._bridge_index)
            if self._hairpin:
                self._socket().brport("set", index=self._link_index, mode=1)

    def disconnect(self) -> None:
        """No frame goes in or out. Nothing happens for a container without a link."""
        if self._link_index is None:
            self.look_up()
        if self._link_index is not None:
            with _netlink_call(f"link {self._name}"):
                self._socket().link("set", index=self._link_index, master=0)

    def announce(self, times: int = 3) -> None:
        """Gratuitous ARP, for IPv6 a neighbour advertisement, from inside the container's namespace: every bridge on
        the way learns where the MAC is."""
        if self._inside is not None:
            with _netlink_call(f"announcement by {LINK_INSIDE}"):
                for frame in self._announcements * times:
                    self._inside.packet.sendto(frame, (LINK_INSIDE, protocol_of(frame)))

    def order(self, orders: Orders) -> None:
        """About the link inside, after ``attach``; one system call. Nobody looks whether they are carried out."""
        if self._inside is not None:
            with contextlib.suppress(OSError):
                orders.send(self._inside.route, self._inside.link_index)

    def announce_again(self, pauses_s: Sequence[float] = AGAIN_S) -> None:
        """A frame can be lost, and a switch be slow to learn: announce once more after each pause. Does not wait for
        it; this object does not announce any more."""
        inside, self._inside = self._inside, None
        if inside is None:
            return

        def body() -> None:
            # The container may end or move on meanwhile: then there is nobody to announce.
            with contextlib.closing(inside), contextlib.suppress(OSError):
                for pause_s in pauses_s:
                    time.sleep(pause_s)
                    for frame in self._announcements:
                        inside.packet.sendto(frame, (LINK_INSIDE, protocol_of(frame)))

        threading.Thread(target=body, name="announce", daemon=True).start()

    def publish(self, ports: Sequence[PortMapping], network: NetworkSpec) -> None:
        """Lead host ports to the container, from other hosts and from this one. Raises BadInput, ProgramFailed."""
        if ports:
            stop_forwarding(ports, network)
            subnet = str(subnet_of(self._host))
            run_nft(nft.published_rules(self._table, ports, address=host_address(network), subnet=subnet))
            self._let_it_reach_itself()

    def _let_it_reach_itself(self) -> None:
        """Frames may leave by the port they came from: a container that asks for its own published port.

        Where br_netfilter is loaded, ports are rewritten inside the bridge and not on the way through the host.
        """
        if self._link_index is None:
            self.look_up()
        self._hairpin = True
        if self._link_index is not None:
            with _netlink_call(f"link {self._name}"), _tolerating(errno.EOPNOTSUPP, errno.EINVAL):  # no port yet
                self._socket().brport("set", index=self._link_index, mode=1)

    def unpublish(self) -> None:
        run_nft(nft.remove_table(self._table))

    def detach(self) -> None:
        """Remove link and rules. Idempotent; the namespace itself goes with the container's last process."""
        with _netlink_call(f"link {self._name}"):
            self._delete_link()
        if self._table in nft.tables():
            self.unpublish()

    def _delete_link(self) -> None:
        index = _index(self._name)
        if index is not None:
            with _tolerating(errno.ENODEV):
                self._socket().link("del", index=index)
        self._link_index = None

    def statistics(self) -> LinkStatistics | None:
        """None for a container without a link."""
        index = _index(self._name)
        if index is None:
            return None
        with _netlink_call(f"link {self._name}"):
            (link,) = self._socket().link("get", index=index)
        # What the host's side receives is what the container sent.
        counts = link.get("stats64")
        return LinkStatistics(
            received_bytes=int(counts["tx_bytes"]),
            sent_bytes=int(counts["rx_bytes"]),
            received_packets=int(counts["tx_packets"]),
            sent_packets=int(counts["rx_packets"]),
            dropped_packets=int(counts["tx_dropped"] + counts["rx_dropped"]),
        )


__all__ = [
    "ContainerNetwork",
    "LinkStatistics",
    "allocate_address",
    "ensure_bridge",
    "in_network_namespace",
    "link_name",
    "mac_for",
    "run_nft",
]
