"""Real CRIU dumps through our page server, and restores from images that we made of what it sent."""

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.criu.binary import find_criu
from runtime.criu.images import ImageSetWriter, PageImageWriter, PageRun, image_set_summary, read_pagemap
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
from runtime.errors import CriuFailed, NoRoom
from tests.support.tasks import Tasks, alive, dump_session, restore, running_tasks

PAGE = 4096
MIB = 1 << 20
PATIENCE_S = 60.0
CRIU = find_criu()


class ToImages:
    """Consumer that makes image files of the pages, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.writer = PageImageWriter(directory, CRIU.version)
        self.opened: list[SpaceId] = []
        self.left_out = 0

    def open(self, space: SpaceId) -> None:
        self.opened.append(space)
        self.writer.open(space)

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        with self.writer.reserve(space, [(address, pages, flags)]) as view:
            source.read_into(view)


class WithoutZeros(ToImages):
    """Leaves zero pages out where that is allowed."""

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        if not zero_pages_may_be_left_out(space, flags):
            super().run(space, address, pages, flags, source)
            return
        content = bytearray(pages * PAGE)
        source.read_into(memoryview(content))
        for first, count in nonzero_runs(content):
            run: PageRun = (address + first * PAGE, count, flags)
            self.writer.write(space, [run], content[first * PAGE : (first + count) * PAGE])
            self.left_out -= count
        self.left_out += pages


class Disturbed(ToImages):
    """Does something at the fifth run."""

    def __init__(self, directory: Path, act: Callable[[], None]) -> None:
        super().__init__(directory)
        self._act = act
        self._runs = 0

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        self._runs += 1
        if self._runs == 5:
            self._act()
        super().run(space, address, pages, flags, source)


def lose_the_link() -> None:
    raise ConnectionError("the link is lost")


class Place:
    """A source's and a target's image directory, the target's on a tmpfs."""

    def __init__(self, directory: Path, memory: Path) -> None:
        self.source = directory / "source"
        self.source.mkdir()
        self.target = memory

    def carry(self) -> None:
        """CRIU's own images, to the target."""
        files = ImageSetWriter(self.target)
        for path in self.source.glob("*.img"):
            files.write_file(path.name, path.read_bytes())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="cmigrate-test-", dir="/dev/shm") as memory:
        yield Place(tmp_path, Path(memory))


class Server:
    """A page server in a thread, for one dump."""

    def __init__(self, consumer: ToImages) -> None:
        self._ours, self.theirs = page_socketpair()
        self.server = PageServer(self._ours, CRIU.version, consumer)
        self._outcome: PageTotals | BaseException | None = None
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        try:
            self._outcome = self.server.serve(idle_timeout_s=PATIENCE_S)
        except BaseException as error:
            self._outcome = error

    def start(self) -> None:
        """Once CRIU has its end: as long as we hold it too, the stream never ends."""
        self.theirs.close()
        self._thread.start()

    def result(self) -> PageTotals:
        self._thread.join(PATIENCE_S)
        assert self._outcome is not None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def close(self) -> None:
        self.theirs.close()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE_S)
        self._ours.close()


@contextlib.contextmanager
def dumped(pid: int, place: Place, consumer: ToImages, *, leave_running: bool = False) -> Iterator[tuple[bool, Server]]:
    """Dump to the end; (whether CRIU says that it succeeded, the server)."""
    server = Server(consumer)
    try:
        fd = server.theirs.fileno()
        with dump_session(CRIU, pid, place.source, page_fd=fd, leave_running=leave_running) as (session, request):
            server.start()
            answer = session.run(request, {}, PATIENCE_S)
        yield answer.success, server
    finally:
        server.close()


def move(tasks: Tasks, place: Place, consumer: ToImages) -> PageTotals:
    """Dump, carry everything over, restore."""
    with dumped(tasks.pids[0], place, consumer) as (success, server):
        totals = server.result()
        assert success, (place.source / "dump.log").read_text()
    tasks.reap()
    consumer.writer.finish()
    place.carry()
    return totals


def test_memory_of_every_kind_is_what_it_was_after_a_restore_from_our_images(tmp_path: Path, place: Place) -> None:
    with running_tasks(tmp_path, 64) as tasks:
        before = tasks.contents()
        consumer = ToImages(place.target)
        totals = move(tasks, place, consumer)
        assert totals.bytes > 64 * MIB
        # Not one page reached a file of CRIU's.
        assert [path.name for path in place.source.iterdir() if path.name.startswith(("pages", "pagemap"))] == []
        assert image_set_summary(place.target).pages == totals.pages
        assert image_set_summary(place.target).tasks == len(tasks.pids) == 3
        restore(CRIU, place.target)
        assert tasks.contents() == before
        # Memory that was shared is shared again: what one writes another reads.
        tasks.count_up(1)
        tasks.count_up(2)
        assert [found["count"] for found in tasks.contents()] == [before[0]["count"] + 2] * 3


def test_every_task_and_every_shared_memory_has_its_space(tmp_path: Path, place: Place) -> None:
    with running_tasks(tmp_path, 4) as tasks:
        consumer = ToImages(place.target)
        totals = move(tasks, place, consumer)
        kinds = [space.kind for space in consumer.opened]
        assert {space.id for space in consumer.opened if space.kind == "task"} == set(tasks.pids)
        assert kinds.count("shmem") == 2
        assert totals.spaces == 5
        for pid in tasks.pids:
            entries = read_pagemap(place.target / f"pagemap-{pid}.img").entries
            assert all(entry.flags & 4 for entry in entries)


def test_zero_pages_left_out_of_anonymous_memory_are_zero_after_the_restore(tmp_path: Path, place: Place) -> None:
    with running_tasks(tmp_path, 16) as tasks:
        before = tasks.contents()
        consumer = WithoutZeros(place.target)
        move(tasks, place, consumer)
        # Each of the three processes has written zeros to every 97th page.
        assert consumer.left_out >= 3 * (16 * MIB // PAGE // 97 - 4)
        restore(CRIU, place.target)
        assert tasks.contents() == before


def test_a_restore_that_frees_the_images_as_it_reads_them_leaves_the_same_memory(tmp_path: Path, place: Place) -> None:
    with running_tasks(tmp_path, 16) as tasks:
        before = tasks.contents()
        move(tasks, place, ToImages(place.target))
        restore(CRIU, place.target, auto_dedup=True)
        assert tasks.contents() == before
        left = sum(path.stat().st_blocks * 512 for path in place.target.glob("pages-*.img"))
        assert left < 64 * MIB // 4


def test_a_dump_that_leaves_the_tasks_running_can_be_repeated(tmp_path: Path, place: Place) -> None:
    with running_tasks(tmp_path, 4) as tasks:
        before = tasks.contents()
        for number in range(3):
            target = place.target / str(number)
            target.mkdir()
            with dumped(tasks.pids[0], place, ToImages(target), leave_running=True) as (success, server):
                assert server.result().pages
                assert success
        assert tasks.contents() == before


@pytest.mark.parametrize("size_mib", [4, 32])
def test_tasks_run_on_when_the_consumer_fails_in_mid_dump(tmp_path: Path, place: Place, size_mib: int) -> None:
    with running_tasks(tmp_path, size_mib) as tasks:
        before = tasks.contents()
        with dumped(tasks.pids[0], place, Disturbed(place.target, lose_the_link)) as (success, server):
            assert not success
            with pytest.raises(ConnectionError, match="the link is lost"):
                server.result()
        assert all(alive(pid) for pid in tasks.pids)
        assert tasks.contents() == before


def test_tasks_run_on_when_the_dump_is_called_off(tmp_path: Path, place: Place) -> None:
    with running_tasks(tmp_path, 32) as tasks:
        before = tasks.contents()
        server = Server(Disturbed(place.target, lambda: server.server.cancel()))
        try:
            fd = server.theirs.fileno()
            with dump_session(CRIU, tasks.pids[0], place.source, page_fd=fd) as (session, request):
                server.start()
                assert not session.run(request, {}, PATIENCE_S).success
            with pytest.raises(CriuFailed, match="called off"):
                server.result()
        finally:
            server.close()
        assert tasks.contents() == before


def test_tasks_run_on_when_the_target_directory_is_full(tmp_path: Path, place: Place) -> None:
    with running_tasks(tmp_path, 4) as tasks, small_tmpfs(tmp_path / "small") as small:
        before = tasks.contents()
        with dumped(tasks.pids[0], place, ToImages(small)) as (success, server):
            assert not success
            with pytest.raises(NoRoom, match="no room for images"):
                server.result()
        assert tasks.contents() == before


@contextlib.contextmanager
def small_tmpfs(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(directory)], check=True, timeout=10)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True, timeout=10)


def test_the_stream_ends_early_when_criu_dies(tmp_path: Path, place: Place) -> None:
    with running_tasks(tmp_path, 4) as tasks:
        server = Server(ToImages(place.target))
        try:
            fd = server.theirs.fileno()
            with dump_session(CRIU, tasks.pids[0], place.source, page_fd=fd) as (session, request):
                server.start()
                session.send(request)
                session.next_event(PATIENCE_S)  # pre-dump: nothing is frozen yet
                os.kill(session.pid, 9)
            with pytest.raises(PageStreamEnded):
                server.result()
        finally:
            server.close()
        assert len(tasks.contents()) == 3


def test_criu_failing_for_a_reason_of_its_own_is_seen_in_its_response(tmp_path: Path, place: Place) -> None:
    """A unix socket whose other end is outside cannot be dumped. What the server says of that is not the cause."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            ["sleep", "1000"],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        try:
            with dumped(process.pid, place, ToImages(place.target)) as (success, server):
                assert not success
                with contextlib.suppress(PageStreamEnded):
                    server.result()
            assert "xternal socket" in (place.source / "dump.log").read_text()
            assert alive(process.pid)
        finally:
            process.kill()
            process.wait()
