"""Which of a container's TCP connections can not survive a move, and the end of those while their peers still hear it.

The container's address moves along, so whoever reaches that address reaches it afterwards. Connections whose
packets the host translates go on through it (wayback.py). What does not move is the host itself, where it is one end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Literal

from runtime.api import Container, NetworkSpec
from runtime.errors import MissingFeature
from runtime.host import HostConfig
from runtime.linux.sockdiag import TcpDestroyer
from runtime.linux.tcp_table import TcpConnection, TcpTable
from runtime.neighbours import gateway_of
from runtime.network import in_network_namespace

TcpPolicy = Literal["auto", "keep", "close"]
"""``keep`` all; ``close`` all but those inside the container; ``auto``: close what can not survive."""


def is_inside(connection: TcpConnection) -> bool:
    """Both ends are the container's: they move together."""
    return connection.remote.is_loopback or connection.remote == connection.local


def fate(connection: TcpConnection, network: NetworkSpec, *, host_is_gateway: bool) -> str:
    """Why the connection can not survive a move, or nothing. Pure.

    ``host_is_gateway``: this host's bridge has the gateway's address, as the target's has after the move.
    """
    remote = connection.remote
    if is_inside(connection) or not host_is_gateway:
        # Another machine is the way out: it finds the container's address wherever it is.
        return ""
    if str(remote) in (network.gateway, network.gateway6):
        return "its peer is this host, and that address will be the target's"
    return ""


def lost_connections(
    found: Iterable[TcpConnection], network: NetworkSpec, policy: TcpPolicy, *, host_is_gateway: bool
) -> list[tuple[TcpConnection, str]]:
    """Those that a move under this policy ends, each with the reason. Pure."""
    if policy == "keep":
        return []
    if policy == "close":
        return [(connection, "asked for") for connection in found if not is_inside(connection)]
    judged = ((connection, fate(connection, network, host_is_gateway=host_is_gateway)) for connection in found)
    return [(connection, why) for connection, why in judged if why]


def foreseen(host: HostConfig, container: Container, policy: TcpPolicy) -> list[tuple[TcpConnection, str]]:
    """What would be closed if the container moved now."""
    network = container.spec.network
    if network is None or policy == "keep":
        return []
    here = bool(gateway_of(host, network))
    try:
        table = in_network_namespace(container.state.init_pid, TcpTable)
    except OSError:
        return []  # it has ended meanwhile
    with table:
        return lost_connections(table.connections(), network, policy, host_is_gateway=here)


def can_close() -> bool:
    """Whether this kernel can end single connections."""
    try:
        with contextlib.closing(TcpDestroyer()):
            return True
    except MissingFeature:
        return False


class ConnectionCloser:
    """Of one container that will be frozen. Made beforehand; ``close_lost`` is quick."""

    def __init__(self, host: HostConfig, container: Container, policy: TcpPolicy) -> None:
        """Raises MissingFeature where the kernel can not close single connections and that was asked for."""
        self._pid = container.state.init_pid
        self._network = container.spec.network
        self._policy = policy
        self._destroyer: TcpDestroyer | None = None
        self._table: TcpTable | None = None
        self._host_is_gateway = False
        if self._network is None or policy == "keep":
            return
        self._host_is_gateway = bool(gateway_of(host, self._network))
        if policy == "auto" and not self._host_is_gateway:
            return  # nothing can be lost: nobody has to look
        try:
            self._destroyer = in_network_namespace(self._pid, TcpDestroyer)
            self._table = in_network_namespace(self._pid, TcpTable)
        except MissingFeature:
            if policy == "close":
                raise

    def close_lost(self) -> tuple[str, ...]:
        """End them now, when the program stands still and its link still leads to the peers; what was closed."""
        if self._destroyer is None or self._table is None or self._network is None:
            return ()
        lost = lost_connections(
            self._table.connections(), self._network, self._policy, host_is_gateway=self._host_is_gateway
        )
        self._destroyer.destroy([connection for connection, _why in lost])
        return tuple(str(connection) for connection, _why in lost)

    def close(self) -> None:
        if self._destroyer is not None:
            self._destroyer.close()
            self._destroyer = None
        if self._table is not None:
            self._table.close()
            self._table = None
