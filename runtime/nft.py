"""nftables rules of this host: masquerading, forwarding, published ports. Texts are made by pure functions.

Table ``ip cmigrate`` is the host's, made anew by every ``ensure_bridge``; ``ip cmigrate-ID`` is one container's. Both
are replaced in one transaction, so a rule is there or not, and never twice. The nft program and not netlink: its text
is what an operator sees in ``nft list ruleset``, and nobody waits for it while a container is frozen.
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.api import PortMapping
from runtime.errors import BadInput, ProgramFailed

HOST_TABLE = "cmigrate"
NFT_TIMEOUT_S = 10
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
ANY_ADDRESS = "0.0.0.0"


@dataclass(frozen=True, kw_only=True)
class ForwardChain:
    """A base chain of somebody else that drops what it does not know, as docker and many firewalls have."""

    family: str
    table: str
    name: str


def run_nft(script: str) -> str:
    """One transaction of the nft program; what it printed. Raises ProgramFailed."""
    return _nft(["-f", "-"], script)


def list_map(table: str, name: str) -> str:
    """A map of table ``ip TABLE``, as nft's JSON. Raises ProgramFailed."""
    return _nft(["-j", "list", "map", "ip", table, name])


def list_set(family: str, table: str, name: str) -> str:
    """A set of any table, as nft's JSON. Raises ProgramFailed."""
    return _nft(["-j", "list", "set", family, table, name])


def tables(family: str = "ip") -> list[str]:
    """Names of all tables of a family; empty where there is no nft."""
    try:
        lines = _nft(["list", "tables", family]).splitlines()
    except ProgramFailed:
        return []
    return [line.split()[2] for line in lines if line.startswith(f"table {family} ")]


def _nft(arguments: Sequence[str], script: str = "") -> str:
    try:
        done = subprocess.run(
            ["nft", *arguments],
            input=script,
            capture_output=True,
            text=True,
            timeout=NFT_TIMEOUT_S,
            env=ENVIRONMENT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramFailed(f"nft: {error}", hint="install nftables") from error
    if done.returncode:
        raise ProgramFailed(f"nft: {done.stderr.strip()}", hint="is nf_tables there? cmigrate doctor tells")
    return done.stdout


def container_table(container_id: str) -> str:
    return f"{HOST_TABLE}-{container_id}"


def host_rules(*, bridge: str, subnet: str, table: str = HOST_TABLE) -> str:
    """Containers reach the world under the host's address, and nothing on the host's loopback."""
    return replace_table(
        table,
        "chain postrouting {",
        " type nat hook postrouting priority srcnat;",
        f' ip saddr {subnet} ip daddr != {subnet} oifname != "{bridge}" masquerade',
        "}",
        # The bridge has route_localnet, so that published ports answer on loopback: without this rule a container
        # could send to 127.0.0.1 and would reach what listens there (as in CVE-2020-8558). Before conntrack, which
        # rewrites answers to what the host itself asked.
        "chain loopback {",
        " type filter hook prerouting priority raw;",
        f' iifname "{bridge}" ip daddr 127.0.0.0/8 drop',
        "}",
    )


def published_rules(table: str, ports: Sequence[PortMapping], *, address: str, subnet: str) -> str:
    """Host ports lead to ``address``, from other hosts, this host, its loopback, and containers beside this one.

    Raises BadInput for what is no port or address: specs come from peers as well.
    """
    rules = [f" fib daddr type local {rule(port, address)}" for port in ports]
    return replace_table(
        table,
        "chain prerouting {",
        " type nat hook prerouting priority dstnat;",
        *rules,
        "}",
        "chain output {",
        " type nat hook output priority -100;",
        *rules,
        "}",
        "chain postrouting {",
        " type nat hook postrouting priority srcnat;",
        # Whoever is in one segment with the container would get its answer directly, from an address it never asked.
        f" ip saddr {{ 127.0.0.0/8, {subnet} }} ip daddr {address} ct status dnat masquerade",
        "}",
    )


def rule(port: PortMapping, address: str) -> str:
    """``[ip daddr A] tcp dport H dnat to ADDRESS:C``. Raises BadInput."""
    for number in (port.host_port, port.container_port):
        if not isinstance(number, int) or not 0 < number < 65536:
            raise BadInput(f"{number!r} is no port", hint="a number from 1 to 65535")
    if port.protocol not in ("tcp", "udp"):
        raise BadInput(f"{port.protocol!r} is no protocol of ports", hint="tcp or udp")
    try:
        on = str(ipaddress.IPv4Address(port.host_address))
    except ValueError as error:
        raise BadInput(f"published port {port.host_port}: {error}", hint="an IPv4 address of this host") from error
    where = "" if on == ANY_ADDRESS else f"ip daddr {on} "
    return f"{where}{port.protocol} dport {port.host_port} dnat to {address}:{port.container_port}"


def replace_table(table: str, *lines: str) -> str:
    body = "\n".join(f" {line}" for line in lines)
    return f"table ip {table} {{}}\ndelete table ip {table}\ntable ip {table} {{\n{body}\n}}\n"


def remove_table(table: str) -> str:
    # Made first, so that the removal succeeds whether or not it was there.
    return f"table ip {table} {{}}\ndelete table ip {table}\n"


def remove_criu_tables() -> None:
    """The network locks of a CRIU that died, in the calling thread's network namespace (CRIU names them CRIU-<id>)."""
    for family in ("inet", "ip", "ip6"):
        for name in tables(family):
            if name.startswith("CRIU-"):
                run_nft(f"delete table {family} {name}\n")


def dropping_chains(listing: str) -> Iterator[ForwardChain]:
    """Chains at the forward hook whose policy is drop, in the text of ``nft list chains``."""
    family = table = name = ""
    for line in listing.splitlines():
        words = line.split()
        if words[:1] == ["table"] and len(words) >= 3:
            family, table = words[1], words[2]
        elif words[:1] == ["chain"] and len(words) >= 2:
            name = words[1]
        elif family in ("ip", "inet") and re.search(r"\bhook forward\b.*\bpolicy drop;", line):
            yield ForwardChain(family=family, table=table, name=name)


def forwarding_rules(chain: ForwardChain, bridge: str) -> str:
    """At the top of the chain: what containers send, the answers, and what came for a published port."""
    place = f"insert rule {chain.family} {chain.table} {chain.name}"
    conditions = ("ct status dnat", "ct state established,related")
    lines = [f'{place} oifname "{bridge}" {condition} accept' for condition in conditions]
    return "\n".join([*lines, f'{place} iifname "{bridge}" accept', ""])


def allow_forwarding(bridge: str, listing: str) -> None:
    """Let traffic of ``bridge`` through other people's chains that would drop it; ``listing`` is of all chains."""
    for chain in dropping_chains(listing):
        if f'iifname "{bridge}" accept' not in _nft(["list", "chain", chain.family, chain.table, chain.name]):
            run_nft(forwarding_rules(chain, bridge))
