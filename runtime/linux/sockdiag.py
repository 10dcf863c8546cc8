"""sock_diag(7): who a unix socket is connected to, and TCP connections destroyed. Of the calling thread's namespace."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Sequence

from pyroute2.netlink import NETLINK_SOCK_DIAG, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR
from pyroute2.netlink.diag import SOCK_DESTROY, UDIAG_SHOW_PEER, DiagSocket, inet_diag_req

from runtime.errors import KernelCallFailed, MissingFeature
from runtime.linux.inet_diag import Address
from runtime.linux.tcp_table import TcpConnection

# Every state: the mask has one bit for each, as in linux/sock_diag.h.
ALL_STATES = 0xFFFFFFFF


def unix_peers() -> dict[int, int]:
    """inode -> inode of the other end, of every unix socket; 0 for none, or for one nobody has accepted yet."""
    with DiagSocket() as diag:
        diag.bind()
        found = {}
        for message in diag.get_sock_stats(family=socket.AF_UNIX, states=ALL_STATES, show=UDIAG_SHOW_PEER):
            found[int(message["udiag_ino"])] = int(message.get_attr("UNIX_DIAG_PEER") or 0)
        return found


# The cookie that stands for "whichever socket has these addresses", as in linux/inet_diag.h (INET_DIAG_NOCOOKIE).
_ANY_COOKIE = 0xFFFFFFFFFFFFFFFF
_ERROR_AT = 16
"""Behind the header of a netlink message: the errno, negative, of struct nlmsgerr."""
_ANSWER_BYTES = 4096
ANSWER_TIMEOUT_S = 2.0


class TcpDestroyer:
    """Destroys TCP connections of the network namespace it was made in, whoever has them open, as ``ss -K`` does.

    The peer gets a reset, and so does the program: its next call says ECONNABORTED. Made beforehand; ``destroy`` is a
    message and its answer for each connection, about 20 us.
    """

    def __init__(self) -> None:
        """Raises MissingFeature where the kernel can not (CONFIG_INET_DIAG_DESTROY, since Linux 4.5)."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        nobody = ipaddress.IPv4Address("255.255.255.255")
        probe = TcpConnection(local=nobody, local_port=1, remote=nobody, remote_port=1, family_bits=32)
        try:
            code = self._ask(probe)
        except BaseException:
            self.close()
            raise
        if code == errno.EOPNOTSUPP:
            self.close()
            raise MissingFeature(
                "the kernel can not close single connections", hint="it was built without CONFIG_INET_DIAG_DESTROY"
            )

    def destroy(self, connections: Sequence[TcpConnection]) -> None:
        """One that has ended by itself is none to destroy. Raises KernelCallFailed for any other refusal."""
        for connection in connections:
            code = self._ask(connection)
            if code not in (0, errno.ENOENT):
                raise KernelCallFailed("SOCK_DESTROY", str(connection), code)

    def _ask(self, connection: TcpConnection) -> int:
        """The kernel's errno, or 0."""
        self._socket.send(_destroy_order(connection))
        answer = self._socket.recv(_ANSWER_BYTES)
        _length, kind = struct.unpack_from("=IH", answer)
        return -int(struct.unpack_from("=i", answer, _ERROR_AT)[0]) if kind == NLMSG_ERROR else 0

    def close(self) -> None:
        self._socket.close()


def _destroy_order(connection: TcpConnection) -> bytes:
    order = inet_diag_req()
    order["header"]["type"] = SOCK_DESTROY
    order["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK
    order["sdiag_family"] = socket.AF_INET6 if connection.family_bits == 128 else socket.AF_INET
    order["sdiag_protocol"] = socket.IPPROTO_TCP
    order["idiag_states"] = ALL_STATES
    order["idiag_sport"], order["idiag_dport"] = connection.local_port, connection.remote_port
    order["idiag_src"] = _words(connection.local, connection.family_bits)
    order["idiag_dst"] = _words(connection.remote, connection.family_bits)
    order["idiag_cookie"] = _ANY_COOKIE
    order.encode()
    return bytes(order.data)


def _words(address: Address, family_bits: int) -> tuple[int, ...]:
    packed = address.packed
    if family_bits == 128 and address.version == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    return struct.unpack("!4I", packed.ljust(16, b"\0"))
