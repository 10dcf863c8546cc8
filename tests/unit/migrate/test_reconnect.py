"""When a move whose link broke begins again: the other end is a thread that answers what a target would."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from migrate.errors import CanNotResume, RolledBack
from migrate.inventory import HostEntry
from migrate.links import Session
from migrate.messages import Answer, Hello
from migrate.observe import Event, LinkBack
from migrate.reconnect import Line
from runtime.host import HostConfig
from transport.api import Channel, ChannelClosed, ConnectFailed, Deadline, DeadlineExpired, Frame, TransportError
from transport.testing.memory import memory_pair

GONE = "gone"
"""Instead of an answer: the link breaks again."""


@dataclass(kw_only=True)
class Target:
    """Answers the questions that come on each new connection by its lines, one connection after the other."""

    answers: Sequence[Sequence[str]]
    connections: int = 0
    unreachable: bool = False
    events: list[Event] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    _ends: list[Channel] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def line(self, tmp_path: Path, *, limit_s: float = 30.0) -> Line:
        host = HostConfig(name="host1", config_dir=tmp_path, state_dir=tmp_path)
        return Line(host, self.session(()), lambda *_args, **_words: self.connect(), self, limit_s=limit_s)

    def connect(self) -> Session:
        if self.unreachable:
            raise ConnectFailed("nobody is there")
        self.connections += 1
        return self.session(self.answers[self.connections - 1])

    def session(self, answers: Sequence[str]) -> Session:
        ours, theirs = memory_pair()
        self._ends += [ours, theirs]
        self._threads.append(threading.Thread(target=self._answer, args=(theirs, answers)))
        self._threads[-1].start()
        entry = HostEntry(name="host2", ssh_host="", stream_host="")
        return Session(entry=entry, channel=ours, peer_hello=Hello(version="1", host="host2"))

    def _answer(self, channel: Channel, answers: Sequence[str]) -> None:
        for state in answers:
            try:
                question = channel.receive(deadline=Deadline.after(30)).message()
            except TransportError:
                return
            self.asked.append(f"{question['type']} {question['move_id']}")
            if state == GONE:
                channel.abort()
                return
            answer = Answer(move_id="abc", epoch=1, state=state)
            channel.send(Frame.control(answer.to_message()), deadline=Deadline.after(30))

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        for end in self._ends:
            end.abort()
        for thread in self._threads:
            thread.join(30)
        for end in self._ends:
            end.close()


@pytest.fixture
def targets() -> Iterator[list[Target]]:
    made: list[Target] = []
    yield made
    for target in made:
        target.close()


def target_that(targets: list[Target], *answers: Sequence[str]) -> Target:
    targets.append(Target(answers=answers))
    return targets[-1]


def rolled_back_by(cause: BaseException) -> RolledBack:
    error = RolledBack.because(cause)
    error.__cause__ = cause
    return error


BROKE = rolled_back_by(ChannelClosed("cut"))


def test_a_move_begins_again_only_when_the_target_has_undone_what_it_was_reserving(
    tmp_path: Path, targets: list[Target]
) -> None:
    target = target_that(targets, ["held", "refused"])
    line = target.line(tmp_path)
    assert line.begin_again(BROKE, "abc", 1)
    assert target.asked == ["ask abc", "ask abc"]
    back = [event for event in target.events if isinstance(event, LinkBack)]
    assert [(event.resumed, event.why) for event in back] == [(False, "cut")]
    assert line.beginnings == 2


def test_a_link_that_breaks_again_meanwhile_is_brought_back_again(tmp_path: Path, targets: list[Target]) -> None:
    target = target_that(targets, [GONE], ["held", GONE], ["refused"])
    assert target.line(tmp_path).begin_again(BROKE, "abc", 1)
    assert target.connections == 3


def test_on_a_link_that_is_whole_the_target_is_asked_there(tmp_path: Path, targets: list[Target]) -> None:
    target = target_that(targets, ["refused"])
    line = target.line(tmp_path)
    line.channel.renew(target.connect().channel)
    assert line.begin_again(rolled_back_by(CanNotResume("it is gone")), "abc", 1)
    assert target.connections == 1


@pytest.mark.parametrize("state", ["committed", "running", "no state at all"])
def test_nothing_but_refused_says_that_nothing_is_left_there(tmp_path: Path, targets: list[Target], state: str) -> None:
    target = target_that(targets, [state])
    assert not target.line(tmp_path).begin_again(BROKE, "abc", 1)
    assert target.asked == ["ask abc"]


@pytest.mark.parametrize("cause", [DeadlineExpired("silent"), OSError("disk"), KeyboardInterrupt()])
def test_only_a_link_that_broke_is_a_reason(tmp_path: Path, targets: list[Target], cause: BaseException) -> None:
    target = target_that(targets, ["refused"])
    assert not target.line(tmp_path).begin_again(rolled_back_by(cause), "abc", 1)
    assert not target.connections


def test_who_wants_no_reconnecting_gets_none(tmp_path: Path, targets: list[Target]) -> None:
    target = target_that(targets, ["refused"])
    assert not target.line(tmp_path, limit_s=0.0).begin_again(BROKE, "abc", 1)
    assert not target.connections


def test_a_link_that_does_not_come_back_is_the_end(tmp_path: Path, targets: list[Target]) -> None:
    target = target_that(targets)
    target.unreachable = True
    line = target.line(tmp_path, limit_s=0.3)
    assert not line.begin_again(BROKE, "abc", 1)
    assert line.broken
