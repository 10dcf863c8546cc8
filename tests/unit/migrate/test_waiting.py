"""A session whose link breaks waits for another one, and gets it from another process: here, from another thread."""

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from migrate.errors import MoveRefused
from migrate.waiting import HandedOver, WaitingRoom, dismiss, door_of, hand_over
from transport.api import Channel, ChannelClosed, Deadline, Frame, Peer
from transport.channel import StreamChannel
from transport.renewable import RenewableChannel
from transport.sealed import SealedStream, new_key
from transport.streams import FdStream

MOVE = "abc"
SOON_S = 30.0


def soon() -> Deadline:
    return Deadline.after(SOON_S)


def sealed_pair(name: str = "host1") -> tuple[Channel, Channel]:
    """Source's and target's end of a stream."""
    ours, theirs = socket.socketpair()
    there, back = new_key(), new_key()
    near = SealedStream(ours, send_key=there, receive_key=back)
    far = SealedStream(theirs, send_key=back, receive_key=there)
    return (
        StreamChannel(near, Peer(name="host2", transport="stream", detail="")),
        StreamChannel(far, Peer(name=name, transport="stream", detail="")),
    )


def piped_pair(name: str = "host1") -> tuple[Channel, Channel]:
    """As an SSH server has them."""
    (read_there, write_here), (read_here, write_there) = os.pipe(), os.pipe()
    return (
        StreamChannel(FdStream(read_here, write_here), Peer(name="host2", transport="ssh", detail="")),
        StreamChannel(FdStream(read_there, write_there), Peer(name=name, transport="ssh", detail="")),
    )


class Session:
    """A target that takes numbers until it is told the end, in a thread."""

    def __init__(self, run_dir: Path, target_end: Channel, *, reconnect_s: float = SOON_S) -> None:
        self.channel = RenewableChannel(target_end)
        self.room = WaitingRoom(run_dir, MOVE, self.channel, reconnect_s=reconnect_s, output=(), notice_s=0.0)
        self.room.open()
        self.taken: list[int] = []
        self._pool = ThreadPoolExecutor(1)
        self.end: Future[str] = self._pool.submit(self.room.through, self._work, lambda: len(self.taken))

    def _work(self) -> str:
        while True:
            message = self.channel.receive(deadline=soon()).message()
            if message["type"] == "end":
                return "done"
            number = message["number"]
            assert isinstance(number, int)
            self.taken.append(number)

    def close(self) -> None:
        self.channel.abort()
        self._pool.shutdown()
        self.room.close()
        self.channel.close()


def send(channel: Channel, number: int) -> None:
    channel.send(Frame.control({"type": "number", "number": number}), deadline=soon())


def come_back(run_dir: Path, target_end: Channel) -> HandedOver | None:
    """What the process that answers the new connection does."""
    handed = hand_over(run_dir, MOVE, target_end)
    target_end.close()
    return handed


@pytest.fixture
def sessions() -> Iterator[list[Session]]:
    made: list[Session] = []
    yield made
    for session in made:
        session.close()


@pytest.mark.parametrize("pair", [sealed_pair, piped_pair])
@pytest.mark.parametrize("known", [True, False], ids=["known to be broken", "not known to be broken"])
def test_the_session_goes_on_with_all_that_it_has_on_another_link(
    tmp_path: Path, sessions: list[Session], pair: type, known: bool
) -> None:
    source, target = pair()
    session = Session(tmp_path, target)
    sessions.append(session)
    send(source, 1)
    while not session.taken:
        time.sleep(0.001)
    if known:
        source.abort()
        source.close()
    again, other = pair()
    with again:
        handed = come_back(tmp_path, other)
        assert handed is not None
        assert again.receive(deadline=soon()).message() == {
            "type": "resumed",
            "move_id": MOVE,
            "taken": 1,
            "missing_bytes": 0,
        }
        send(again, 2)
        again.send(Frame.control({"type": "end"}), deadline=soon())
        assert session.end.result(SOON_S) == "done"
        assert session.taken == [1, 2]
    handed.close()
    source.close()


def test_nobody_comes_back_and_the_broken_link_is_the_end(tmp_path: Path, sessions: list[Session]) -> None:
    source, target = sealed_pair()
    session = Session(tmp_path, target, reconnect_s=0.2)
    sessions.append(session)
    source.close()
    with pytest.raises(ChannelClosed):
        session.end.result(SOON_S)


def test_a_session_that_is_told_to_end_does_not_wait(tmp_path: Path, sessions: list[Session]) -> None:
    source, target = sealed_pair()
    session = Session(tmp_path, target)
    sessions.append(session)
    session.channel.abort()
    with pytest.raises(ChannelClosed):
        session.end.result(SOON_S)
    source.close()


def test_one_that_waits_in_vain_can_be_told_so(tmp_path: Path, sessions: list[Session]) -> None:
    source, target = sealed_pair()
    session = Session(tmp_path, target)
    sessions.append(session)
    assert not dismiss(tmp_path, MOVE, "another move", if_waiting=True), "it was not waiting"
    send(source, 1)
    source.close()
    deadline = soon()
    while not dismiss(tmp_path, MOVE, "another move has begun", if_waiting=True, wait_s=0.0):
        if session.end.done():
            break
        assert not deadline.expired()
    with pytest.raises(MoveRefused, match="another move has begun"):
        session.end.result(SOON_S)
    session.room.close()
    assert dismiss(tmp_path, MOVE, "", if_waiting=True)


def test_only_the_host_that_came_first_comes_in_again(tmp_path: Path, sessions: list[Session]) -> None:
    source, target = sealed_pair()
    session = Session(tmp_path, target)
    sessions.append(session)
    again, other = sealed_pair("mallory")
    with again, pytest.raises(ChannelClosed):
        hand_over(tmp_path, MOVE, other)
    other.close()
    send(source, 1)
    source.send(Frame.control({"type": "end"}), deadline=soon())
    assert session.end.result(SOON_S) == "done"
    source.close()


def test_where_nobody_holds_the_move_the_connection_stays_whose_it_is(tmp_path: Path) -> None:
    source, target = sealed_pair()
    with source, target:
        assert hand_over(tmp_path, MOVE, target) is None
        send(source, 1)
        assert target.receive(deadline=soon()).message()["number"] == 1


def test_a_move_without_the_wish_to_come_back_opens_no_door(tmp_path: Path) -> None:
    source, target = sealed_pair()
    with source, RenewableChannel(target) as channel:
        room = WaitingRoom(tmp_path, MOVE, channel, reconnect_s=0.0)
        room.open()
        assert not room.resumes
        assert not door_of(tmp_path, MOVE).exists()
        room.close()


def test_a_closed_room_leaves_no_door(tmp_path: Path) -> None:
    source, target = sealed_pair()
    with source, RenewableChannel(target) as channel:
        room = WaitingRoom(tmp_path / ("long" * 40), MOVE, channel, reconnect_s=1.0)
        room.open()
        assert door_of(tmp_path / ("long" * 40), MOVE).exists()
        room.close()
        room.close()
        assert not any((tmp_path / ("long" * 40)).iterdir())
