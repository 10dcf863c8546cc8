"""The TCP sockets of a network namespace, by sock_diag(7): who listens, how many wait there to be accepted, who is
connected to whom. Listeners take 0.05 ms and connections 0.5.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.linux.inet_diag import Address, InetDiag, InetSocket, parse_sockets, without_mapping

# net/tcp_states.h: of 1 << TCP_*, TCP_LISTEN, and all that have a socket and a peer, which are not TCP_SYN_RECV,
# TCP_TIME_WAIT and TCP_CLOSE.
LISTENING = 1 << 10
# TCP_ESTABLISHED, TCP_CLOSE_WAIT: what nobody has accepted yet is in these.
OPEN = 1 << 1 | 1 << 8
CONNECTED = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11


@dataclass(frozen=True, kw_only=True)
class Listener:
    """``waiting`` connections stand and nobody has accepted them yet."""

    port: int
    loopback: bool
    waiting: int


@dataclass(frozen=True, kw_only=True)
class TcpConnection:
    """One end of a connection. ``family_bits`` is 32 or 128: of its socket, which may be IPv6 where the peer is not."""

    local: Address
    local_port: int
    remote: Address
    remote_port: int
    family_bits: int

    def __str__(self) -> str:
        return f"{_shown(self.local, self.local_port)} - {_shown(self.remote, self.remote_port)}"


def _shown(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


class TcpTable(InetDiag):
    """Of the network namespace of the thread that makes this, for as long as it is open. One caller at a time.

    All raise KernelCallFailed where the kernel has no tcp_diag.
    """

    def __init__(self) -> None:
        super().__init__(socket.IPPROTO_TCP)

    def listeners(self) -> list[Listener]:
        return [listener for answer in self.answers(LISTENING) for listener in parse_listeners(answer)]

    def waiting_connections(self) -> int:
        return sum(listener.waiting for listener in self.listeners())

    def connections(self) -> list[TcpConnection]:
        """What is open or being opened or closed. Mapped addresses become IPv4."""
        return [_connection(found) for found in self.sockets(CONNECTED)]

    def unaccepted(self) -> list[TcpConnection]:
        """Those that wait in the queues of listeners: no process has them open."""
        return [_connection(found) for found in self.sockets(OPEN) if not found.inode]


def parse_listeners(answer: bytes) -> Iterator[Listener]:
    """Of one datagram from the kernel. Raises KernelCallFailed for an error in it."""
    for found in parse_sockets(answer):
        yield Listener(port=found.local_port, loopback=found.local.is_loopback, waiting=found.waiting)


def _connection(found: InetSocket) -> TcpConnection:
    return TcpConnection(
        local=without_mapping(found.local),
        local_port=found.local_port,
        remote=without_mapping(found.remote),
        remote_port=found.remote_port,
        family_bits=128 if found.family == socket.AF_INET6 else 32,
    )
