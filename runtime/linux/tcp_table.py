"""/proc/PID/net/tcp and tcp6: who listens, and how many connections wait there to be accepted."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LISTENING = "0A"  # net/tcp_states.h, TCP_LISTEN


@dataclass(frozen=True, kw_only=True)
class Listener:
    """``waiting`` connections stand and nobody has accepted them yet."""

    port: int
    loopback: bool
    waiting: int


def parse_listeners(lines: Iterable[str]) -> Iterator[Listener]:
    """Of one table's lines, header included. Listeners come first; of what follows, no more than a line is taken."""
    for line in itertools.islice(lines, 1, None):
        local, _remote, state, queues = line.split(maxsplit=5)[1:5]
        if state != _LISTENING:
            return
        address, _, port = local.partition(":")
        # The kernel prints each 32 bits in the order of this machine, and of a listener its backlog as rx_queue.
        packed = b"".join(bytes.fromhex(address[n : n + 8])[::-1] for n in range(0, len(address), 8))
        loopback = ipaddress.ip_address(packed).is_loopback
        yield Listener(port=int(port, 16), loopback=loopback, waiting=int(queues.partition(":")[2], 16))


def listeners(pid: int) -> list[Listener]:
    """In the network namespace of ``pid``; none where it is gone."""
    found: list[Listener] = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{name}") as table:
            found += parse_listeners(table)
    return found


def waiting_connections(pid: int) -> int:
    return sum(listener.waiting for listener in listeners(pid))
