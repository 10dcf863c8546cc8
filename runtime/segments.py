"""What a bridge is joined to."""

from __future__ import annotations

import re
import socket

from pyroute2 import IPRoute

_OURS = re.compile(r"(cm|ch|cw)[0-9a-f]{12}|cv[0-9a-f]{13}")
"""Links of containers, taps that hold frames, wires."""


def has_other_ports(bridge: str) -> bool:
    """Whether anything but containers is a port of it; only then can it share its segment with another host."""
    try:
        index = socket.if_nametoindex(bridge)
    except OSError:
        return False
    with IPRoute() as netlink:
        ports = [str(link.get("ifname")) for link in netlink.get_links() if link.get("master") == index]
    return any(not _OURS.fullmatch(name) for name in ports)
