"""Connections that a move would end: told beforehand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from migrate.preflight.findings import Finding, blocker, named, warning
from runtime.api import Container, Status
from runtime.connections import TcpPolicy, can_close, foreseen
from runtime.container import Containers
from runtime.linux.tcp_table import TcpConnection


def check_connections(containers: Containers, container: Container, policy: TcpPolicy) -> list[Finding]:
    """Of a running container, as it is now."""
    if container.state.status is not Status.RUNNING:
        return []
    found = foreseen(containers.host, container, policy)
    able = can_close() if found or policy == "close" else True
    return list(judge_connections(found, policy, able=able))


def judge_connections(
    found: Sequence[tuple[TcpConnection, str]], policy: TcpPolicy, *, able: bool
) -> Iterator[Finding]:
    """Pure. ``able``: the kernel can close single connections."""
    if policy == "close" and not able:
        yield blocker(
            "connections",
            "the source's kernel can not close single connections (CONFIG_INET_DIAG_DESTROY)",
            "move with --tcp keep: those that can not survive are reset by their peers later",
        )
        return
    by_reason: dict[str, list[str]] = defaultdict(list)
    for connection, why in found:
        by_reason[why].append(str(connection))
    for why, names in by_reason.items():
        many = "1 TCP connection" if len(names) == 1 else f"{len(names)} TCP connections"
        end = "will be closed at the freeze" if able else "will be reset by the peer after the move"
        yield warning("connections", f"{many} {end} ({why}): {named(names)}", "--tcp keep closes none")
