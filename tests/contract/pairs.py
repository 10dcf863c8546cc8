"""One way to make both ends of a channel for each kind there is."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tests.contract.sshd import SshServer
from transport.api import Deadline, Peer
from transport.channel import StreamChannel
from transport.local import spawn
from transport.ssh import SshConnector
from transport.streams import FdStream, SocketStream
from transport.testing.faulty import FaultyChannel
from transport.testing.memory import memory_pair
from transport.tls import TlsConnector, TlsListener, create_identity

FAR_END = Path(__file__).with_name("far_end.py")
CONNECT_S = 20.0
# A far end lives until the test ends, so there is no use in waiting for it when the near one is closed first.
CLOSE_GRACE_S = 0.2
CLIENT = create_identity("client")
SERVER = create_identity("server")


@dataclass(frozen=True)
class Pair:
    near: StreamChannel
    far: StreamChannel


KINDS = ("memory", "faultless", "socketpair", "pipes", "local", "tls", "sealed", "ssh")


@contextmanager
def make_pair(kind: str, directory: Path, server: SshServer | None) -> Iterator[Pair]:
    """Both ends, open; closed at the end, the far one first."""
    with ExitStack() as undo:
        if kind in ("local", "ssh"):
            yield _remote_pair(kind, directory, server, undo)
            return
        if kind == "memory":
            near, far = memory_pair()
        elif kind == "faultless":
            plain, far = memory_pair()
            near = FaultyChannel(plain)
        elif kind == "socketpair":
            near, far = (StreamChannel(SocketStream(sock), _peer()) for sock in socket.socketpair())
        elif kind == "pipes":
            near, far = pipe_pair()
        else:
            near, far = tls_pair(sealed=kind == "sealed")
        undo.callback(near.close)
        undo.callback(far.close)
        yield Pair(near, far)


def pipe_pair() -> tuple[StreamChannel, StreamChannel]:
    (back_r, back_w), (there_r, there_w) = os.pipe(), os.pipe()
    return StreamChannel(FdStream(back_r, there_w), _peer()), StreamChannel(FdStream(there_r, back_w), _peer())


def tls_pair(*, sealed: bool) -> tuple[StreamChannel, StreamChannel]:
    deadline = Deadline.after(CONNECT_S)
    accepted: list[StreamChannel] = []
    with TlsListener("127.0.0.1", 0, identity=SERVER, trusted=lambda: {"client": CLIENT.cert_pem}) as listener:
        server = threading.Thread(
            target=lambda: accepted.append(cast(StreamChannel, listener.accept(deadline=deadline)))
        )
        server.start()
        connector = TlsConnector(
            host="127.0.0.1",
            port=listener.port,
            identity=CLIENT,
            peer_cert_pem=SERVER.cert_pem,
            name="server",
            sealed=sealed,
        )
        near = cast(StreamChannel, connector.connect(deadline=deadline))
        server.join()
    return near, accepted[0]


def _remote_pair(kind: str, directory: Path, server: SshServer | None, undo: ExitStack) -> Pair:
    path = directory / "far"
    argv = [sys.executable, "-I", "-S", str(FAR_END), str(path)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(CONNECT_S)
        if kind == "local":
            near = spawn(argv, close_grace_s=CLOSE_GRACE_S)
        else:
            assert server is not None
            near = connector_to(server, argv).connect(deadline=Deadline.after(CONNECT_S))
        undo.callback(near.close)
        control, _ = listener.accept()
    undo.callback(control.close)
    _, fds, _, _ = socket.recv_fds(control, 1, 2)
    far = StreamChannel(FdStream(*fds), _peer())
    undo.callback(far.close)
    return Pair(cast(StreamChannel, near), far)


def connector_to(server: SshServer, argv: Sequence[str]) -> SshConnector:
    return SshConnector(
        address=server.address,
        command=argv,
        host_keys=[server.host_key],
        identity_files=[server.identity],
        allow_agent=False,
        close_grace_s=CLOSE_GRACE_S,
    )


def _peer() -> Peer:
    return Peer(name="other end", transport="local", detail="test")
