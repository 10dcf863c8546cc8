"""The UDP sockets of a network namespace, and what waits in one of them, read without taking it away."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Generator

from runtime.linux.inet_diag import Address, InetDiag, InetSocket, without_mapping

# asm-generic/socket.h, linux/in.h, linux/in6.h, linux/udp.h
SO_PEEK_OFF = 42
IP_PKTINFO = 8
IPV6_RECVPKTINFO, IPV6_PKTINFO = 49, 50
UDP_GRO = 104
# A datagram has at most 65507 bytes, and what the kernel joins for UDP_GRO at most one packet's.
_DATA_BYTES, _ANCILLARY_BYTES = 65536, 512
# A UDP socket is TCP_ESTABLISHED when it is connected, and TCP_CLOSE otherwise (net/tcp_states.h).
_ANY_STATE = 1 << 1 | 1 << 7


class UdpTable(InetDiag):
    """Of the network namespace of the thread that makes this, for as long as it is open. One caller at a time.

    All raise KernelCallFailed where the kernel has no udp_diag.
    """

    def __init__(self) -> None:
        super().__init__(socket.IPPROTO_UDP)

    def all(self) -> list[InetSocket]:
        """About 0.05 ms."""
        return list(self.sockets(_ANY_STATE))


def peek(queue: socket.socket) -> Generator[tuple[Address, int, Address | None, bytes], None, None]:
    """Who sent it from which port, to which address (None where the kernel does not say), its data: the datagrams that
    wait, in their order. They stay where they are.

    Nobody else may read from the socket meanwhile. Two of its options are others until the iterator ends or is closed.
    """
    level, option = _packet_information(queue)
    told_before = queue.getsockopt(level, option)
    peeks_at = queue.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    queue.setsockopt(level, option, 1)
    # Since Linux 4.6 each peek at a UDP socket begins where the last one ended.
    queue.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        while (taken := _next(queue)) is not None:
            data, ancillary, sender = taken
            source = without_mapping(ipaddress.ip_address(sender[0].partition("%")[0]))
            destination, segment_bytes = _read(ancillary)
            step = segment_bytes or len(data) or 1
            for start in range(0, len(data) or 1, step):
                yield source, sender[1], destination, data[start : start + step]
    finally:
        queue.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, peeks_at)
        queue.setsockopt(level, option, told_before)


def _next(queue: socket.socket) -> tuple[bytes, list[tuple[int, int, bytes]], tuple[str, int]] | None:
    # An ICMP error that the program has not heard of yet is told first, and once.
    for attempt in range(2):
        try:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            data, ancillary, _flags, sender = queue.recvmsg(_DATA_BYTES, _ANCILLARY_BYTES, flags)
            return data, ancillary, sender
        except BlockingIOError:
            return None
        except OSError:
            if attempt:
                raise
    return None


def _packet_information(queue: socket.socket) -> tuple[int, int]:
    if queue.family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, IPV6_RECVPKTINFO
    return socket.IPPROTO_IP, IP_PKTINFO


def _read(ancillary: list[tuple[int, int, bytes]]) -> tuple[Address | None, int]:
    """Where it was sent to; how long each datagram is, where the kernel has joined several (UDP_GRO), else 0."""
    destination: Address | None = None
    segment_bytes = 0
    for level, kind, content in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            destination = ipaddress.ip_address(content[8:12])  # struct in_pktinfo: index, local address, address
        elif (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
            destination = without_mapping(ipaddress.ip_address(content[:16]))  # struct in6_pktinfo: address, index
        elif (level, kind) == (socket.IPPROTO_UDP, UDP_GRO):
            (segment_bytes,) = struct.unpack("=i", content[:4])
    return destination, segment_bytes
