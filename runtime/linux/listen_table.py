"""Who listens for TCP connections in a network namespace, and how many wait there to be accepted: sock_diag(7).

/proc/PID/net/tcp says the same, and walks the hash of the whole machine's connections for it: 2 ms for each read.
"""

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

# linux/netlink.h, linux/sock_diag.h, net/tcp_states.h
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP = 0x001, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
LISTEN_STATE = 1 << 10
ANSWER_BYTES = 1 << 16

_HEADER = struct.Struct("=LHHLL")  # struct nlmsghdr: bytes, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBL48x")  # struct inet_diag_req_v2: family, protocol, extensions, padding, states, socket
# struct inet_diag_msg: family, state, timer, retransmits, port and address of this end; later receive queue
_ANSWER = struct.Struct("=BBBB2s2x16s28xLL12x")


@dataclass(frozen=True, kw_only=True)
class Listener:
    """``waiting`` connections stand and nobody has accepted them yet."""

    port: int
    loopback: bool
    waiting: int


class ListenTable:
    """Of the network namespace of the thread that makes this, for as long as it is open. One caller at a time."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)

    def listeners(self) -> list[Listener]:
        """Raises KernelCallFailed, where the kernel has no tcp_diag."""
        return [*self._of(socket.AF_INET), *self._of(socket.AF_INET6)]

    def waiting_connections(self) -> int:
        return sum(listener.waiting for listener in self.listeners())

    def _of(self, family: int) -> Iterator[Listener]:
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, LISTEN_STATE)
        size = _HEADER.size + len(request)
        header = _HEADER.pack(size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 0, 0)
        self._socket.send(header + request)
        while True:
            yield from parse_listeners(answer := self._socket.recv(ANSWER_BYTES))
            if _ends(answer):
                return

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


def _ends(answer: bytes) -> bool:
    return any(kind == NLMSG_DONE for kind, _body in _messages(answer))


def parse_listeners(answer: bytes) -> Iterator[Listener]:
    """Of one datagram from the kernel. Raises KernelCallFailed for an error in it."""
    for kind, body in _messages(answer):
        if kind == NLMSG_ERROR:
            number = -int.from_bytes(body[:4], "little", signed=True)
            # ENOENT: the kernel was built without it, or may not load its module.
            what = "sock_diag: no tcp_diag" if number == errno.ENOENT else "sock_diag"
            raise KernelCallFailed(what, f"network namespace of process {os.getpid()}", number)
        if kind == SOCK_DIAG_BY_FAMILY and len(body) >= _ANSWER.size:
            family, _state, _timer, _retransmits, port, address, _expires, waiting = _ANSWER.unpack_from(body)
            ip = ipaddress.ip_address(address if family == socket.AF_INET6 else address[:4])
            yield Listener(port=int.from_bytes(port, "big"), loopback=ip.is_loopback, waiting=waiting)
