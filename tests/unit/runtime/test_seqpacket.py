"""Messages of an end that has gone."""

import os
import socket
from collections.abc import Iterator

import pytest

from runtime.linux.seqpacket import receive


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_the_last_words_of_an_end_that_did_not_listen_are_heard(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.send(b"nobody reads this")
    theirs.send(b"first")
    theirs.send(b"last")
    theirs.close()
    assert [receive(ours, 100)[0] for _ in range(4)] == [b"first", b"last", b"", b""]


def test_descriptors_come_with_the_last_words(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.send(b"nobody reads this")
    reading, writing = os.pipe()
    socket.send_fds(theirs, [b"take it"], [writing])
    os.close(writing)
    theirs.close()
    data, (taken,) = receive(ours, 100, 1)
    assert data == b"take it"
    os.write(taken, b"through")
    assert os.read(reading, 100) == b"through"
    os.close(taken)
    os.close(reading)
    assert receive(ours, 100, 1) == (b"", [])


def test_silence_is_not_an_end(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _theirs = pair
    ours.settimeout(0.01)
    with pytest.raises(TimeoutError):
        receive(ours, 100)
