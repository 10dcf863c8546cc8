"""Greetings, and the loop that answers."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from migrate.errors import MigrateError, MoveRefused, NoCommonProtocol, PeerFailed, ProtocolViolation
from migrate.messages import Error, Hello
from migrate.session import Asked, Dispatcher, Handler, answer_ping, exchange_hello, ping
from runtime.errors import NoRoom
from runtime.host import HostConfig
from transport.api import Channel, ChannelClosed, Deadline, Frame, TransportError
from transport.testing.memory import memory_pair

HOST = HostConfig(name="host2")


def soon() -> Deadline:
    return Deadline.after(5)


@contextmanager
def served(handlers: Mapping[str, Handler], errors: list[BaseException] | None = None) -> Iterator[Channel]:
    """The asking end of a session whose other end is answered in a thread; what that raised goes to ``errors``."""
    ours, theirs = memory_pair()
    raised: list[BaseException] = [] if errors is None else errors

    def answer() -> None:
        try:
            Dispatcher(theirs, HOST, handlers).run()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(5)
        theirs.close()
    if errors is None and raised:
        raise raised[0]


def test_both_ends_hear_who_the_other_is() -> None:
    with served({}) as channel:
        hello = exchange_hello(channel, "host1", soon())
    assert hello.host == "host2"


def test_a_ping_is_answered_by_its_pong() -> None:
    with served({"ping": answer_ping}) as channel:
        exchange_hello(channel, "host1", soon())
        for token in range(3):
            ping(channel, token, soon())


def test_an_unknown_message_is_told_and_the_session_goes_on() -> None:
    with served({"ping": answer_ping}) as channel:
        exchange_hello(channel, "host1", soon())
        channel.send(Frame.control({"type": "teleport"}), deadline=soon())
        error = Error.parse(channel.receive(deadline=soon()).message())
        assert (error.code, "teleport" in error.what) == ("unknown-message", True)
        ping(channel, 1, soon())


@pytest.mark.parametrize("message", [{}, {"type": 1}, {"type": ["a"]}, {"type": "x" * 100_000}])
def test_a_message_without_a_proper_type_is_an_unknown_one(message: dict[str, object]) -> None:
    with served({}) as channel:
        exchange_hello(channel, "host1", soon())
        channel.send(Frame.control(message), deadline=soon())
        assert Error.parse(channel.receive(deadline=soon()).message()).code == "unknown-message"


@pytest.mark.parametrize(
    ("raised", "code"),
    [(NoRoom("full", hint="empty it"), "no-room"), (MoveRefused("no"), "refused"), (OSError(5, "oops"), None)],
)
def test_an_error_of_a_handler_is_told_and_ends_the_session(raised: Exception, code: str | None) -> None:
    def fail(_asked: Asked, _message: Mapping[str, Any]) -> None:
        raise raised

    errors: list[BaseException] = []
    with served({"ask": fail}, errors) as channel:
        exchange_hello(channel, "host1", soon())
        channel.send(Frame.control({"type": "ask"}), deadline=soon())
        told = Error.parse(channel.receive(deadline=soon()).message())
        assert code in (None, told.code)
    assert errors == [raised]


def test_a_peer_that_does_not_say_hello_first_is_told_so() -> None:
    errors: list[BaseException] = []
    with served({}, errors) as channel:
        channel.send(Frame.control({"type": "offer"}), deadline=soon())
        Hello.parse(channel.receive(deadline=soon()).message())
        with pytest.raises(PeerFailed):
            Hello.parse(channel.receive(deadline=soon()).message())
    assert [type(error) for error in errors] == [ProtocolViolation]


def test_a_peer_that_speaks_only_a_later_protocol_is_refused_on_both_sides() -> None:
    errors: list[BaseException] = []
    with served({}, errors) as channel:
        late = Hello(protocol=9, oldest=9, version="9", host="host1")
        channel.send(Frame.control(late.to_message()), deadline=soon())
        Hello.parse(channel.receive(deadline=soon()).message())
        told = Error.parse(channel.receive(deadline=soon()).message())
        assert told.code == "protocol-version"
    assert [type(error) for error in errors] == [NoCommonProtocol]


def test_a_peer_that_leaves_ends_the_session_without_an_error() -> None:
    with served({}) as channel:
        exchange_hello(channel, "host1", soon())


def test_an_error_instead_of_a_hello_is_raised_as_what_it_tells() -> None:
    ours, theirs = memory_pair()
    with ours, theirs:
        error = Error(code="no-room", what="the disk is full", hint="empty it")
        theirs.send(Frame.control(error.to_message()), deadline=soon())
        with pytest.raises(PeerFailed, match="the disk is full"):
            exchange_hello(ours, "host1", soon())


def test_a_pong_with_another_token_is_no_answer() -> None:
    ours, theirs = memory_pair()
    with ours, theirs:
        theirs.send(Frame.control({"type": "pong", "token": 2}), deadline=soon())
        with pytest.raises(ProtocolViolation):
            ping(ours, 1, soon())


def test_a_peer_that_is_gone_is_an_error_for_who_asks() -> None:
    ours, theirs = memory_pair()
    with ours:
        theirs.close()
        with pytest.raises((ChannelClosed, TransportError, MigrateError)):
            exchange_hello(ours, "host1", soon())
