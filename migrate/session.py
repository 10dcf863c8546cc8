"""One conversation between two hosts: greetings, and the answering side's loop.

Both ends say hello first, without waiting for each other. Then the host that connected asks and the other one answers,
by the handler that the kind of question has in a table. docs/protocol.md has the messages.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from migrate.errors import MigrateError, ProtocolViolation
from migrate.messages import Error, Hello, negotiate
from runtime.criu.binary import find_criu
from runtime.errors import RuntimeFault
from runtime.host import HostConfig
from transport.api import Channel, ChannelClosed, Deadline, Frame, TransportError

HELLO_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 600.0
"""How long a session may have nothing to do before it ends by itself."""
ANSWER_TIMEOUT_S = 30.0


def package_version() -> str:
    """This cmigrate's version; "0" where it runs without having been installed."""
    try:
        return version("cmigrate")
    except PackageNotFoundError:
        return "0"


def versions() -> dict[str, str]:
    """What runs here, for the report."""
    return {"cmigrate": package_version(), "criu": find_criu().version_text, "kernel": platform.release()}


def exchange_hello(channel: Channel, host_name: str, deadline: Deadline) -> Hello:
    """Say hello, hear it, and agree on a protocol. Returns the peer's. Raises NoCommonProtocol, ProtocolViolation, what
    the peer reports instead, or TransportError."""
    ours = Hello(version=package_version(), host=host_name)
    channel.send(Frame.control(ours.to_message()), deadline=deadline)
    theirs = Hello.parse(channel.receive(deadline=deadline).message())
    negotiate(ours, theirs)
    return theirs


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a handler gets beside the message: whom it answers, on which channel, for which host."""

    host: HostConfig
    channel: Channel
    peer_hello: Hello

    def answer(self, message: Mapping[str, Any]) -> None:
        self.channel.send(Frame.control(message), deadline=Deadline.after(ANSWER_TIMEOUT_S))


Handler = Callable[[Asked, Mapping[str, Any]], None]
"""Called with one message of its kind; may go on with the channel as long as it likes. An error of ours that it raises
is told to the peer and ends the session, because nobody knows then what else is on its way."""


def answer_ping(asked: Asked, message: Mapping[str, Any]) -> None:
    asked.answer({"type": "pong", "token": message.get("token")})


HANDLERS: dict[str, Handler] = {"ping": answer_ping}
"""By type of message. migrate.target adds what a move needs."""


class Dispatcher:
    """The answering side of one session."""

    def __init__(self, channel: Channel, host: HostConfig, handlers: Mapping[str, Handler] = HANDLERS) -> None:
        self._channel = channel
        self._host = host
        self._handlers = handlers

    def run(self) -> None:
        """Until the peer closes or is silent for too long. Errors of ours and of the transport are told to the peer as
        far as it still listens, and raised."""
        try:
            hello = exchange_hello(self._channel, self._host.name, Deadline.after(HELLO_TIMEOUT_S))
        except (MigrateError, RuntimeFault, TransportError, OSError) as error:
            self._tell(error)
            raise
        self.go_on(hello)

    def go_on(self, hello: Hello) -> None:
        """As ``run``, after the greetings, which may have been exchanged on another channel."""
        try:
            asked = Asked(host=self._host, channel=self._channel, peer_hello=hello)
            while (frame := self._next()) is not None:
                self._dispatch(asked, frame.message())
        except (MigrateError, RuntimeFault, TransportError, OSError) as error:
            self._tell(error)
            raise

    def _next(self) -> Frame | None:
        try:
            return self._channel.receive(deadline=Deadline.after(IDLE_TIMEOUT_S))
        except ChannelClosed:
            return None

    def _dispatch(self, asked: Asked, message: Mapping[str, Any]) -> None:
        kind = message.get("type")
        handler = self._handlers.get(kind) if isinstance(kind, str) else None
        if handler is not None:
            handler(asked, message)
            return
        # The newer side owns compatibility: it may ask, hear that we do not know, and do without.
        what = f"cmigrate {package_version()} on {self._host.name} knows no message {str(kind)[:40]!r}"
        asked.answer(
            Error(code="unknown-message", what=what, hint="install the same version on both hosts").to_message()
        )

    def _tell(self, error: Exception) -> None:
        if isinstance(error, ChannelClosed):
            return
        try:
            answer = Frame.control(Error.of(error).to_message())
            self._channel.send(answer, deadline=Deadline.after(ANSWER_TIMEOUT_S))
        except TransportError as second:
            print(f"cmigrate: {self._channel.peer.name} could not be told: {second}", file=sys.stderr)


def ping(channel: Channel, token: int, deadline: Deadline) -> None:
    """One question and its answer, for who wants to know the round trip."""
    channel.send(Frame.control({"type": "ping", "token": token}), deadline=deadline)
    answer = channel.receive(deadline=deadline).message()
    if answer.get("type") != "pong" or answer.get("token") != token:
        raise ProtocolViolation("the peer did not answer a ping with its pong")
