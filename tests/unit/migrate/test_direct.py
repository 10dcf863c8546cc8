"""Both ends of a session agree on whether they go on over a direct connection, whatever comes in between."""

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from migrate.direct import answer_direct, go_direct
from migrate.errors import ProtocolViolation
from migrate.messages import Hello
from migrate.session import Asked, Dispatcher, answer_ping, ping
from runtime.host import HostConfig
from transport.api import Channel, Deadline, Frame, TransportError
from transport.direct import KEY_BYTES, DirectChannel
from transport.testing.memory import memory_pair

HOST = HostConfig(name="host2")
TIMEOUT_S = 60.0


def soon() -> Deadline:
    return Deadline.after(TIMEOUT_S)


@pytest.fixture
def by_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 40000 127.0.0.1 22")


@contextmanager
def asking(question: Any) -> Iterator[Channel]:
    """``question(channel)`` runs in a thread at one end; the other, handed out, answers here, where signals arrive."""
    ours, theirs = memory_pair()
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            question(ours)
        except BaseException as error:
            raised.append(error)
        finally:
            ours.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield theirs
    finally:
        thread.join(TIMEOUT_S)
        theirs.close()
    if raised:
        raise raised[0]


def answer_all(channel: Channel) -> None:
    handlers = {"direct": answer_direct, "ping": answer_ping}
    Dispatcher(channel, HOST, handlers).go_on(Hello(version="1", host="host1"))


def test_both_go_on_over_a_direct_connection(by_ssh: None) -> None:
    def question(session: Channel) -> None:
        before = session.bytes_sent
        channel, why = go_direct(session, "127.0.0.1", soon())
        assert (isinstance(channel, DirectChannel), why) == (True, "")
        spent = session.bytes_sent - before
        with channel:
            ping(channel, 7, soon())
            assert session.bytes_sent - before == spent

    with asking(question) as theirs:
        answer_all(theirs)


def test_a_port_that_can_not_be_reached_leaves_both_on_the_session(by_ssh: None) -> None:
    def question(session: Channel) -> None:
        channel, why = go_direct(session, "127.0.0.2", soon())  # it listens on 127.0.0.1 alone
        assert channel is session
        assert "127.0.0.2" in why
        ping(channel, 7, soon())

    with asking(question) as theirs:
        answer_all(theirs)


def test_without_an_address_of_the_ssh_server_both_stay_on_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION", raising=False)

    def question(session: Channel) -> None:
        channel, why = go_direct(session, "127.0.0.1", soon())
        assert channel is session
        assert why
        ping(channel, 7, soon())

    with asking(question) as theirs:
        answer_all(theirs)


def test_an_older_target_is_not_asked_twice() -> None:
    def question(session: Channel) -> None:
        channel, why = go_direct(session, "127.0.0.1", soon())
        assert channel is session
        assert "knows no message" in why
        ping(channel, 7, soon())

    with asking(question) as theirs:
        Dispatcher(theirs, HOST, {"ping": answer_ping}).go_on(Hello(version="1", host="host1"))


KEYS = {"dialling_key": bytes(KEY_BYTES), "listening_key": bytes([1]) * KEY_BYTES}


@pytest.mark.parametrize(
    "answer",
    [
        {"type": "meet", "port": 1 << 16, **KEYS},
        {"type": "meet", "port": "22", **KEYS},
        {"type": "meet", "port": 22, **KEYS, "listening_key": b"short"},
        {"type": "meet", "port": 22, **KEYS, "listening_key": bytes(KEY_BYTES)},
        {"type": "meet", "port": 22},
        {"type": "findings"},
    ],
)
def test_an_answer_that_does_not_fit_is_a_breach(answer: Mapping[str, Any]) -> None:
    ours, theirs = memory_pair()
    with ours, theirs:
        theirs.send(Frame.control(answer), deadline=soon())
        with pytest.raises(ProtocolViolation):
            go_direct(ours, "127.0.0.1", soon())


@pytest.mark.parametrize("word", [{"type": "met", "taken": True}, {"type": "met"}, {"type": "offer"}])
def test_a_last_word_that_does_not_fit_is_a_breach(by_ssh: None, word: Mapping[str, Any]) -> None:
    ours, theirs = memory_pair()
    with ours, theirs:
        ours.send(Frame.control(word), deadline=soon())
        with pytest.raises(ProtocolViolation):
            answer_direct(Asked(host=HOST, channel=theirs, peer_hello=Hello(version="1", host="host1")), {})


def test_a_source_that_dies_after_it_got_through_leaves_no_connection_open(by_ssh: None) -> None:
    met: list[socket.socket] = []

    def question(session: Channel) -> None:
        session.send(Frame.control({"type": "direct"}), deadline=soon())
        answer = session.receive(deadline=soon()).message()
        met.append(socket.create_connection(("127.0.0.1", int(str(answer["port"]))), TIMEOUT_S))

    with asking(question) as theirs, pytest.raises(TransportError):
        answer_direct_once(theirs)
    with met[0] as left:
        left.settimeout(TIMEOUT_S)
        assert left.recv(1) == b""


def answer_direct_once(channel: Channel) -> None:
    channel.receive(deadline=soon())
    answer_direct(Asked(host=HOST, channel=channel, peer_hello=Hello(version="1", host="host1")), {})


def test_where_nothing_can_listen_nothing_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "fe80::2%no-link 40000 fe80::1%no-link 22")
    ours, theirs = memory_pair()
    with ours, theirs:
        answer_direct(Asked(host=HOST, channel=theirs, peer_hello=Hello(version="1", host="host1")), {})
        assert ours.receive(deadline=soon()).message()["type"] == "error"
