"""Published ports of a container that has moved away: this host leads them to its address for a while.

Table ``ip cmigrate-forward``, made when it is first needed, has maps whose entries the kernel itself removes when their
time is over: no process has to be there for it, and nothing is to be undone after a crash. Empty maps lead nowhere.

Where br_netfilter is loaded, a client in the containers' own segment, on the port of the bridge through which the
container is reached now, is not led back: no frame leaves a bridge where it came in. It can ask the container itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
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


def forward_rules(ports: Sequence[PortMapping], address: str, grace_s: int) -> str:
    """Raises BadInput. What was published on one address of this host only is left out: a map knows no address."""
    where = ipaddress.IPv4Address(address)
    chains = {"prerouting": "prerouting priority dstnat", "output": "output priority -100"}
    lines = [f"add table ip {TABLE}"]
    lines += [f"add map ip {TABLE} {name} {{ {_ENTRY} }}" for name in _MAPS.values()]
    lines.append(f"add set ip {TABLE} moved {{ type ipv4_addr; flags timeout; }}")
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
        f"add element ip {TABLE} moved {{ {where} timeout {grace_s}s }}",
    ]
    for port in _for_all(ports):
        nft.rule(port, address)  # checks it
        element = f"{port.host_port} timeout {grace_s}s : {where} . {port.container_port}"
        lines.append(f"add element ip {TABLE} {_MAPS[port.protocol]} {{ {element} }}")
    return "\n".join([*lines, ""])


def _for_all(ports: Sequence[PortMapping]) -> list[PortMapping]:
    return [port for port in ports if port.host_address == nft.ANY_ADDRESS]


def forward_ports(ports: Sequence[PortMapping], network: NetworkSpec, *, grace_s: int = GRACE_S) -> None:
    """From now on, for ``grace_s`` seconds. Raises ProgramFailed, BadInput."""
    if _for_all(ports):
        stop_forwarding(ports, network)
        nft.run_nft(forward_rules(ports, host_address(network), grace_s))


def stop_forwarding(ports: Sequence[PortMapping], network: NetworkSpec) -> None:
    """Whoever publishes these ports here now has them. Nothing happens where none is forwarded."""
    if not _for_all(ports) or TABLE not in nft.tables():
        return
    entries = [f"{_MAPS[port.protocol]} {{ {port.host_port} }}" for port in _for_all(ports)]
    for entry in [*entries, f"moved {{ {host_address(network)} }}"]:
        # One by one: what is not there makes the whole transaction fail.
        with contextlib.suppress(ProgramFailed):
            nft.run_nft(f"delete element ip {TABLE} {entry}\n")
