"""Which frames cross the wires of a container (wire.py), as text for nft. Pure.

To the container: what is for its address, from the bridge it has left. From it: what it says itself, and what its new
host leads back (wayback.py), so that no frame that came by a wire, or from anywhere else, is carried on. The table has
one element, the container's address, which the kernel drops when nothing has come from the container for the grace.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from runtime.errors import BadInput
from runtime.nft import container_table

ALIVE = "alive"
PORT = 7478
"""UDP, beside the agents' 7477: not VXLAN's own 4789, which others on the host may use."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def toward_name(container_id: str) -> str:
    """The wire by which the container has left."""
    return f"cw{container_id}"


def _own_way_out(came: str, gateway: str, gateway6: int) -> list[str]:
    """Each host is the way out of the containers that are on it: they do not ask for another's, nor hear of it."""
    lines = [f"oifname {came} arp operation request arp daddr ip {gateway} drop"]
    lines += [f"iifname {came} arp saddr ip {gateway} drop"]
    if gateway6:
        # The target of a neighbour solicitation (RFC 4861, section 4.3).
        lines += [f"oifname {came} icmpv6 type nd-neighbor-solicit @th,64,128 {gateway6:#x} drop"]
    return lines


def wire_rules(
    container_id: str, *, address: str, macs: Sequence[str], gateway: str, grace_s: int, gateway6: str = ""
) -> str:
    """The whole table, in one transaction. ``macs`` are the container's own and its IPv6 solicited-node one;
    ``gateway`` and ``gateway6`` are addresses that this host's bridge has itself, or empty. Raises BadInput."""
    try:
        where = str(ipaddress.IPv4Address(address))
        way_out = str(ipaddress.IPv4Address(gateway)) if gateway else ""
        way_out6 = int(ipaddress.IPv6Address(gateway6)) if gateway6 else 0
    except ValueError as error:
        raise BadInput(f"wire of {container_id}: {error}") from error
    for mac in macs:
        if not _MAC.fullmatch(mac):
            raise BadInput(f"{mac!r} is no MAC address")
    table = container_table(container_id)
    lasting = f" timeout {grace_s}s" if grace_s else ""
    lines = [
        f"set {ALIVE} {{ type ipv4_addr; flags dynamic,timeout; elements = {{ {where}{lasting} }}; }}",
        *_directions(macs, grace_s),
        *_hooks(container_id, way_out, way_out6),
    ]
    body = "\n".join(f" {line}" for line in lines)
    return f"table bridge {table} {{}}\ndelete table bridge {table}\ntable bridge {table} {{\n{body}\n}}\n"


def _directions(macs: Sequence[str], grace_s: int) -> list[str]:
    """Chains that a frame returns from if it is to, or from, the container."""
    renew = f"update @{ALIVE} {{ ip saddr timeout {grace_s}s }} " if grace_s else ""
    its_macs = "{ " + ", ".join(macs) + " }"
    return [
        "chain to_it {",
        # Whether an address is free is asked in each segment for itself.
        " arp saddr ip 0.0.0.0 drop",
        f" arp daddr ip @{ALIVE} return",
        f" ip daddr @{ALIVE} return",
        f" ether type ip6 ether daddr {its_macs} return",
        " drop",
        "}",
        "chain from_it {",
        f" arp saddr ip @{ALIVE} return",
        f" ip saddr @{ALIVE} ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 {renew}return",
        f" ip saddr @{ALIVE} return",
        f" ether type ip6 ether saddr {macs[0]} return",
        " drop",
        "}",
    ]


def _hooks(container_id: str, way_out: str, way_out6: int) -> list[str]:
    # Wires from where it came have one more character: which of them.
    toward, came = f'"{toward_name(container_id)}"', f'"cv{container_id}*"'
    places = f'{{ "cm{container_id}", "ch{container_id}", {toward} }}'
    # The mark of wayback.py has led it here, or was set, with br_netfilter, on what passes the bridge. The kernel would
    # route the packets of the wire by the mark of what is in them.
    unmarked = f" oifname {came} meta mark set 0"
    return [
        "chain forward {",
        " type filter hook forward priority 0;",
        f" iifname {came} oifname != {places} drop",
        f" iifname {came} jump to_it",
        f" oifname {came} iifname != {places} drop",
        *([f" {line}" for line in _own_way_out(came, way_out, way_out6)] if way_out else []),
        f" oifname {came} jump from_it",
        unmarked,
        f" oifname {toward} jump to_it",
        f" iifname {toward} jump from_it",
        "}",
        "chain input {",
        " type filter hook input priority 0;",
        # What was led back and was too large for the way.
        f" iifname {came} ip daddr @{ALIVE} icmp type destination-unreachable accept",
        f" iifname {came} drop",
        f" iifname {toward} jump from_it",
        "}",
        "chain output {",
        " type filter hook output priority 0;",
        unmarked,
        f" oifname {came} jump from_it",
        f" oifname {toward} jump to_it",
        "}",
    ]
