"""Published ports of a container that has moved away: this host leads them to its address for a while.

Table ``ip cmigrate-forward``, made when it is first needed, has maps whose entries the kernel itself removes when their
time is over: no process has to be there for it, and nothing is to be undone after a crash. Empty maps lead nowhere.

Where br_netfilter is loaded, a client in the containers' own segment, on the port of the bridge through which the
container is reached now, is not led back: no frame leaves a bridge where it came in. It can ask the container itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Sequence

from runtime import nft
from runtime.address import host_address
from runtime.api import NetworkSpec, PortMapping
from runtime.errors import ProgramFailed

TABLE = "cmigrate-forward"
GRACE_S = 600
"""Long enough for name servers and load balancers to learn where the container is now."""
_ENTRY = "type inet_service : ipv4_addr . inet_service; flags timeout;"
_MAPS = {"tcp": "by_tcp", "udp": "by_udp"}


def forward_rules(ports: Sequence[PortMapping], address: str, grace_s: int, over: tuple[str, str] | None = None) -> str:
    """Raises BadInput. What was published on one address of this host only is left out: a map knows no address.

    ``over``: addresses of this host and of the target, when the container has moved over a wire. Its new host leads its
    answers back here, so clients are seen as they are, but for these two hosts: the bridges of both have one address,
    and what the container answers to its own host goes no further. ``grace_s`` 0: for good.
    """
    where = ipaddress.IPv4Address(address)
    lasting = f" timeout {grace_s}s" if grace_s else ""
    chains = {"prerouting": "prerouting priority dstnat", "output": "output priority -100"}
    lines = [f"add table ip {TABLE}"]
    lines += [f"add map ip {TABLE} {name} {{ {_ENTRY} }}" for name in _MAPS.values()]
    lines.append(f"add set ip {TABLE} moved {{ type ipv4_addr; flags timeout; }}")
    lines.append(f"add set ip {TABLE} near {{ type ipv4_addr . ipv4_addr; flags timeout; }}")
    lines.append(f"add map ip {TABLE} under {{ type ipv4_addr : ipv4_addr; flags timeout; }}")
    for chain, hook in chains.items():
        lines += [f"add chain ip {TABLE} {chain} {{ type nat hook {hook}; }}", f"flush chain ip {TABLE} {chain}"]
        lines += [
            f"add rule ip {TABLE} {chain} fib daddr type local dnat ip to {protocol} dport map @{name}"
            for protocol, name in _MAPS.items()
        ]
    lines += [
        f"add chain ip {TABLE} postrouting {{ type nat hook postrouting priority srcnat; }}",
        f"flush chain ip {TABLE} postrouting",
        # Its answers must come back here: its way out leads through another host now.
        f"add rule ip {TABLE} postrouting ct status dnat ip daddr @moved masquerade",
        f"add rule ip {TABLE} postrouting fib saddr type local snat ip to ip daddr map @under",
        f"add rule ip {TABLE} postrouting ip saddr . ip daddr @near snat ip to ip daddr map @under",
    ]
    if over is None:
        lines.append(f"add element ip {TABLE} moved {{ {where}{lasting} }}")
    else:
        here, there = (ipaddress.IPv4Address(end) for end in over)
        lines.append(f"add element ip {TABLE} under {{ {where}{lasting} : {here} }}")
        lines.append(f"add element ip {TABLE} near {{ {there} . {where}{lasting} }}")
    for port in _for_all(ports):
        nft.rule(port, address)  # checks it
        element = f"{port.host_port}{lasting} : {where} . {port.container_port}"
        lines.append(f"add element ip {TABLE} {_MAPS[port.protocol]} {{ {element} }}")
    return "\n".join([*lines, ""])


def _for_all(ports: Sequence[PortMapping]) -> list[PortMapping]:
    return [port for port in ports if port.host_address == nft.ANY_ADDRESS]


def forward_ports(
    ports: Sequence[PortMapping],
    network: NetworkSpec,
    *,
    grace_s: int = GRACE_S,
    over: tuple[str, str] | None = None,
) -> None:
    """From now on, for ``grace_s`` seconds, 0: until ``stop_forwarding``; ``over`` as in ``forward_rules``. Raises
    ProgramFailed, BadInput."""
    if over is not None and ":" in over[0]:
        over = None  # a wire between IPv6 addresses
    if _for_all(ports) or over is not None:
        stop_forwarding(ports, network)
        nft.run_nft(forward_rules(ports, host_address(network), grace_s, over))


def stop_forwarding(ports: Sequence[PortMapping], network: NetworkSpec) -> None:
    """Whoever publishes these ports here now has them. Nothing happens where none is forwarded."""
    if TABLE not in nft.tables():
        return
    _delete([f"{_MAPS[port.protocol]} {{ {port.host_port} }}" for port in _for_all(ports)])
    _forget(host_address(network))


def forget_address(address: str) -> None:
    """Nothing leads to this address any more. Idempotent."""
    if TABLE in nft.tables():
        _delete([f"{name} {{ {key} }}" for name in _MAPS.values() for key in leading_to(_listed(name), address)])
        _forget(address)


def _forget(address: str) -> None:
    peers = [f"near {{ {peer} . {address} }}" for peer in _peers(address)]
    _delete([*peers, f"moved {{ {address} }}", f"under {{ {address} }}"])


def _delete(entries: Sequence[str]) -> None:
    for entry in entries:
        # One by one: what is not there makes the whole transaction fail.
        with contextlib.suppress(ProgramFailed):
            nft.run_nft(f"delete element ip {TABLE} {entry}\n")


def _listed(name: str) -> str:
    with contextlib.suppress(ProgramFailed):
        return nft.list_map(TABLE, name)
    return '{"nftables": []}'


def _peers(address: str) -> list[str]:
    with contextlib.suppress(ProgramFailed):
        return beside(nft.list_set("ip", TABLE, "near"), address)
    return []


def leading_to(listing: str, address: str) -> list[int]:
    """Ports of a map, as nft's JSON, that lead to this address."""
    found = []
    for entry in json.loads(listing)["nftables"]:
        for key, value in entry.get("map", {}).get("elem", ()):
            port = key["elem"]["val"] if isinstance(key, dict) else key
            if value.get("concat", [""])[0] == address:
                found.append(int(port))
    return found


def beside(listing: str, address: str) -> list[str]:
    """First halves of a set's pairs, as nft's JSON, whose second half is this address."""
    found = []
    for entry in json.loads(listing)["nftables"]:
        for element in entry.get("set", {}).get("elem", ()):
            pair = element.get("elem", {}).get("val", element)["concat"]
            if pair[1] == address:
                found.append(str(pair[0]))
    return found
