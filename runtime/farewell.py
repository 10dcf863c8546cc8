"""Clients of connections that were not accepted before a move: made to notice that these are no more.

The kernel had answered them, so they take themselves for connected, and nothing on the target knows of them. Who sends
something gets a reset. Who waits for the other side to begin would wait for ever: a segment that makes no sense in the
connection makes its kernel say where it stands (RFC 9293, section 3.10.7.4), and the answer to that is the reset.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Sequence

from runtime.api import NetworkSpec
from runtime.checksum import checksum
from runtime.linux.inet_diag import Address
from runtime.linux.tcp_table import TcpConnection
from runtime.redelivery import open_raw, own_addresses

_HOPS = 64
_ACKNOWLEDGES = 0x10  # RFC 9293, section 3.1


class Farewell:
    """``get_ready`` when the container's namespace is there, ``say`` when it runs, ``close``."""

    def __init__(self, network: NetworkSpec | None) -> None:
        self._network = network
        self._connections: tuple[TcpConnection, ...] = ()
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}

    def get_ready(self, init_pid: int, connections: Sequence[TcpConnection]) -> None:
        """Those of other addresses than the container's are left out. Raises OSError, BadInput."""
        if not connections:
            return
        own = own_addresses(self._network)
        ours = (one for one in connections if one.local in own or one.local.is_loopback)
        self._connections = tuple(one for one in ours if one.local.version == one.remote.version)
        self._sockets = open_raw(init_pid, {family_of(one.remote) for one in self._connections})

    def say(self) -> None:
        for one in self._connections:
            with contextlib.suppress(OSError):
                self._sockets[family_of(one.remote)].sendto(strange_segment(one), (str(one.remote), 0))
        self._connections = ()

    def close(self) -> None:
        """Idempotent."""
        for one in self._sockets.values():
            one.close()
        self._sockets = {}


def family_of(address: Address) -> socket.AddressFamily:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def strange_segment(connection: TcpConnection) -> bytes:
    """The packet: to the peer, with an acknowledgement and numbers that mean nothing to it."""
    addresses = connection.local.packed + connection.remote.packed
    ports = struct.pack("!HH", connection.local_port, connection.remote_port)
    # Five words of header, no window, nothing urgent.
    rest = struct.pack("!IIBBH", 0, 0, 5 << 4, _ACKNOWLEDGES, 0)
    total = checksum(addresses + struct.pack("!II", 20, socket.IPPROTO_TCP) + ports + rest)
    segment = ports + rest + struct.pack("!HH", total, 0)
    if connection.local.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, _HOPS) + addresses + segment
    start = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(segment), 0, 0, _HOPS, socket.IPPROTO_TCP)
    return start + struct.pack("!H", checksum(start + addresses)) + addresses + segment
