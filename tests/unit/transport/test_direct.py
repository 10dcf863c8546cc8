"""A direct connection: for who has the keys, and nobody else. On loopback."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from transport.api import Channel, ChannelClosed, Deadline, Frame, Peer, TransportError
from transport.direct import KEY_BYTES, DirectChannel, DirectListener, Meeting, dial_direct
from transport.testing.memory import memory_pair

PEER = Peer(name="other", transport="ssh", detail="")
TIMEOUT_S = 60.0


def soon() -> Deadline:
    return Deadline.after(TIMEOUT_S)


@contextmanager
def dialling(meeting: Meeting, done: list[Channel | TransportError]) -> Iterator[None]:
    def dial() -> None:
        try:
            done.append(dial_direct("127.0.0.1", meeting, PEER, deadline=soon()))
        except TransportError as error:
            done.append(error)

    thread = threading.Thread(target=dial)
    thread.start()
    try:
        yield
    finally:
        thread.join(TIMEOUT_S)


def take_next(listener: DirectListener) -> Channel | None:
    ours, theirs = memory_pair()
    with ours, theirs:
        assert listener.wait(ours, soon())
    return listener.take(PEER)


def test_who_has_the_keys_gets_through() -> None:
    done: list[Channel | TransportError] = []
    with DirectListener("127.0.0.1") as listener:
        with dialling(listener.meeting, done):
            far = take_next(listener)
        (near,) = done
        assert far is not None
        assert not isinstance(near, TransportError)
        with near, far:
            near.send(Frame.control({"type": "ping"}), deadline=soon())
            assert far.receive(deadline=soon()).message() == {"type": "ping"}


def test_who_has_other_keys_is_hung_up_on_and_the_next_one_gets_through() -> None:
    done: list[Channel | TransportError] = []
    with DirectListener("127.0.0.1") as listener:
        wrong = replace(listener.meeting, dialling_key=os.urandom(KEY_BYTES))
        with dialling(wrong, done):
            assert take_next(listener) is None
        assert isinstance(done.pop(), TransportError)
        with dialling(listener.meeting, done):
            far = take_next(listener)
        assert far is not None
        far.close()
        assert not isinstance(done[0], TransportError)
        done[0].close()


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096)])
def test_a_stranger_is_hung_up_on_whatever_it_says(words: bytes) -> None:
    with (
        DirectListener("127.0.0.1") as listener,
        socket.create_connection(("127.0.0.1", listener.meeting.port), TIMEOUT_S) as stranger,
    ):
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        assert take_next(listener) is None


def test_waiting_ends_when_something_comes_on_the_session() -> None:
    ours, theirs = memory_pair()
    with DirectListener("127.0.0.1") as listener, ours, theirs:
        theirs.send(Frame.control({"type": "met"}), deadline=soon())
        assert not listener.wait(ours, soon())
        assert not listener.wait(ours, Deadline.after(0))


def test_a_direct_channel_owns_both_connections() -> None:
    direct, far = memory_pair()
    session, session_far = memory_pair()
    channel = DirectChannel(direct, session)
    with channel:
        channel.send_data(3, [b"ab"], deadline=soon())
        assert (far.receive(deadline=soon()).tag, channel.bytes_sent) == (3, direct.bytes_sent)
        far.send(Frame.control({"type": "x"}), deadline=soon())
        assert channel.readable(TIMEOUT_S)
        channel.receive(deadline=soon())
    for end in (far, session_far):
        with pytest.raises(ChannelClosed):
            end.receive(deadline=soon())
        end.close()
