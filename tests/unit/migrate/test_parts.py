"""What went out is known until the target must have it, and what got lost goes again: never may an old page stay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import CanNotResume
from migrate.outgoing import Outgoing
from migrate.parts import Parts
from transport.api import Buffer, ChannelClosed, Deadline, Frame, FrameKind, Into, TransportError

PAGE = 4096


def nothing() -> None:
    pass


def test_what_the_target_lacks_comes_back_in_order() -> None:
    parts, sent = Parts(), []
    for number in range(5):
        parts.add(lambda number=number: sent.append(number), 10)  # type: ignore[misc]
    for again in parts.rewind(3):
        again()
    assert sent == [3, 4]
    assert (parts.count, parts.total_bytes) == (3, 30)


def test_a_target_that_has_everything_is_sent_nothing() -> None:
    parts = Parts()
    parts.add(nothing, 10)
    assert parts.rewind(1) == []


@pytest.mark.parametrize("taken", [-1, 4])
def test_a_count_that_can_not_be_is_refused(taken: int) -> None:
    parts = Parts()
    for _ in range(3):
        parts.add(nothing, 10)
    with pytest.raises(CanNotResume):
        parts.rewind(taken)


def test_only_as_much_is_kept_as_can_be_on_its_way() -> None:
    parts = Parts(keep_bytes=100, keep_parts=1000)
    for _ in range(50):
        parts.add(nothing, 10)
    assert len(parts.rewind(40)) == 10
    with pytest.raises(CanNotResume, match=r"29 of 40 parts came"):
        parts.rewind(29)


def test_the_last_part_is_kept_whatever_its_size() -> None:
    parts = Parts(keep_bytes=100, keep_parts=1000)
    parts.add(nothing, 10)
    parts.add(nothing, 1000)
    assert len(parts.rewind(1)) == 1


@dataclass(kw_only=True)
class Target:
    """Applies what arrives, a message at a time, as Incoming does."""

    pages: dict[int, bytes] = field(default_factory=dict)
    taken: int = 0
    announced: list[int] = field(default_factory=list)

    def frame(self, frame: Frame) -> None:
        if frame.kind is FrameKind.DATA:
            body = bytes(frame.body)
            for index, page in enumerate(self.announced):
                self.pages[page] = body[index * PAGE : (index + 1) * PAGE]
            self.announced = []
            self.taken += 1
            return
        message = frame.message()
        if message["type"] == "reach":
            return
        self.announced = list(message["runs"])  # type: ignore[call-overload]
        for page in message["zeros"]:  # type: ignore[attr-defined]
            self.pages.pop(page, None)
        self.taken += not self.announced


class BreakingLink:
    """A channel that breaks after so many frames, of which the last ``lost`` never arrive."""

    def __init__(self, target: Target, frames: int, lost: int) -> None:
        self._target = target
        self._left = frames
        self._lost = lost
        self._on_the_way: list[Frame] = []
        self.bytes_sent = 0

    def send(self, frame: Frame, *, deadline: Deadline) -> None:
        if not self._left:
            raise ChannelClosed("broken")
        self._left -= 1
        self._on_the_way.append(Frame(frame.kind, frame.tag, bytes(frame.body)))
        while len(self._on_the_way) > self._lost:
            self._target.frame(self._on_the_way.pop(0))

    def send_data(self, tag: int, buffers: Sequence[Buffer], *, deadline: Deadline) -> None:
        self.send(Frame.data(tag, b"".join(buffers)), deadline=deadline)

    def readable(self, timeout_s: float) -> bool:
        return False

    def receive(self, *, deadline: Deadline, into: Into | None = None) -> Frame:
        """Asked whether everything has come."""
        if self._on_the_way:
            raise ChannelClosed("broken")
        return Frame.control({"type": "reached", "move_id": "abc"})


class Source:
    """Pages that are written to all the time, and an Outgoing whose link breaks."""

    def __init__(self, breaks: Sequence[tuple[int, int]]) -> None:
        self.memory: dict[int, int] = {}
        self.target = Target()
        self._breaks = [*breaks, (10**9, 0)]
        self.out = Outgoing(self._link(), lambda: Deadline.after(1))
        self.out.mend = self._mend
        self.out.memory_again = self._again
        self.on_mend: Callable[[], None] = nothing

    def _link(self) -> Any:
        return BreakingLink(self.target, *self._breaks.pop(0))

    def _mend(self, error: TransportError) -> int:
        # An announcement whose data did not come is forgotten with its connection.
        self.target.announced = []
        self.out.channel = self._link()
        self.on_mend()
        return self.target.taken

    def _again(self, message: Mapping[str, object]) -> None:
        self.send([*message["runs"], *message["zeros"]])  # type: ignore[misc]

    def content(self, page: int) -> bytes:
        return self.memory.get(page, 0).to_bytes(8, "little") * (PAGE // 8)

    def send(self, pages: Sequence[int]) -> None:
        filled = [page for page in pages if self.memory.get(page)]
        zeros = [page for page in pages if not self.memory.get(page)]
        data = memoryview(b"".join(self.content(page) for page in filled))
        self.out.memory({"type": "memory", "id": 1, "runs": filled, "zeros": zeros}, data)


@given(
    steps=st.lists(
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=4), min_size=1, max_size=20
    ),
    breaks=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=4),
)
def test_whatever_breaks_the_target_has_every_page_as_it_was_sent_last_or_newer(
    steps: list[list[tuple[int, int]]], breaks: list[tuple[int, int]]
) -> None:
    source = Source(breaks)
    for writes in steps:
        for page, value in writes:
            source.memory[page] = value
        source.send(sorted({page for page, _value in writes}))
    source.out.all_has_come("abc")
    expected = {page: source.content(page) for page, value in source.memory.items() if value}
    assert {page: body for page, body in source.target.pages.items() if any(body)} == expected


def test_a_break_while_what_got_lost_is_sent_again_loses_nothing() -> None:
    # Three parts of two frames each are out, one has arrived; the second link breaks within the second part again.
    source = Source([(6, 4), (3, 1)])
    for page in range(4):
        source.memory[page] = page + 1
        source.send([page])
    source.out.all_has_come("abc")
    assert source.out.mend is None
    assert set(source.target.pages) == {0, 1, 2, 3}
    assert source.out.parts.count == source.target.taken == 4


def test_without_mending_a_broken_link_is_the_end() -> None:
    source = Source([(1, 0)])
    source.out.mend = None
    source.memory[0] = 1
    with pytest.raises(ChannelClosed):
        source.send([0])
