"""Who a unix socket is connected to, sock_diag(7). Of the network namespace of the calling thread."""

from __future__ import annotations

import socket

from pyroute2.netlink.diag import UDIAG_SHOW_PEER, DiagSocket

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
