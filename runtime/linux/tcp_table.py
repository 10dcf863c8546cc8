"""/proc/PID/net/tcp and tcp6: the connections of a network namespace.

Reading them walks the hash of the whole machine's connections: milliseconds.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# net/tcp_states.h, all that have a socket and a peer: not TCP_SYN_RECV, TCP_TIME_WAIT, TCP_CLOSE, TCP_LISTEN.
_CONNECTED = frozenset({"01", "02", "04", "05", "08", "09", "0B"})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _address(text: str) -> Address:
    # The kernel prints each 32 bits in the order of this machine.
    return ipaddress.ip_address(b"".join(bytes.fromhex(text[n : n + 8])[::-1] for n in range(0, len(text), 8)))


@dataclass(frozen=True, kw_only=True)
class TcpConnection:
    """One end of a connection. ``family_bits`` is 32 or 128: of its socket, which may be IPv6 where the peer is not."""

    local: Address
    local_port: int
    remote: Address
    remote_port: int
    family_bits: int

    def __str__(self) -> str:
        return f"{_shown(self.local, self.local_port)} - {_shown(self.remote, self.remote_port)}"


def _shown(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _plain(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def parse_connections(lines: Iterable[str]) -> Iterator[TcpConnection]:
    """Of one table's lines, header included: what is open or being opened or closed. Mapped addresses become IPv4."""
    for line in itertools.islice(lines, 1, None):
        local, remote, state = line.split(maxsplit=4)[1:4]
        if state in _CONNECTED:
            here, _, here_port = local.partition(":")
            there, _, there_port = remote.partition(":")
            yield TcpConnection(
                local=_plain(_address(here)),
                local_port=int(here_port, 16),
                remote=_plain(_address(there)),
                remote_port=int(there_port, 16),
                family_bits=len(here) * 4,
            )


def connections(pid: int) -> list[TcpConnection]:
    """In the network namespace of ``pid``; none where it is gone."""
    found: list[TcpConnection] = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{name}") as table:
            found += parse_connections(table)
    return found
