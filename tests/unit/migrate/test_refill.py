"""Memory that follows after the switch over links that break: both sides as they are, and threads for processes."""

import contextlib
import ctypes
import mmap
import os
import queue
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from migrate import messages
from migrate.errors import ContainerLost, MoveRefused
from migrate.inventory import HostEntry
from migrate.links import Session
from migrate.observe import Silent
from migrate.outgoing import Outgoing, Pace
from migrate.postcopy_source import KeptMemory
from migrate.postcopy_target import MISSING_MARK, RemoteFeed
from migrate.reconnect import Line
from migrate.refill import Refill
from migrate.waiting import WaitingRoom, hand_over
from runtime.host import HostConfig
from runtime.memory.pager import PagerDied
from runtime.memory.ranges import PAGE_BYTES, PageRanges
from runtime.memory.store import Store
from transport.api import Channel, ChannelClosed, ConnectFailed, Deadline, Frame, Peer, TransportError
from transport.channel import StreamChannel
from transport.renewable import RenewableChannel
from transport.sealed import SealedStream, new_key
from transport.testing.faulty import Faults, FaultyStream

MOVE = "abc"
INSIDE = 7
PAGES = 600
ENTRY = HostEntry(name="host2", ssh_host="", stream_host="")
SOON_S = 30.0


def soon() -> Deadline:
    return Deadline.after(SOON_S)


def pair(faults: Faults) -> tuple[Channel, Channel]:
    """The source's end, which breaks as told, and the target's."""
    ours, theirs = socket.socketpair()
    there, back = new_key(), new_key()
    near = FaultyStream(SealedStream(ours, send_key=there, receive_key=back), faults)
    far = SealedStream(theirs, send_key=back, receive_key=there)
    return (
        StreamChannel(near, Peer(name="host2", transport="stream", detail="")),
        StreamChannel(far, Peer(name="host1", transport="stream", detail="")),
    )


class PagerStandIn:
    """What the feed sees of a pager: it wants what the test says."""

    def __init__(self) -> None:
        self.wants: queue.SimpleQueue[tuple[int, int] | PagerDied | None] = queue.SimpleQueue()
        self.spans: list[tuple[int, int]] = []
        self.came = threading.Condition()
        self.lost = ""

    def next_want(self, timeout_s: float) -> tuple[int, int] | None:
        want = self.wants.get(timeout=timeout_s)
        if isinstance(want, PagerDied):
            raise want
        return want

    def arrived(self, vpid: int, runs: Sequence[tuple[int, int]]) -> None:
        assert vpid == INSIDE
        with self.came:
            self.spans += [(start, start + size) for start, size in runs]
            self.came.notify_all()

    def lose(self, why: str) -> None:
        self.lost = why
        self.wants.put(PagerDied(why))

    def has(self, address: int) -> bool:
        return any(start <= address < end for start, end in self.spans)

    def wait_for(self, address: int) -> None:
        with self.came:
            assert self.came.wait_for(lambda: self.has(address), SOON_S)


class Hosts:
    """Memory of this process that one side has and the other lacks; links that break one after the other."""

    def __init__(self, run_dir: Path, links: Sequence[Faults], *, limit_s: float = SOON_S, paced: bool = False) -> None:
        self.area = mmap.mmap(-1, PAGES * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        chance = random.Random(1)
        for page in range(PAGES):
            if page % 5:
                self.area[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = chance.randbytes(PAGE_BYTES)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        # In pieces, so that there are many of them.
        self.remote = PageRanges.from_spans(
            (self.page(first), self.page(first + 7)) for first in range(0, PAGES - 8, 8)
        )
        self._run_dir = run_dir
        self._links = list(links)
        self._ends: list[Channel] = []
        near, far = self._next_link()
        self.observer = Silent()
        session = Session(entry=ENTRY, channel=near, peer_hello=messages.Hello(version="1", host="host2"))
        self.line = Line(HostConfig(name="host1"), session, self._connect, self.observer, limit_s=limit_s)
        # With it nothing is sent but what is asked for.
        pace = Pace(take=lambda count: 0.0 if count else SOON_S) if paced else Pace()
        self.out = Outgoing(self.line.channel, soon, pace)
        self.out.refill = Refill(self.line, MOVE, 1).go_on
        self.out.peer_may_speak = True
        self.kept = KeptMemory(self.out, None)  # type: ignore[arg-type]
        self.kept.keep(INSIDE, os.getpid(), self.remote)
        self.pager = PagerStandIn()
        self.store = Store("test")
        self.far = RenewableChannel(far)
        self.room = WaitingRoom(run_dir, MOVE, self.far, reconnect_s=limit_s, output=(), notice_s=0.0)
        self.feed = RemoteFeed(
            self.far,
            MOVE,
            self.room,
            self.pager,  # type: ignore[arg-type]
            {INSIDE: self.store.duplicate()},
            {INSIDE: self.remote},
            run_dir / MISSING_MARK,
        )
        self.feed.start()

    def page(self, number: int) -> int:
        return self.start + number * PAGE_BYTES

    def commit(self) -> None:
        """As it is when the container runs on the target, and the source has heard so."""
        self.out.control(messages.Commit(move_id=MOVE, epoch=1).to_message())
        assert self.feed.receive(deadline=soon()).message()["type"] == "commit"
        self.feed.send(Frame.control(messages.Running(move_id=MOVE, epoch=1).to_message()), deadline=soon())
        self.feed.let_source_come_back()

    def _next_link(self) -> tuple[Channel, Channel]:
        near, far = pair(self._links.pop(0) if self._links else Faults())
        self._ends.append(far)
        return near, far

    def _connect(self, *_words: Any, **_more: Any) -> Session:
        near, far = self._next_link()
        threading.Thread(target=self._answer, args=(far,), daemon=True).start()
        return Session(entry=ENTRY, channel=near, peer_hello=messages.Hello(version="1", host="host2"))

    def _answer(self, far: Channel) -> None:
        """What the process does that answers a new connection."""
        try:
            messages.Resume.parse(far.receive(deadline=soon()).message())
            hand_over(self._run_dir, MOVE, far)
        except TransportError:
            pass
        finally:
            far.close()

    def must_be_whole(self) -> None:
        """Everything is there as it was, and came once."""
        assert sum(end - start for start, end in self.pager.spans) == self.remote.bytes
        assert PageRanges.from_spans(self.pager.spans) == self.remote
        for start, end in self.remote.spans():
            found = bytearray(end - start)
            self.store.read_into(start, memoryview(found))
            assert found == self.area[start - self.start : end - self.start]

    def close(self) -> None:
        self.far.abort()
        self.pager.wants.put(None)
        with contextlib.suppress(PagerDied):
            self.feed.wait_filled()
        self.room.close()
        self.line.channel.close()
        for end in (self.far, *self._ends):
            end.close()
        self.kept.close()
        self.store.close()


Make = Callable[..., Hosts]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Make]:
    made: list[Hosts] = []

    def make(*links: Faults, **words: Any) -> Hosts:
        made.append(Hosts(tmp_path, links, **words))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("seed", range(6))
def test_however_often_the_link_breaks_every_page_comes_and_is_taken_once(hosts: Make, seed: int) -> None:
    """Wherever that is: in a message, between two, or with much on its way."""
    chance = random.Random(seed)
    links = [Faults(cut_sent_at=chance.randrange(200, 900_000)) for _ in range(3)]
    both = hosts(Faults(cut_sent_at=chance.randrange(5_000, 900_000)), *links)
    both.commit()
    for page in chance.sample(range(0, PAGES - 8, 8), 20):
        both.pager.wants.put((INSIDE, both.page(page)))
    both.kept.serve()
    both.must_be_whole()
    assert both.line.resumed >= 1
    assert both.pager.lost == ""


def test_a_request_that_got_lost_with_the_link_is_answered_on_the_next(hosts: Make) -> None:
    # COMMIT is sent, and nothing is ever heard on this link.
    both = hosts(Faults(cut_received_at=0), paced=True)
    both.commit()
    wanted = both.page(8 * 20)
    both.pager.wants.put((INSIDE, wanted))
    serving = threading.Thread(target=both.kept.serve)
    serving.start()
    both.pager.wait_for(wanted)
    # All tasks have ended: nobody needs the rest.
    both.pager.wants.put(None)
    serving.join(SOON_S)
    assert not serving.is_alive()
    assert not both.pager.has(both.page(8 * 40))


def test_a_source_that_did_not_hear_that_it_runs_there_hears_it_on_the_next_link(hosts: Make) -> None:
    both = hosts(Faults(cut_received_at=0))
    both.commit()
    assert both.kept.hear(messages.Running, SOON_S).move_id == MOVE
    both.kept.serve()
    both.must_be_whole()


def test_before_commit_a_broken_link_is_the_end_at_once(hosts: Make) -> None:
    both = hosts(Faults(cut_received_at=0))
    with pytest.raises(ChannelClosed):
        both.kept.hear(messages.Ready, SOON_S)
    both.far.cut()
    with pytest.raises(PagerDied):
        both.feed.receive(deadline=soon())
    assert "can not send it" in both.pager.lost
    assert both.line.resumed == 0


def test_a_link_that_does_not_come_back_in_time_is_the_end_on_both_sides(hosts: Make) -> None:
    both = hosts(Faults(cut_sent_at=100_000), limit_s=0.3)
    both.commit()

    def nobody(*_words: Any, **_more: Any) -> Session:
        raise ConnectFailed("no route")

    both.line = Line(HostConfig(name="host1"), both.line.session, nobody, both.observer, limit_s=0.3)
    both.out.refill = Refill(both.line, MOVE, 1).go_on
    with pytest.raises(ChannelClosed, match=r"within 0\.3 s: no route"):
        both.kept.serve()
    assert both.line.patience_s == 0
    with pytest.raises(PagerDied):
        both.feed.receive(deadline=soon())


def answering(*answers: messages.Message | None) -> tuple[Refill, Line, list[Channel]]:
    """A target that says this to each question in turn; None: it goes away."""
    ends: list[Channel] = []
    left = list(answers)

    def answer(far: Channel) -> None:
        with far:
            try:
                while left:
                    messages.Resume.parse(far.receive(deadline=soon()).message())
                    said = left.pop(0)
                    if said is None:
                        return
                    far.send(Frame.control(said.to_message()), deadline=soon())
                far.receive(deadline=soon())
            except TransportError:
                pass

    def connect(*_words: Any, **_more: Any) -> Session:
        near, far = pair(Faults())
        ends.append(near)
        threading.Thread(target=answer, args=(far,), daemon=True).start()
        return Session(entry=ENTRY, channel=near, peer_hello=messages.Hello(version="1", host="host2"))

    near, far = pair(Faults())
    far.close()
    session = Session(entry=ENTRY, channel=near, peer_hello=messages.Hello(version="1", host="host2"))
    line = Line(HostConfig(name="host1"), session, connect, Silent(), limit_s=SOON_S)
    return Refill(line, MOVE, 1), line, ends


def standing(state: str, move_id: str = MOVE) -> messages.Answer:
    return messages.Answer(move_id=move_id, epoch=1, state=state)


NOT_YET = (
    standing("committed"),
    messages.Error(code="refused", what="the session is busy"),
    standing("running", "another"),
    messages.Refused(move_id="another", epoch=1, why=""),
    None,
)


def test_only_a_verdict_on_this_move_ends_the_asking() -> None:
    refill, line, ends = answering(*NOT_YET, standing("running"))
    assert refill.go_on(ChannelClosed("gone"), {}) is None
    with pytest.raises(ChannelClosed):
        line.channel.receive(deadline=soon())
    line.channel.close()
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    ("verdict", "error"),
    [(standing("lost"), ContainerLost), (messages.Refused(move_id=MOVE, epoch=1, why="it failed"), MoveRefused)],
)
def test_a_target_that_has_lost_or_refused_it_says_so(verdict: messages.Message, error: type[Exception]) -> None:
    refill, line, ends = answering(standing("committed"), verdict)
    with pytest.raises(error):
        refill.go_on(ChannelClosed("gone"), {})
    line.channel.close()
    for end in ends:
        end.close()
