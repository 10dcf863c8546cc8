"""A short cut for a session that goes through something slow: a TCP connection of its own between the same two ends.

The two ends trust each other already and have a secret way to talk, SSH say. Through it the answering end names a port
and two keys that were made for this one connection; what flows on it is sealed under them (transport/sealed.py).
Whoever else connects to that port can say nothing that is understood, and is hung up on.
"""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from dataclasses import dataclass

from transport.api import Channel, Deadline, Frame, Peer, ProtocolError, TransportError
from transport.channel import StreamChannel
from transport.closing import Closing
from transport.delegating import DelegatingChannel
from transport.sealed import KEY_BYTES, SealedStream, new_key, supported
from transport.tcp import accept, dial, listen

__all__ = ["KEY_BYTES", "DirectChannel", "DirectListener", "Meeting", "dial_direct", "supported"]

FIRST_WORD_S = 2.0
"""How long who connects may take to prove that it has the key. Others wait meanwhile."""
_KNOCK = {"type": "direct"}


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What who dials has to know. The keys are secret: ``dialling_key`` is what the dialling end seals with."""

    port: int
    dialling_key: bytes
    listening_key: bytes


class DirectListener(Closing):
    """Waits on one address for the one connection that has the keys of ``meeting``."""

    def __init__(self, address: str) -> None:
        """Raises ConnectFailed where nothing can listen there."""
        self._socket = listen(address, 0)
        port = int(self._socket.getsockname()[1])
        self.meeting = Meeting(port=port, dialling_key=new_key(), listening_key=new_key())

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait(self, other: Channel, deadline: Deadline) -> bool:
        """Until somebody connects, True, or something is to be received on ``other``."""
        while not deadline.expired():
            if _readable(self._socket, 0.05):
                return True
            if other.readable(0):
                return False
        return False

    def take(self, peer: Peer) -> Channel | None:
        """Who has connected, if it proves to be the one."""
        sock = accept(self._socket, deadline=Deadline.after(0))
        meeting = self.meeting
        channel = _channel(sock, peer, send_key=meeting.listening_key, receive_key=meeting.dialling_key)
        deadline = Deadline.after(FIRST_WORD_S)
        try:
            _expect_knock(channel, deadline)
            channel.send(Frame.control(_KNOCK), deadline=deadline)
        except (TransportError, OSError):
            channel.abort()
            channel.close()
            return None
        return channel

    def close(self) -> None:
        self._socket.close()


def dial_direct(host: str, meeting: Meeting, peer: Peer, *, deadline: Deadline) -> Channel:
    """Raises TransportError where the port can not be reached, or what answers does not have the keys."""
    sock = dial(host, meeting.port, deadline=deadline, hint="the port may be closed to this host")
    channel = _channel(sock, peer, send_key=meeting.dialling_key, receive_key=meeting.listening_key)
    try:
        channel.send(Frame.control(_KNOCK), deadline=deadline)
        _expect_knock(channel, deadline)
    except BaseException:
        channel.abort()
        channel.close()
        raise
    return channel


def _channel(sock: socket.socket, peer: Peer, *, send_key: bytes, receive_key: bytes) -> Channel:
    return StreamChannel(SealedStream(sock, send_key=send_key, receive_key=receive_key), peer)


def _expect_knock(channel: Channel, deadline: Deadline) -> None:
    if channel.receive(deadline=deadline).message() != _KNOCK:
        raise ProtocolError("the first word on a direct connection is another one")


def _readable(sock: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class DirectChannel(DelegatingChannel):
    """A direct connection, and the session that brought it about, which stays open for as long. Owns both."""

    def __init__(self, direct: Channel, session: Channel) -> None:
        super().__init__(direct)
        self._session = session

    def abort(self) -> None:
        super().abort()
        self._session.abort()

    def close(self) -> None:
        super().close()
        # The other end hears of it on the direct connection, and leaves; the session may be gone already.
        with suppress(TransportError, OSError):
            self._session.close()
