"""Datagrams that waited in a container's sockets where it was: sent to it again where it is restored, before anything
that came later."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from runtime.api import NetworkSpec
from runtime.datagrams import FILE, MAX_FILE_BYTES, Datagram, frames, from_file, packets
from runtime.errors import BadInput, CorruptData
from runtime.linux.inet_diag import Address
from runtime.network import in_network_namespace, link_name

# A packet that goes by the loopback link is never longer than it takes.
_UNBOUNDED = 1 << 17


def own_addresses(network: NetworkSpec | None) -> frozenset[Address]:
    """The container's, but for loopback. Raises BadInput."""
    given = (network.address, network.address6) if network is not None else ()
    try:
        return frozenset(ipaddress.ip_interface(address).ip for address in given if address)
    except ValueError as error:
        raise BadInput(f"network of the container: {error}") from error


class Redelivery:
    """To one container. ``get_ready``, ``open_inside`` when its namespace is there, ``deliver`` once, ``close``."""

    def __init__(self, container_id: str, network: NetworkSpec | None) -> None:
        self._link = link_name(container_id)
        self._network = network
        self._mac = b""
        self._own: frozenset[Address] = frozenset()
        self._orders: list[tuple[socket.AddressFamily, bytes, tuple[str, int]]] = []
        """What to send by which socket, and where to, in the order in which it waited."""
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}

    def get_ready(self, images: Path) -> None:
        """Make what is to be sent, from the file that came with the images, if there is one. Raises CorruptData, and
        BadInput for an address that is none."""
        file = images / FILE
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise CorruptData(f"{FILE} is longer than what it may hold")
            datagrams = from_file(file.read_bytes())
        except FileNotFoundError:
            return
        self._own = own_addresses(self._network)
        if self._network is not None:
            self._mac = bytes.fromhex(self._network.mac.replace(":", ""))
        self._orders = [order for number, one in enumerate(datagrams, 1) for order in self._orders_for(number, one)]
        if socket.AF_PACKET in self._families():
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
            self._sockets[socket.AF_PACKET] = socket.socket(socket.AF_PACKET, kind, 0)

    def _orders_for(self, number: int, one: Datagram) -> Iterator[tuple[socket.AddressFamily, bytes, tuple[str, int]]]:
        # The kernel takes nothing from a link that claims to come from the host itself.
        if one.source.is_loopback or one.source in self._own:
            family = socket.AF_INET if one.source.version == 4 else socket.AF_INET6
            for packet in packets(one, number, _UNBOUNDED):
                yield family, packet, (str(one.destination), 0)
        elif self._mac:
            for frame in frames(one, self._mac, number):
                yield socket.AF_PACKET, frame, (self._link, 0)

    def _families(self) -> set[socket.AddressFamily]:
        return {family for family, _packet, _to in self._orders}

    def open_inside(self, init_pid: int) -> None:
        """What the container sent to itself goes by sockets of its namespace. Raises OSError."""
        self._sockets.update(open_raw(init_pid, self._families() - {socket.AF_PACKET}))

    def deliver(self) -> None:
        """When its sockets are there and its link takes frames, before others can come by it."""
        for family, packet, to in self._orders:
            with contextlib.suppress(OSError):
                self._sockets[family].sendto(packet, to)
        self._orders = []

    def close(self) -> None:
        """Idempotent. Closing a packet socket takes the kernel ten milliseconds: not in the blackout."""
        for one in self._sockets.values():
            one.close()
        self._sockets = {}


def open_raw(init_pid: int, families: Collection[socket.AddressFamily]) -> dict[socket.AddressFamily, socket.socket]:
    """Sockets of the namespace of ``init_pid`` that send packets as they are. Raises OSError."""

    def open_all() -> dict[socket.AddressFamily, socket.socket]:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        return {family: socket.socket(family, kind, socket.IPPROTO_RAW) for family in families}

    return in_network_namespace(init_pid, open_all) if families else {}
