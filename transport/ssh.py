"""`ssh://`: the protocol over the stdin and stdout of a command that an SSH server runs for us, by paramiko.

The server's host key must be one that was given; there is no "accept and go on". What the command writes to stderr is
kept and put into the error when it goes away.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import paramiko
from paramiko.packet import Packetizer
from paramiko.ssh_exception import IncompatiblePeer

from transport.api import (
    AuthenticationFailed,
    Channel,
    ConnectFailed,
    Deadline,
    DeadlineExpired,
    Peer,
    ProtocolError,
)
from transport.channel import StreamChannel
from transport.sshauth import authenticate, check_host_key, load_keys, order_host_key_types
from transport.sshstream import WINDOW_BYTES, CompletedRemote, SshStream, close_transport, cut_at
from transport.tcp import dial

CLOSE_GRACE_S = 5.0
"""How long a remote command whose channel was closed may take to end by itself."""

_KEEPALIVE_S = 10
# With paramiko's 32 KiB and a window that TCP's buffer cannot hold, one transfer in ten to us fell from 220 to 50 MiB/s
# (Linux 6.18, loopback): TCP's window then opens in small steps. With 128 KiB none of 40 did.
_RECEIVED_PACKET_BYTES = 128 * 1024
_NO_LIMIT_S = 86400.0
_LOG = "transport.ssh.paramiko"
# paramiko logs whole tracebacks of what we report as errors; without a handler Python would print them.
logging.getLogger(_LOG).addHandler(logging.NullHandler())
logging.getLogger(_LOG).propagate = False
# AES-GCM has hardware for cipher and check sum, and needs one pass instead of two.
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes256-ctr")


class _Packetizer(Packetizer):
    # paramiko exchanges keys anew every 512 MiB and can deadlock when a channel closes at that moment. RFC 4344 (3.2)
    # asks for it after 2**(L/4) blocks of L bits, which is 64 GiB for AES; OpenSSH's default is the same.
    REKEY_BYTES = 2**36
    REKEY_PACKETS = 2**31


@dataclass(frozen=True, kw_only=True)
class SshAddress:
    host: str
    port: int = 22
    user: str = "root"

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


class HostKey(NamedTuple):
    """A host key as known_hosts files write it, and its fingerprint as people compare it."""

    type: str
    base64: str
    fingerprint: str


def fetch_host_key(address: SshAddress, *, deadline: Deadline) -> HostKey:
    """The key that the server shows, believed without proof: for a person to compare, or for trust on first use."""
    with _connecting(address, (), deadline) as transport:
        key = transport.get_remote_server_key()
    close_transport(transport)
    return HostKey(key.get_name(), key.get_base64(), key.fingerprint)


@dataclass(frozen=True, kw_only=True)
class SshConnector:
    """Reaches a program that `command` starts on `address`.

    `host_keys` are the keys (type, base64) of which the server must show one. Without `identity_files` the usual files
    of this user are tried; keys of an SSH agent come first when `allow_agent`.
    """

    address: SshAddress
    command: Sequence[str]
    host_keys: Sequence[tuple[str, str]]
    identity_files: Sequence[Path] | None = None
    allow_agent: bool = True
    name: str = ""
    close_grace_s: float = CLOSE_GRACE_S

    def connect(self, *, deadline: Deadline) -> Channel:
        peer = Peer(name=self.name or self.address.host, transport="ssh", detail=str(self.address))
        return StreamChannel(self._open(deadline), peer)

    def run(self, stdin: bytes, *, deadline: Deadline) -> CompletedRemote:
        """Run the command to its end. Raises TransportError of all kinds when there is no exit code."""
        stream = self._open(deadline)
        try:
            return stream.communicate(stdin, deadline)
        finally:
            stream.wake()
            stream.close()

    def _open(self, deadline: Deadline) -> SshStream:
        with _connecting(self.address, self.host_keys, deadline) as transport:
            check_host_key(str(self.address), transport.get_remote_server_key(), self.host_keys)
            authenticate(transport, self.address.user, load_keys(self.identity_files), use_agent=self.allow_agent)
            channel = transport.open_session(window_size=WINDOW_BYTES, max_packet_size=_RECEIVED_PACKET_BYTES)
            channel.exec_command(shlex.join(self.command))
            transport.set_keepalive(_KEEPALIVE_S)
        return SshStream(transport, channel, close_grace_s=self.close_grace_s)


def run(
    address: SshAddress,
    argv: Sequence[str],
    *,
    host_keys: Sequence[tuple[str, str]],
    identity_files: Sequence[Path] | None = None,
    allow_agent: bool = True,
    stdin: bytes = b"",
    deadline: Deadline,
) -> CompletedRemote:
    """Run one command on `address`; options as for SshConnector."""
    connector = SshConnector(
        address=address, command=argv, host_keys=host_keys, identity_files=identity_files, allow_agent=allow_agent
    )
    return connector.run(stdin, deadline=deadline)


@contextmanager
def _connecting(
    address: SshAddress, host_keys: Sequence[tuple[str, str]], deadline: Deadline
) -> Iterator[paramiko.Transport]:
    """A transport whose keys are exchanged. When the block raises, or the deadline passes in it, it is closed; else it
    stays open and belongs to the caller."""
    with ExitStack() as undo:
        sock = dial(address.host, address.port, deadline=deadline, hint="is an SSH server running there?")
        undo.callback(sock.close)
        transport = paramiko.Transport(sock, packetizer_class=_Packetizer)
        undo.callback(close_transport, transport)
        transport.set_log_channel(_LOG)
        _configure(transport, host_keys, deadline)
        # paramiko's calls do not all take a timeout, but all of them fail when the connection does.
        with _translated(address, deadline), cut_at(deadline, sock):
            transport.start_client()
            yield transport
        undo.pop_all()


def _configure(transport: paramiko.Transport, host_keys: Sequence[tuple[str, str]], deadline: Deadline) -> None:
    remaining_s = deadline.remaining()
    limit_s = _NO_LIMIT_S if remaining_s is None else remaining_s
    transport.banner_timeout = transport.auth_timeout = transport.channel_timeout = limit_s
    transport.handshake_timeout = limit_s
    options = transport.get_security_options()
    options.ciphers = tuple(name for name in _CIPHERS if name in options.ciphers)
    options.key_types = order_host_key_types(options.key_types, host_keys)


@contextmanager
def _translated(address: SshAddress, deadline: Deadline) -> Iterator[None]:
    try:
        yield
        failure: Exception | None = None
    except (AuthenticationFailed, paramiko.SSHException, EOFError, OSError) as error:
        failure = error
    if deadline.expired():
        raise DeadlineExpired(f"{address} did not finish the SSH handshake in time") from failure
    if isinstance(failure, AuthenticationFailed):
        raise failure
    if isinstance(failure, IncompatiblePeer):
        raise ProtocolError(f"{address} and this host have no SSH algorithm in common: {failure}") from failure
    if failure is not None:
        raise ConnectFailed(
            f"no SSH session with {address}: {failure or type(failure).__name__}",
            hint="try `ssh` to that address; see the log of its SSH server",
        ) from failure
