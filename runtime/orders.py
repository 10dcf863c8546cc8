"""Netlink messages that are made before they are needed.

pyroute2 takes up to a millisecond for a message, most of it for making it and reading the answer. What a blackout needs
is made before, with ``LATER`` in place of the one number that is not known yet (a link's index, a process), and goes
to the kernel in one system call.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

from pyroute2 import IPBatch
from pyroute2.netlink.exceptions import NetlinkError

LATER = 0x7FF0FF0F
"""No link has this index, and no process this number: it is above the kernel's limit of pids."""
_ANSWER_BYTES = 1 << 16
_NLMSG_ERROR = 2
_HEADER = struct.Struct("=LHHLL")  # struct nlmsghdr: bytes, type, flags, sequence, port
_CODE = struct.Struct("=i")


class Orders:
    """Messages that ``fill`` puts into a batch; each asks for an answer."""

    def __init__(self, fill: Callable[[IPBatch], object]) -> None:
        batch = IPBatch()
        try:
            fill(batch)
            self._data = bytes(batch.batch)
        finally:
            batch.close()
        self._count = len(_kinds(self._data))

    def send(self, sock: socket.socket, later: int) -> None:
        """Answers stay unread."""
        if self._data:
            sock.send(self._data.replace(struct.pack("=L", LATER), struct.pack("=L", later)))

    def perform(self, sock: socket.socket, later: int) -> None:
        """All of them; raises NetlinkError for the first that the kernel refused."""
        self.send(sock, later)
        codes: list[int] = []
        while len(codes) < self._count:
            answer = sock.recv(_ANSWER_BYTES)
            codes += [_CODE.unpack_from(answer, at)[0] for at, kind in _kinds(answer) if kind == _NLMSG_ERROR]
        for code in filter(None, codes):
            raise NetlinkError(-code)


def _kinds(data: bytes) -> list[tuple[int, int]]:
    """Where the body of each message begins, and what kind it is."""
    found = []
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, *_rest = _HEADER.unpack_from(data, at)
        found.append((at + _HEADER.size, kind))
        at += max((size + 3) & ~3, _HEADER.size)
    return found


def route_socket() -> socket.socket:
    """An rtnetlink socket of the network namespace that the calling thread is in."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
