"""Shared memory from a source to a target, in one process: what arrives is what is there when nothing runs any more."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import MoveRefused, ProtocolViolation
from migrate.frozen_state import send_frozen_state
from migrate.incoming import Incoming
from migrate.memory_target import NoPages
from migrate.messages import Discard, FrozenState
from migrate.outgoing import Outgoing
from migrate.shared_source import LEAST_BYTES, SharedSource
from migrate.shared_target import SharedTarget
from runtime.api import ContainerState, Status
from runtime.linux.tcp_table import TcpConnection
from runtime.memory.api import Segment
from runtime.memory.maps import Kind, Mapping
from runtime.memory.open_segment import OpenSegment
from runtime.memory.ranges import PAGE_BYTES
from runtime.memory.tasks import AddressSpace
from transport.api import Deadline
from transport.testing.memory import memory_pair

PAGES = 64
END = {"type": "end"}


@dataclass
class Host:
    """A container's segments: memory files by number, and what of it is mapped."""

    files: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    permissions: str = "rw-s"

    def make(self, number: int, name: str = "/dev/zero (deleted)", pages: int = PAGES) -> int:
        self.files[number] = os.memfd_create("segment", os.MFD_CLOEXEC)
        os.ftruncate(self.files[number], pages * PAGE_BYTES)
        self.names[number] = name
        return self.files[number]

    def spaces(self) -> list[AddressSpace]:
        mapped = [self.mapping(number) for number in self.names]
        return [AddressSpace(tid=os.getpid(), mappings=mapped, text="")]

    def mapping(self, number: int) -> Mapping:
        start = (number + 1) << 24
        return Mapping(
            start, start + PAGE_BYTES, self.permissions, 0, "00:01", number, self.names[number], Kind.SHARED_MEMORY
        )

    def open(self, _tid: int, mapping: Mapping) -> OpenSegment | None:
        name = mapping.name
        fd = os.dup(self.files[mapping.inode])
        return OpenSegment(Segment(mapping.device, mapping.inode, name), fd)

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)


class Held:
    state = ContainerState(status=Status.RUNNING)


class Dump:
    container = Held()
    mounts = ()
    pipes = (1, 2)
    neighbours: dict[str, str] = {}
    unheard: tuple[TcpConnection, ...] = ()


@dataclass
class Move:
    """``spare`` are where the target keeps what it gets, in the order in which it comes."""

    host: Host
    source: SharedSource
    out: Outgoing
    spare: list[int]
    heard: list[dict[str, Any]]
    target: SharedTarget
    wait: Callable[[], None]
    marks: list[str] = field(default_factory=list)

    def end(self, during_dump: Callable[[], object] = lambda: None) -> FrozenState:
        self.source.finish(self.host.spaces())
        during_dump()
        send_frozen_state(
            self.out,
            Dump(),  # type: ignore[arg-type]
            self.source,
            channel_is_shared=False,
            mark=self.marks.append,
        )
        self.out.control(END)
        self.wait()
        return FrozenState.parse(self.heard[0])

    def content(self, index: int, size: int) -> bytes:
        return os.pread(self.spare[index], size, 0).ljust(size, b"\0")


@pytest.fixture(params=[True, False], ids=["in rounds", "at the end"])
def in_rounds(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def move(tmp_path: Path, in_rounds: bool) -> Iterator[Move]:
    ours, theirs = memory_pair()
    host = Host()
    out = Outgoing(ours, lambda: Deadline.after(30))
    source = SharedSource(out=out, in_rounds=in_rounds, open_segment=host.open)
    spare = [os.memfd_create("spare", os.MFD_CLOEXEC) for _ in range(3)]
    target = SharedTarget(spare)
    incoming = Incoming(
        theirs,
        trees=[],
        images=tmp_path,
        log=tmp_path / "log",
        pages=NoPages(),
        shared=target,
        expected=None,
        deadline=lambda: Deadline.after(30),
        on_frozen=lambda: None,
    )
    heard: list[dict[str, Any]] = []

    def receive() -> None:
        while not heard or heard[-1] != END:
            heard.append(incoming.until_control())

    thread = threading.Thread(target=receive)
    thread.start()

    def wait() -> None:
        thread.join(30)
        target.finish((), {})

    yield Move(host, source, out, spare, heard, target, wait)
    if thread.is_alive():
        out.control(END)
        thread.join(30)
    source.close()
    incoming.close()
    host.close()
    for fd in spare:
        os.close(fd)
    for channel in (ours, theirs):
        channel.close()


def change(chosen: random.Random, file: int, pages: int) -> None:
    """A few pages are written, zeroed, or given back."""
    for _ in range(6):
        page = chosen.randrange(pages)
        content = chosen.choice([os.urandom(PAGE_BYTES), bytes(PAGE_BYTES), b"x" * 9])
        os.pwrite(file, content, page * PAGE_BYTES)
    if chosen.random() < 0.4:
        size = os.fstat(file).st_size
        os.ftruncate(file, chosen.randrange(LEAST_BYTES // PAGE_BYTES, pages) * PAGE_BYTES)
        os.ftruncate(file, size)


@pytest.mark.parametrize("seed", range(10))
def test_the_target_has_what_was_there_at_the_end(move: Move, in_rounds: bool, seed: int) -> None:
    chosen = random.Random(seed)
    files = [move.host.make(1), move.host.make(2)]
    for _round in range(5 * in_rounds):
        for file in files:
            change(chosen, file, PAGES)
        move.source.scan(move.host.spaces())
        for file in files:
            change(chosen, file, PAGES)
        move.source.send(defer_hot=chosen.random() < 0.5)
    for file in files:
        change(chosen, file, PAGES)
    state = move.end()
    assert [place.id for place in state.shared] == [1, 2]
    assert state.shared_follows is in_rounds
    for index, file in enumerate(files):
        assert move.content(index, PAGES * PAGE_BYTES) == os.pread(file, PAGES * PAGE_BYTES, 0)
    assert move.marks == ["shared"]


@pytest.mark.parametrize("in_rounds", [True], indirect=True)
def test_only_what_changed_is_sent_again(move: Move) -> None:
    file = move.host.make(1)
    os.pwrite(file, os.urandom(PAGES * PAGE_BYTES), 0)
    move.source.scan(move.host.spaces())
    assert (move.source.pending_bytes, move.source.dirty_bytes) == (PAGES * PAGE_BYTES, 0)
    assert move.source.send() == PAGES * PAGE_BYTES
    for _ in range(2):
        os.pwrite(file, os.urandom(2 * PAGE_BYTES), PAGE_BYTES)
        move.source.scan(move.host.spaces())
        assert move.source.pending_bytes == move.source.dirty_bytes == 2 * PAGE_BYTES
    assert move.source.hot_bytes == 2 * PAGE_BYTES
    assert move.source.send(defer_hot=True) == 0
    os.pwrite(file, b"late", 9 * PAGE_BYTES)
    move.end()
    assert move.source.sent_after_bytes == 3 * PAGE_BYTES
    assert move.content(0, PAGES * PAGE_BYTES) == os.pread(file, PAGES * PAGE_BYTES, 0)


@pytest.mark.parametrize("in_rounds", [True], indirect=True)
def test_code_is_compared_when_criu_is_done_with_it(move: Move) -> None:
    move.host.permissions = "rwxs"
    file = move.host.make(1)
    os.pwrite(file, b"code" * PAGE_BYTES, 0)
    move.source.scan(move.host.spaces())
    move.source.send()
    os.pwrite(file, b"a system call of CRIU's", 0)

    def put_back() -> None:
        time.sleep(0.2)
        os.pwrite(file, b"code" * 8, 0)

    move.end(put_back)
    assert move.source.sent_after_bytes == 0
    assert move.content(0, PAGES * PAGE_BYTES) == os.pread(file, PAGES * PAGE_BYTES, 0)


@pytest.mark.parametrize("in_rounds", [True], indirect=True)
def test_what_is_small_or_numbered_twice_is_left_to_criu(move: Move) -> None:
    move.host.make(1, pages=2)
    move.host.make(2)
    move.host.make(3)
    both = move.host.spaces()
    both[0].mappings.append(both[0].mappings[2]._replace(name="/SYSV00000000 (deleted)"))
    move.source.scan(both)
    move.source.send()
    hidden = move.source.finish(both)
    assert [segment.inode for segment in hidden] == [2]
    assert [place.id for place in move.source.places] == [2]


@pytest.mark.parametrize("in_rounds", [True], indirect=True)
def test_a_number_that_is_used_again_begins_empty(move: Move) -> None:
    os.pwrite(move.host.make(1), b"old" * PAGE_BYTES * 3, 0)
    move.source.scan(move.host.spaces())
    move.source.send()
    old = move.host.files.pop(1)
    del move.host.names[1]
    move.source.scan(move.host.spaces())
    os.close(old)
    file = move.host.make(1)
    os.pwrite(file, b"new", 20 * PAGE_BYTES)
    move.source.scan(move.host.spaces())
    move.source.send()
    move.end()
    assert move.content(0, PAGES * PAGE_BYTES) == os.pread(file, PAGES * PAGE_BYTES, 0)


@pytest.mark.parametrize(
    "message",
    [
        {"id": -1, "runs": [], "zeros": []},
        {"id": 2**32, "runs": [], "zeros": []},
        {"id": "1", "runs": [], "zeros": []},
        {"id": 1, "runs": [1], "zeros": []},
        {"id": 1, "runs": [0, 1 << 40], "zeros": []},
        {"id": 1},
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, message: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        receive_one(tmp_path, {"type": "shared", **message}, SharedTarget([]))


def test_shared_memory_is_refused_where_image_files_hold_it(tmp_path: Path) -> None:
    with pytest.raises(ProtocolViolation):
        receive_one(tmp_path, {"type": "shared", "id": 1, "runs": [], "zeros": []}, None)


def test_instead_of_the_end_of_shared_memory_the_move_may_be_called_off(tmp_path: Path) -> None:
    with pytest.raises(MoveRefused):
        receive_one(tmp_path, Discard(move_id="m", epoch=1, why="no more").to_message(), SharedTarget([]))
    with pytest.raises(ProtocolViolation):
        receive_one(tmp_path, END, SharedTarget([]))


def receive_one(tmp_path: Path, message: dict[str, Any], shared: SharedTarget | None) -> None:
    ours, theirs = memory_pair()
    incoming = Incoming(
        theirs,
        trees=[],
        images=tmp_path,
        log=tmp_path / "log",
        pages=NoPages(),
        shared=shared,
        expected=None,
        deadline=lambda: Deadline.after(5),
        on_frozen=lambda: None,
    )
    try:
        Outgoing(ours, lambda: Deadline.after(5)).control(message)
        incoming.until_shared_complete()
    finally:
        incoming.close()
        for channel in (ours, theirs):
            channel.close()
