"""A container's network: one veth between its namespace and the host's bridge, address, routes, published ports.

The container owns its namespace (docs/adr/0001); everything here is done from outside by netlink, given the pid of its
first process. Rules are nftables tables of our own, one for the host and one for each container that publishes ports.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from runtime.api import NetworkSpec, PortMapping
from runtime.errors import BadInput, NoRoom, ProgramFailed, RuntimeFault
from runtime.host import HostConfig
from runtime.linux import calls

LINK_INSIDE = "eth0"
NFT_TIMEOUT_S = 10
# linux/if_ether.h, linux/if_arp.h
ETH_P_ARP = 0x0806
ARPOP_REQUEST = 1
# Written in the container's namespace before its first instruction: path below /proc/sys/net -> value.
SYSCTLS = {
    # CRIU can not dump MPTCP sockets, and Go's listeners are MPTCP by default since 1.24.
    "mptcp/enabled": "0",
    "ipv4/ping_group_range": "0 2147483647",
    "ipv4/ip_unprivileged_port_start": "0",
}

T = TypeVar("T")


def link_name(container_id: str) -> str:
    """The host side's name: at most 15 characters, the kernel's limit."""
    return f"cm{container_id}"


def mac_for(address: str) -> str:
    """Locally administered, made from the address: it moves with the container and meets no other."""
    packed = ipaddress.ip_interface(address).ip.packed[-4:]
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *packed))


def allocate_address(host: HostConfig, container_id: str, used: Iterable[str], wanted: str = "") -> NetworkSpec:
    """``wanted`` (with or without prefix length), or one made from the id: two hosts seldom choose alike.

    ``used`` are addresses of containers known here. Raises BadInput for a wanted one that does not fit, NoRoom.
    """
    subnet = ipaddress.ip_network(host.subnet)
    reserved = {ipaddress.ip_address(host.gateway), subnet.network_address, subnet.broadcast_address}
    taken = reserved | {ipaddress.ip_interface(address).ip for address in used}
    if wanted:
        try:
            chosen = ipaddress.ip_interface(wanted).ip
        except ValueError as error:
            raise BadInput(f"--ip {wanted}: {error}") from error
        if chosen not in subnet:
            raise BadInput(f"--ip {wanted} is not in {subnet}", hint="subnet is set in config.toml")
        if chosen in taken:
            raise BadInput(f"--ip {wanted} is taken")
    else:
        start = int.from_bytes(hashlib.sha256(container_id.encode()).digest()[:4], "big")
        # The last 256 addresses stay free for hosts.
        span = max(1, subnet.num_addresses - 256)
        candidates = (subnet.network_address + (start + n) % span for n in range(span))
        found = next((address for address in candidates if address not in taken), None)
        if found is None:
            raise NoRoom(f"no free address in {subnet}")
        chosen = found
    address = f"{chosen}/{subnet.prefixlen}"
    return NetworkSpec(address=address, mac=mac_for(address), gateway=host.gateway)


def ensure_bridge(host: HostConfig) -> None:
    """The bridge with its address, forwarding, and masquerading towards the outside. Idempotent."""
    own = host.bridge_address or f"{host.gateway}/{ipaddress.ip_network(host.subnet).prefixlen}"
    with IPRoute() as netlink:
        index = _index(netlink, host.bridge)
        if index is None:
            with _existing_is_fine():
                netlink.link("add", ifname=host.bridge, kind="bridge")
            index = _index(netlink, host.bridge)
            if index is None:
                raise RuntimeFault(f"bridge {host.bridge} could not be made")
        with _existing_is_fine():
            address, _, prefix = own.partition("/")
            netlink.addr("add", index=index, address=address, prefixlen=int(prefix))
        netlink.link("set", index=index, state="up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    with contextlib.suppress(OSError):
        # Published ports answer on loopback as well.
        Path(f"/proc/sys/net/ipv4/conf/{host.bridge}/route_localnet").write_text("1")
    run_nft(
        "table ip cmigrate {}\nflush table ip cmigrate\n"
        "table ip cmigrate {\nchain postrouting { type nat hook postrouting priority srcnat;"
        f' ip saddr {host.subnet} ip daddr != {host.subnet} oifname != "{host.bridge}" masquerade; }}\n}}\n'
    )


def run_nft(script: str) -> None:
    """One transaction of the nft program. Raises ProgramFailed."""
    try:
        done = subprocess.run(
            ["nft", "-f", "-"],
            input=script,
            capture_output=True,
            text=True,
            timeout=NFT_TIMEOUT_S,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramFailed(f"nft: {error}", hint="install nftables") from error
    if done.returncode:
        raise ProgramFailed(f"nft: {done.stderr.strip()}", hint="is nf_tables there? cmigrate doctor tells")


@contextlib.contextmanager
def _existing_is_fine() -> Any:
    try:
        yield
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise


def _index(netlink: IPRoute, name: str) -> int | None:
    found = netlink.link_lookup(ifname=name)
    return int(found[0]) if found else None


def in_network_namespace(pid: int, action: Callable[[], T]) -> T:
    """Run ``action`` in the network namespace of ``pid``, in a thread of its own that ends afterwards.

    A network namespace can be entered by one thread of many (setns(2)), unlike a user or mount namespace.
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


class ContainerNetwork:
    """The network of one container, as the host sees it. Keeps a netlink socket: use as context manager or close."""

    def __init__(self, host: HostConfig, container_id: str) -> None:
        self._host = host
        self._id = container_id
        self._name = link_name(container_id)
        self._table = f"cmigrate-{container_id}"
        self._netlink: IPRoute | None = None
        self._inside: socket.socket | None = None
        self._link_index: int | None = None
        self._bridge_index: int | None = None

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

    def _socket(self) -> IPRoute:
        if self._netlink is None:
            self._netlink = IPRoute()
        return self._netlink

    def attach(self, init_pid: int, network: NetworkSpec, *, connect: bool = True) -> None:
        """Give the namespace of ``init_pid`` its link, address and routes; ``connect`` joins the bridge as well."""
        netlink = self._socket()
        self._network = network
        peer = {"ifname": LINK_INSIDE, "net_ns_pid": init_pid, "address": network.mac}
        netlink.link("add", ifname=self._name, kind="veth", peer=peer)
        self.look_up()
        netlink.link("set", index=self._link_index, state="up")
        self._inside = in_network_namespace(init_pid, lambda: _configure_inside(network))
        if connect:
            self.connect()

    def look_up(self) -> None:
        """Find link and bridge now, so that ``connect`` and ``disconnect`` are one message each."""
        self._link_index = _index(self._socket(), self._name)
        self._bridge_index = _index(self._socket(), self._host.bridge)

    def connect(self) -> None:
        """The container's frames reach the bridge from here on."""
        if self._link_index is None or self._bridge_index is None:
            self.look_up()
        if self._link_index is None:
            raise RuntimeFault(f"link {self._name} is gone", hint="was it deleted by hand?")
        self._socket().link("set", index=self._link_index, master=self._bridge_index)

    def disconnect(self) -> None:
        """No frame goes in or out. Nothing happens for a container without a link."""
        if self._link_index is None:
            self.look_up()
        if self._link_index is not None:
            self._socket().link("set", index=self._link_index, master=0)

    def announce(self, times: int = 3) -> None:
        """Gratuitous ARP from inside the container's namespace: every bridge on the way learns where the MAC is."""
        if self._inside is not None:
            frame = gratuitous_arp(self._network)
            for _ in range(times):
                self._inside.send(frame)

    def publish(self, ports: Sequence[PortMapping], network: NetworkSpec) -> None:
        """Lead host ports to the container, from other hosts and from this one."""
        if not ports:
            return
        target = network.address.partition("/")[0]
        rules = [
            f"{'' if p.host_address == '0.0.0.0' else f'ip daddr {p.host_address} '}"
            f"{p.protocol} dport {p.host_port} dnat to {target}:{p.container_port}"
            for p in ports
        ]
        lines = "; ".join(f"fib daddr type local {rule}" for rule in rules)
        run_nft(
            f"table ip {self._table} {{}}\nflush table ip {self._table}\ntable ip {self._table} {{\n"
            f" chain prerouting {{ type nat hook prerouting priority dstnat; {lines}; }}\n"
            f" chain output {{ type nat hook output priority -100; {lines}; }}\n"
            " chain postrouting { type nat hook postrouting priority srcnat;"
            f" ip saddr 127.0.0.0/8 ip daddr {target} masquerade;"
            f" ip saddr {target} ip daddr {target} masquerade; }}\n}}\n"
        )

    def unpublish(self) -> None:
        # "add" first makes the delete succeed whether or not the table was there.
        run_nft(f"add table ip {self._table}\ndelete table ip {self._table}\n")

    def detach(self) -> None:
        """Remove link and rules. Idempotent; the namespace itself goes with the container's last process."""
        netlink = self._socket()
        index = _index(netlink, self._name)
        if index is not None:
            try:
                netlink.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise
        self._link_index = None
        if self._has_rules():
            self.unpublish()

    def _has_rules(self) -> bool:
        done = subprocess.run(
            ["nft", "list", "tables", "ip"], capture_output=True, text=True, timeout=NFT_TIMEOUT_S, check=False
        )
        return f"table ip {self._table}" in done.stdout.splitlines()


def _configure_inside(network: NetworkSpec) -> socket.socket:
    """In the container's namespace: sysctls, loopback, address, routes; a packet socket for announcements."""
    for name, value in SYSCTLS.items():
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/sys/net", name).write_text(value)
    address, _, prefix = network.address.partition("/")
    with IPRoute() as netlink:
        netlink.link("set", index=1, state="up")
        index = _index(netlink, LINK_INSIDE)
        netlink.addr("add", index=index, address=address, prefixlen=int(prefix))
        netlink.link("set", index=index, state="up")
        netlink.route("add", dst="default", gateway=network.gateway)
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(ETH_P_ARP))
    packets.bind((LINK_INSIDE, 0))
    return packets


def gratuitous_arp(network: NetworkSpec) -> bytes:
    """An ARP announcement (RFC 5227, section 3): sender and target address are the container's."""
    mac = bytes.fromhex(network.mac.replace(":", ""))
    address = ipaddress.ip_interface(network.address).ip.packed
    ethernet = b"\xff" * 6 + mac + struct.pack("!H", ETH_P_ARP)
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, ARPOP_REQUEST) + mac + address + b"\0" * 6 + address
    return ethernet + arp


__all__ = ["ContainerNetwork", "allocate_address", "ensure_bridge", "in_network_namespace", "link_name"]
