"""Sockets of a network namespace as sock_diag(7) tells them: quicker than /proc/PID/net, which walks the hash of the
whole machine's connections (2 ms for each read of its TCP table)."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from runtime.errors import KernelCallFailed

# linux/netlink.h, linux/sock_diag.h
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP = 0x001, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
ANSWER_BYTES = 1 << 16

_HEADER = struct.Struct("=LHHLL")  # struct nlmsghdr: bytes, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBL48x")  # struct inet_diag_req_v2: family, protocol, extensions, padding, states, socket
# struct inet_diag_msg: family, state, timer, retransmits; ports, addresses; expiry, receive and send queue, uid, inode
_ANSWER = struct.Struct("=BBBB2s2s16s16s12xLLLLL")
# The kernel module that answers for a protocol.
_MODULES = {socket.IPPROTO_TCP: "tcp_diag", socket.IPPROTO_UDP: "udp_diag"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True)
class InetSocket:
    """Addresses as the socket has them. ``waiting``: of a listener connections that nobody has accepted yet, of any
    other bytes in its receive queue, with what the kernel needs to keep them. ``inode`` 0: no process has it open."""

    family: int
    local: Address
    local_port: int
    remote: Address
    remote_port: int
    waiting: int
    inode: int


class InetDiag:
    """Of the network namespace of the thread that makes this, for as long as it is open. One caller at a time.

    All raise KernelCallFailed where the kernel has no module for the protocol.
    """

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)

    def sockets(self, states: int) -> Iterator[InetSocket]:
        """Of both families; ``states`` is a mask of 1 << TCP_*, as in net/tcp_states.h."""
        for answer in self.answers(states):
            yield from parse_sockets(answer, self._protocol)

    def answers(self, states: int) -> Iterator[bytes]:
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, self._protocol, 0, 0, states)
            size = _HEADER.size + len(request)
            header = _HEADER.pack(size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 0, 0)
            self._socket.send(header + request)
            over = False
            while not over:
                answer = self._socket.recv(ANSWER_BYTES)
                over = any(kind in (NLMSG_DONE, NLMSG_ERROR) for kind, _body in _messages(answer))
                yield answer

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _messages(answer: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(answer):
        size, kind, *_rest = _HEADER.unpack_from(answer, at)
        if size < _HEADER.size:
            return
        yield kind, answer[at + _HEADER.size : at + size]
        at += (size + 3) & ~3


def parse_sockets(answer: bytes, protocol: int = socket.IPPROTO_TCP) -> Iterator[InetSocket]:
    """Of one datagram from the kernel. Raises KernelCallFailed for an error in it."""
    for kind, body in _messages(answer):
        if kind == NLMSG_ERROR:
            number = -int.from_bytes(body[:4], "little", signed=True)
            # ENOENT: the kernel was built without it, or may not load its module.
            what = f"sock_diag: no {_MODULES[protocol]}" if number == errno.ENOENT else "sock_diag"
            raise KernelCallFailed(what, f"network namespace of process {os.getpid()}", number)
        if kind == SOCK_DIAG_BY_FAMILY and len(body) >= _ANSWER.size:
            family, _state, _timer, _retransmits, *rest = _ANSWER.unpack_from(body)
            port, peer_port, address, peer, _expiry, waiting, _sending, _uid, inode = rest
            size = 16 if family == socket.AF_INET6 else 4
            yield InetSocket(
                family=family,
                local=ipaddress.ip_address(address[:size]),
                local_port=int.from_bytes(port, "big"),
                remote=ipaddress.ip_address(peer[:size]),
                remote_port=int.from_bytes(peer_port, "big"),
                waiting=waiting,
                inode=inode,
            )


def without_mapping(address: Address) -> Address:
    """The IPv4 address that an IPv6 socket shows as ::ffff:a.b.c.d."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
