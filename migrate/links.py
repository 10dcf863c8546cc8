"""Sessions to known hosts. The one place where an inventory entry becomes a connection of some kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from migrate.inventory import HostEntry, Inventory
from migrate.messages import Hello
from migrate.session import HELLO_TIMEOUT_S, exchange_hello
from runtime.errors import BadInput
from runtime.host import HostConfig
from transport.api import Channel, ConnectFailed, Connector, Deadline, TransportError
from transport.closing import Closing

TransportName = Literal["auto", "ssh", "stream"]

STREAM_REACH_S = 2.0
"""How long `auto` waits for a TCP connection to the agent before it goes by SSH."""


@dataclass(frozen=True, kw_only=True)
class Session(Closing):
    """A conversation with a known host that has begun: hellos are exchanged. ``notes`` say what was tried in vain."""

    entry: HostEntry
    channel: Channel
    peer_hello: Hello
    notes: tuple[str, ...] = ()
    direct: bool = False
    """What is said goes over a direct connection that came about over SSH."""

    @property
    def transport(self) -> str:
        return self.channel.peer.transport

    def close(self) -> None:
        self.channel.close()


def connect(
    host: HostConfig,
    reference: str | HostEntry,
    *,
    transport: TransportName = "auto",
    direct: bool = False,
    deadline: Deadline,
) -> Session:
    """A session with a known host, from ``host``.

    ``auto`` takes the stream, which is faster, and SSH where the stream fails. A ``stream://`` or ``ssh://`` reference
    means that transport and no other. ``direct``: from SSH to a direct connection, where one comes about. Raises
    UnknownHost, BadInput, NoCommonProtocol or TransportError; when both ways fail the error tells both.
    """
    inventory = Inventory(host)
    entry = inventory.get(reference) if isinstance(reference, str) else reference
    wanted = _wanted(reference, transport)
    ways: dict[str, Callable[[], Connector]] = {
        "stream": lambda: _stream(inventory, entry, STREAM_REACH_S if wanted == "auto" else None),
        "ssh": lambda: _ssh(inventory, entry),
    }

    def open_by(way: str, notes: tuple[str, ...] = ()) -> Session:
        session = _open(host, entry, ways[way](), deadline, notes)
        return _direct(session, deadline) if direct and way == "ssh" else session

    if wanted != "auto":
        return open_by(wanted)
    failures: list[tuple[str, TransportError]] = []
    for name in ("stream", "ssh"):
        try:
            session = open_by(name, tuple(f"{way}: {why}" for way, why in failures))
        except TransportError as error:
            failures.append((name, error))
        else:
            return session
    raise _both(entry, failures)


def _wanted(reference: str | HostEntry, transport: TransportName) -> TransportName:
    scheme = reference.partition("://")[0] if isinstance(reference, str) and "://" in reference else ""
    if scheme not in ("ssh", "stream"):
        return transport
    if transport not in ("auto", scheme):
        raise BadInput(f"{reference} cannot be reached over {transport}", hint="leave one of the two out")
    return "ssh" if scheme == "ssh" else "stream"


def _open(
    host: HostConfig, entry: HostEntry, connector: Connector, deadline: Deadline, notes: tuple[str, ...] = ()
) -> Session:
    channel = connector.connect(deadline=deadline)
    try:
        hello = exchange_hello(channel, host.name, deadline.within(HELLO_TIMEOUT_S))
    except BaseException:
        channel.abort()
        channel.close()
        raise
    return Session(entry=entry, channel=channel, peer_hello=hello, notes=notes)


def _direct(session: Session, deadline: Deadline) -> Session:
    from migrate.direct import go_direct

    try:
        channel, why = go_direct(session.channel, session.entry.ssh_host, deadline)
    except BaseException:
        session.channel.abort()
        session.channel.close()
        raise
    note = f"memory goes through the SSH session, which is slower: no direct connection: {why}"
    if why:
        return replace(session, notes=(*session.notes, note))
    return replace(session, channel=channel, direct=True)


def _stream(inventory: Inventory, entry: HostEntry, reach_s: float | None) -> Connector:
    from transport.tls import TlsConnector

    if not entry.stream_host or not entry.certificate_pem:
        raise ConnectFailed(
            f"no stream address of {entry.name} is known", hint="run `cmigrate host add` for it, or use --transport ssh"
        )
    return TlsConnector(
        host=entry.stream_host,
        port=entry.stream_port,
        identity=inventory.identity(),
        peer_cert_pem=entry.certificate_pem,
        name=entry.name,
        reach_s=reach_s,
    )


def _ssh(inventory: Inventory, entry: HostEntry) -> Connector:
    # paramiko takes its time to import: only who uses it pays.
    from transport.ssh import SshAddress, SshConnector

    if not entry.ssh_host:
        raise ConnectFailed(
            f"no SSH address of {entry.name} is known", hint="run `cmigrate host add` for it, or use --transport stream"
        )
    ours = entry.login == "agent"
    return SshConnector(
        address=SshAddress(host=entry.ssh_host, port=entry.ssh_port, user=entry.ssh_user),
        command=entry.command,
        host_keys=entry.ssh_host_keys,
        identity_files=[inventory.ssh_key_file()] if ours else None,
        allow_agent=not ours,
        name=entry.name,
    )


def _both(entry: HostEntry, failures: list[tuple[str, TransportError]]) -> TransportError:
    """One error that tells both, of the class that says most: one that is not who it should be outweighs silence."""
    what = "; ".join(f"{way}: {error.what}" for way, error in failures)
    hints = dict.fromkeys(error.hint for _, error in failures if error.hint)
    decisive = next((type(error) for _, error in failures if type(error) is not ConnectFailed), ConnectFailed)
    return decisive(f"{entry.name} cannot be reached: {what}", hint="; ".join(hints))
