"""From SSH to a direct connection: the source asks for one, and both go on there where it comes about.

    direct                        -->                  over SSH
                                  <--  meet            a port, and a key for each direction
    (the source dials that port, and both prove over the new connection that they have the keys)
    met        taken: yes or no   -->                  over SSH; its last word there, if it is yes

Only the last word decides, so both ends always agree on where they go on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from migrate.errors import ProtocolViolation
from migrate.session import Asked, Dispatcher
from transport.api import Channel, Deadline, Frame, Peer, TransportError
from transport.direct import KEY_BYTES, DirectChannel, DirectListener, Meeting, dial_direct, supported
from transport.renewable import RenewableChannel

REACH_S = 1.0
"""How long the source tries to reach the port: one that is closed by dropping packets costs so long in each move."""
ANSWER_S = 20.0
"""How long either end waits for the other's next word about it."""


def go_direct(channel: Channel, host: str, deadline: Deadline) -> tuple[Channel, str]:
    """The channel to go on with, which owns the one given, and why it is that one still ("" where it is not).

    Raises TransportError and ProtocolViolation where nothing can be said over the session any more.
    """
    if not supported():
        return channel, "this host's library for ciphers is too old"
    deadline = deadline.within(ANSWER_S)
    channel.send(Frame.control({"type": "direct"}), deadline=deadline)
    answer = channel.receive(deadline=deadline).message()
    if answer.get("type") == "error":  # an older version, or one that has no address to listen on
        return channel, str(answer.get("what", ""))[:200]
    peer = Peer(name=channel.peer.name, transport="ssh", detail=f"{channel.peer.detail}, direct")
    try:
        direct = dial_direct(host, _meeting(answer), peer, deadline=deadline.within(REACH_S))
    except TransportError as error:
        channel.send(Frame.control({"type": "met", "taken": False}), deadline=deadline)
        return channel, error.what
    try:
        channel.send(Frame.control({"type": "met", "taken": True}), deadline=deadline)
    except BaseException:
        direct.abort()
        direct.close()
        raise
    return DirectChannel(direct, channel), ""


def _meeting(message: Mapping[str, Any]) -> Meeting:
    port, keys = message.get("port"), [message.get("dialling_key"), message.get("listening_key")]
    if message.get("type") != "meet" or not isinstance(port, int) or not 0 < port < 1 << 16:
        raise ProtocolViolation("the answer to `direct` does not fit")
    first, second = (key if isinstance(key, bytes) and len(key) == KEY_BYTES else b"" for key in keys)
    if not first or not second or first == second:
        raise ProtocolViolation("the keys of a direct connection do not fit")
    return Meeting(port=port, dialling_key=first, listening_key=second)


def answer_direct(asked: Asked, message: Mapping[str, Any]) -> None:
    """Handler of "direct". Returns at once where the source stays on the session; else when the direct conversation is
    over. Raises ProtocolViolation, TransportError, and what goes wrong in that conversation."""
    # CLIENT CPORT SERVER SPORT, of sshd(8). Listening there and nowhere else lets in only who can reach the SSH server.
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4 or not supported():
        asked.answer({"type": "error", "code": "unsupported", "what": "no direct connection can be had here"})
        return
    try:
        listener = DirectListener(words[2])
    except TransportError as error:
        asked.answer({"type": "error", "code": "unsupported", "what": error.what})
        return
    with listener:
        direct = _meet(asked, listener)
    if direct is not None:
        _serve(direct, asked)


def _meet(asked: Asked, listener: DirectListener) -> Channel | None:
    """Whom the source says it has become, if it says so."""
    meeting, session = listener.meeting, asked.channel
    deadline = Deadline.after(ANSWER_S)
    asked.answer(
        {
            "type": "meet",
            "port": meeting.port,
            "dialling_key": meeting.dialling_key,
            "listening_key": meeting.listening_key,
        }
    )
    peer = Peer(name=session.peer.name, transport="ssh", detail=f"{session.peer.detail}, direct")
    direct: Channel | None = None
    try:
        while direct is None and listener.wait(session, deadline):
            direct = listener.take(peer)
        word = session.receive(deadline=deadline).message()
        taken = word.get("taken")
        if word.get("type") != "met" or not isinstance(taken, bool) or (taken and direct is None):
            raise ProtocolViolation("the last word about a direct connection does not fit")
        if not taken:
            return None
        found, direct = direct, None
        return found
    finally:
        if direct is not None:
            direct.abort()
            direct.close()


def _serve(direct: Channel, asked: Asked) -> None:
    # A move goes on when another connection is put underneath.
    channel = RenewableChannel(direct)

    def cut(_number: int, _frame: FrameType | None) -> None:
        channel.abort()

    before = signal.signal(signal.SIGTERM, cut)
    try:
        with channel:
            Dispatcher(channel, asked.host).go_on(asked.peer_hello)
    finally:
        signal.signal(signal.SIGTERM, before)
