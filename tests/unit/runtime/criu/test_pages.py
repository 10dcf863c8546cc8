"""The page server against a scripted CRIU: headers written here byte by byte, in both layouts."""

import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.criu.page_protocol import Command, CommandKind, PageProtocol, UnknownPageCommand
from runtime.criu.pages import (
    PageServer,
    PageStreamEnded,
    PageTotals,
    RunReader,
    SpaceId,
    nonzero_runs,
    page_socketpair,
    zero_pages_may_be_left_out,
)
from runtime.errors import CriuFailed

PAGE = 4096
NARROW, WIDE = (4, 1, 1), (4, 2, 1)
ADD, HOLE, OPEN, OPEN2, PARENT, ADD_F, GET = range(1, 8)
CLOSE, FORCE_CLOSE = 0x1023, 0x1024
LAZY_PRESENT, PRESENT = 6, 4
TASK_7, SHMEM_9 = 7 << 8 | 1, 9 << 8 | 2
REFUSAL = struct.pack("=i", -1)

both_layouts = pytest.mark.parametrize("version", [NARROW, WIDE], ids=["24-byte headers", "32-byte headers"])


class Script:
    """What CRIU says, as bytes."""

    def __init__(self, version: tuple[int, int, int]) -> None:
        self._wide = version >= (4, 2, 0)
        self.said = bytearray()

    def say(self, command: int, destination: int = 0, address: int = 0, pages: int = 0, flags: int = 0) -> "Script":
        word = command | flags << 16
        if self._wide:
            # The padding is whatever was on CRIU's stack.
            self.said += struct.pack("=I4sQQQ", word, b"\xde\xad\xbe\xef", pages, address, destination)
        else:
            self.said += struct.pack("=IIQQ", word, pages, address, destination)
        return self

    def run(self, destination: int, address: int, content: bytes, flags: int = PRESENT) -> "Script":
        self.say(ADD_F, destination, address, len(content) // PAGE, flags)
        self.said += content
        return self


class Collect:
    """A consumer that keeps everything."""

    def __init__(self) -> None:
        self.opened: list[SpaceId] = []
        self.runs: list[tuple[SpaceId, int, int, int]] = []
        self.content: list[bytes] = []

    def open(self, space: SpaceId) -> None:
        self.opened.append(space)

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        self.runs.append((space, address, pages, flags))
        buffer = bytearray(source.remaining_bytes)
        source.read_into(memoryview(buffer))
        self.content.append(bytes(buffer))


class Act(Collect):
    """Does something else with the bytes of each run."""

    def __init__(self, action: Callable[[RunReader], object]) -> None:
        super().__init__()
        self._action = action

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        self.runs.append((space, address, pages, flags))
        self._action(source)


@contextmanager
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = page_socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        yield ours, theirs


def serve(version: tuple[int, int, int], script: Script, consumer: Collect) -> tuple[PageTotals, bytes]:
    """Play the script, then hang up; what the server returned, and what it answered."""
    with sockets() as (ours, theirs):
        theirs.sendall(script.said)
        theirs.shutdown(socket.SHUT_WR)
        totals = PageServer(ours, version, consumer).serve(idle_timeout_s=10)
        ours.shutdown(socket.SHUT_WR)
        return totals, b"".join(iter(lambda: theirs.recv(100), b""))


def pages(count: int) -> bytes:
    return os.urandom(PAGE) * count


def complete(version: tuple[int, int, int]) -> Script:
    return Script(version).say(OPEN2, TASK_7).run(TASK_7, 0x10000, pages(3)).say(FORCE_CLOSE)


@both_layouts
def test_each_run_reaches_the_consumer_with_its_space_address_flags_and_bytes(version: tuple[int, int, int]) -> None:
    first, second, third = pages(3), pages(1), pages(2)
    script = Script(version).say(OPEN2, TASK_7)
    script.run(TASK_7, 0x7FFF_0000_0000, first, LAZY_PRESENT).run(TASK_7, 0x7FFF_0010_0000, second)
    script.say(OPEN2, SHMEM_9).run(SHMEM_9, 0, third).say(FORCE_CLOSE)
    consumer = Collect()
    totals, answers = serve(version, script, consumer)
    task, shmem = SpaceId("task", 7), SpaceId("shmem", 9)
    assert consumer.opened == [task, shmem]
    assert consumer.runs == [
        (task, 0x7FFF_0000_0000, 3, LAZY_PRESENT),
        (task, 0x7FFF_0010_0000, 1, PRESENT),
        (shmem, 0, 2, PRESENT),
    ]
    assert consumer.content == [first, second, third]
    assert totals == PageTotals(spaces=2, runs=3, pages=6)
    assert totals.bytes == 6 * PAGE
    # One byte for each OPEN2: no parent. Then the verdict.
    assert answers == b"\0\0" + struct.pack("=i", 0)


@both_layouts
def test_legacy_commands_and_the_question_for_a_parent_are_answered_as_criu_expects(
    version: tuple[int, int, int],
) -> None:
    script = Script(version).say(PARENT, TASK_7).say(OPEN, TASK_7).say(ADD, TASK_7, 0x2000, 1)
    script.said += b"x" * PAGE
    consumer = Collect()
    totals, answers = serve(version, script.say(CLOSE), consumer)
    assert answers == struct.pack("=ii", 0, 0)
    assert consumer.runs == [(SpaceId("task", 7), 0x2000, 1, PRESENT)]
    assert totals.pages == 1


def test_a_run_of_a_space_that_was_not_opened_opens_it() -> None:
    consumer = Collect()
    serve(WIDE, Script(WIDE).run(TASK_7, 0, pages(1)).run(SHMEM_9, 0, pages(1)).say(FORCE_CLOSE), consumer)
    assert consumer.opened == [SpaceId("task", 7), SpaceId("shmem", 9)]


def test_pages_that_the_consumer_leaves_are_thrown_away() -> None:
    seen = bytearray(PAGE)
    consumer = Act(lambda source: source.read_into(memoryview(seen)))
    content = pages(1) + pages(4)
    totals, _ = serve(WIDE, Script(WIDE).run(TASK_7, 0, content).run(TASK_7, 1 << 20, content).say(CLOSE), consumer)
    assert len(consumer.runs) == 2
    assert seen == content[:PAGE]
    assert totals.pages == 10


def test_a_run_can_be_read_spliced_and_discarded_in_parts(tmp_path: Path) -> None:
    content = b"".join(pages(1) for _ in range(4))
    read = bytearray(PAGE)

    def action(source: RunReader) -> None:
        source.discard(PAGE)
        with open(tmp_path / "pages", "wb") as file:
            source.splice_to(file.fileno(), PAGE)
        source.read_into(memoryview(read))
        with pytest.raises(ValueError):
            source.read_into(memoryview(bytearray(2 * PAGE)))
        with pytest.raises(ValueError):
            source.discard(-1)
        assert source.remaining_bytes == PAGE

    serve(WIDE, Script(WIDE).run(TASK_7, 0, content).say(CLOSE), Act(action))
    assert (tmp_path / "pages").read_bytes() + read == content[PAGE : 3 * PAGE]


def test_a_run_longer_than_the_sockets_buffers_arrives_whole() -> None:
    content = b"".join(bytes([number]) * (1 << 20) for number in range(24))
    script, consumer = Script(WIDE).run(TASK_7, 0, content).say(FORCE_CLOSE), Collect()
    with sockets() as (ours, theirs):
        sender = threading.Thread(target=theirs.sendall, args=(script.said,))
        sender.start()
        try:
            PageServer(ours, WIDE, consumer).serve(idle_timeout_s=10)
        finally:
            sender.join()
    assert consumer.content == [content]


@both_layouts
@pytest.mark.parametrize(
    ("name", "hostile"),  # command, destination, address, pages, flags
    [
        ("an unknown command", (0x77, TASK_7)),
        ("a lazy server's GET", (GET, 7)),
        ("unknown flags", (ADD_F, TASK_7, 0, 1, PRESENT | 8)),
        ("a space of an unknown kind", (OPEN2, 7 << 8 | 3)),
        ("no pages", (ADD_F, TASK_7, 0, 0, PRESENT)),
        ("half a page", (ADD_F, TASK_7, 100, 1, PRESENT)),
        ("more than there is", (ADD_F, TASK_7, 1 << 57, 1, PRESENT)),
        ("lazy pages", (ADD_F, TASK_7, 0, 1, 2)),
        ("pages of a parent image", (ADD_F, TASK_7, 0, 1, 5)),
        ("a hole", (HOLE, TASK_7, 0, 1)),
    ],
)
def test_what_cannot_be_understood_or_restored_is_refused(
    version: tuple[int, int, int], name: str, hostile: tuple[int, ...]
) -> None:
    script = Script(version).say(*hostile)
    with sockets() as (ours, theirs):
        theirs.sendall(script.said)
        with pytest.raises(CriuFailed):
            PageServer(ours, version, Collect()).serve(idle_timeout_s=10)
        assert refused(theirs)


def refused(theirs: socket.socket) -> bool:
    """CRIU reads a refusal and then the end, and what it writes from now on fails at once."""
    with pytest.raises(BrokenPipeError):
        theirs.sendall(bytes(PAGE))
    return b"".join(iter(lambda: theirs.recv(100), b"")).endswith(REFUSAL)


@pytest.mark.parametrize(("spoken", "expected"), [(NARROW, WIDE), (WIDE, NARROW)])
def test_headers_of_the_other_layout_are_refused_and_not_misread(
    spoken: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    with sockets() as (ours, theirs):
        theirs.sendall(complete(spoken).said)
        with pytest.raises(CriuFailed):
            PageServer(ours, expected, Collect()).serve(idle_timeout_s=10)
        assert refused(theirs)


def test_what_the_consumer_raises_comes_out_of_serve_and_refuses_the_dump() -> None:
    class Full(Exception):
        pass

    def action(source: RunReader) -> None:
        raise Full

    with sockets() as (ours, theirs):
        theirs.sendall(complete(WIDE).said)
        with pytest.raises(Full):
            PageServer(ours, WIDE, Act(action)).serve(idle_timeout_s=10)
        assert refused(theirs)


def test_a_failing_file_of_the_consumer_is_its_error_and_refuses_the_dump() -> None:
    with sockets() as (ours, theirs), open("/dev/full", "wb") as full:
        theirs.sendall(complete(WIDE).said)
        # A device does not take splices.
        with pytest.raises(OSError):
            PageServer(ours, WIDE, Act(lambda source: source.splice_to(full.fileno()))).serve(idle_timeout_s=10)
        assert refused(theirs)


def every_cut() -> list[int]:
    """In a header, between two, in a page, before CLOSE."""
    length = len(complete(WIDE).said)
    return [0, 1, 31, 32, 40, 64, 64 + PAGE, length - 33, length - 32, length - 1]


@pytest.mark.parametrize("cut", every_cut())
def test_a_stream_that_ends_before_its_end_is_an_error_wherever_it_ends(cut: int) -> None:
    with sockets() as (ours, theirs):
        theirs.sendall(complete(WIDE).said[:cut])
        theirs.close()
        with pytest.raises(PageStreamEnded, match="closed the page stream"):
            PageServer(ours, WIDE, Collect()).serve(idle_timeout_s=10)


@pytest.mark.parametrize("cut", [0, 64 + PAGE])
@pytest.mark.parametrize("discarding", [False, True])
def test_a_silent_criu_is_given_up_after_the_idle_timeout(cut: int, discarding: bool) -> None:
    consumer = Act(RunReader.discard) if discarding else Collect()
    with sockets() as (ours, theirs):
        theirs.sendall(complete(WIDE).said[:cut])
        with pytest.raises(PageStreamEnded, match=r"no pages for 0\.05 s"):
            PageServer(ours, WIDE, consumer).serve(idle_timeout_s=0.05)
        assert refused(theirs)


def test_cancelling_from_another_thread_ends_a_waiting_server_and_refuses_the_dump() -> None:
    with sockets() as (ours, theirs):
        server = PageServer(ours, WIDE, Collect())
        timer = threading.Timer(0.05, server.cancel)
        timer.start()
        try:
            with pytest.raises(CriuFailed, match="called off"):
                server.serve(idle_timeout_s=10)
        finally:
            timer.join()
        with pytest.raises(BrokenPipeError):
            theirs.sendall(b"x")


def test_cancelling_before_serving_refuses_the_dump() -> None:
    with sockets() as (ours, theirs):
        theirs.sendall(complete(WIDE).said)
        server = PageServer(ours, WIDE, Collect())
        server.cancel()
        with pytest.raises(CriuFailed, match="called off"):
            server.serve(idle_timeout_s=10)
        with pytest.raises(BrokenPipeError):
            theirs.sendall(b"x")


@pytest.mark.parametrize(
    ("version", "size"), [((3, 17, 1), 24), ((4, 1, 1), 24), ((4, 2, 0), 32), ((4, 2, 1), 32), ((5, 0, 0), 32)]
)
def test_the_size_of_a_header_follows_the_version(version: tuple[int, int, int], size: int) -> None:
    assert PageProtocol(version).header_bytes == size


@given(st.binary(min_size=32, max_size=32))
def test_any_header_is_a_sound_command_or_refused(header: bytes) -> None:
    for version in (NARROW, WIDE):
        protocol = PageProtocol(version)
        try:
            command = protocol.parse(header[: protocol.header_bytes])
        except UnknownPageCommand:
            continue
        assert isinstance(command, Command)
        assert (command.space is None) == (command.kind is CommandKind.CLOSE)
        if command.kind is CommandKind.RUN:
            assert command.pages > 0
            assert command.address % PAGE == 0
            assert command.data_bytes in (0, command.pages * PAGE)


@given(st.lists(st.sampled_from(["zero", "first", "last", "full"]), min_size=1, max_size=40))
def test_the_pages_that_are_not_zero_are_found_in_runs(kinds: list[str]) -> None:
    samples = {
        "zero": bytes(PAGE),
        "first": b"\1" + bytes(PAGE - 1),
        "last": bytes(PAGE - 1) + b"\1",
        "full": b"\xff" * PAGE,
    }
    grouped = itertools.groupby(range(len(kinds)), key=lambda page: kinds[page] != "zero")
    expected = [(group[0], len(group)) for filled, group in ((key, list(found)) for key, found in grouped) if filled]
    assert nonzero_runs(b"".join(samples[kind] for kind in kinds)) == expected


def test_only_private_anonymous_memory_may_lose_its_zero_pages() -> None:
    task, shmem = SpaceId("task", 7), SpaceId("shmem", 9)
    assert zero_pages_may_be_left_out(task, LAZY_PRESENT)
    assert not zero_pages_may_be_left_out(task, PRESENT)
    assert not zero_pages_may_be_left_out(shmem, LAZY_PRESENT)


@pytest.mark.parametrize(("kind", "number"), [("task", -1), ("file", 1)])
def test_a_space_that_cannot_be_is_not_made(kind: str, number: int) -> None:
    with pytest.raises(ValueError):
        SpaceId(kind, number)  # type: ignore[arg-type]
