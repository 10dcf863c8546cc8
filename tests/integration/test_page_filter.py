"""A real CRIU with the page filter: it sends what the target lacks, and nothing else."""

import contextlib
import os
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pycriu import rpc_pb2 as rpc

from runtime.criu.binary import CriuBinary, find_criu
from runtime.criu.filter.build import build_filter, filter_available
from runtime.criu.filter.table import SHORTEST_BYTES, FilterCounters, PageFilter
from runtime.criu.images import ImageSetWriter, PageImageWriter
from runtime.criu.pages import PageServer, PageTotals, RunReader, SpaceId, page_socketpair
from runtime.criu.rpc import CriuSession
from runtime.linux.pagemap import Pagemap
from runtime.memory.ranges import EMPTY, PageRanges
from tests.support.tasks import Tasks, restore, running_tasks, wait_for

PAGE = 4096
MIB = 1 << 20
PATIENCE_S = 60.0
CRIU = find_criu()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_filter(tmp_path_factory.mktemp("filter"))


class Received:
    """What came to the page server, kept in memory."""

    def __init__(self) -> None:
        self.runs: dict[SpaceId, list[tuple[int, int, bytes]]] = {}

    def open(self, space: SpaceId) -> None:
        self.runs.setdefault(space, [])

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        data = bytearray(pages * PAGE)
        source.read_into(memoryview(data))
        self.runs[space].append((address, flags, bytes(data)))

    def ranges(self, pid: int) -> PageRanges:
        runs = self.runs[SpaceId(kind="task", id=pid)]
        return PageRanges.from_spans((address, address + len(data)) for address, _flags, data in runs)


class Discarded(Received):
    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        source.discard()


class FilteredDump:
    """One dump of a tree. ``known`` is published where a source would do it: everything frozen, nothing looked at."""

    def __init__(self, images: Path, page_filter: PageFilter | None, known: dict[int, PageRanges]) -> None:
        self._images = images
        self._filter = page_filter
        self._known = known
        self.empty_namespaces = 0
        self.shortest_bytes = SHORTEST_BYTES
        self.dump_s = 0.0
        self.totals = PageTotals()

    def run(self, pid: int, consumer: Received, *, leave_running: bool = False) -> None:
        ours, theirs = page_socketpair()
        directory = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY)
        passed = [theirs.fileno(), *(self._filter.pass_fds if self._filter else ())]
        environment = self._filter.environment if self._filter else {}
        outcome: list[PageTotals] = []
        server = PageServer(ours, CRIU.version, consumer)
        thread = threading.Thread(target=lambda: outcome.append(server.serve(idle_timeout_s=PATIENCE_S)))
        with CriuSession.spawn(CRIU, pass_fds=passed, environment=environment) as session:
            request = self._request(pid, directory, theirs.fileno(), leave_running)
            theirs.close()
            thread.start()
            answer = session.run(request, {"query-ext-files": self._publish}, PATIENCE_S)
        thread.join(PATIENCE_S)
        ours.close()
        os.close(directory)
        assert answer.success, (self._images / "dump.log").read_text()
        times = dict(session.timeline)
        self.dump_s = times["post-dump"] - times["query-ext-files"]
        self.totals = outcome[0]

    def _request(self, pid: int, directory: int, page_fd: int, leave_running: bool) -> rpc.criu_req:
        request = rpc.criu_req(type=rpc.DUMP)
        options = request.opts
        options.pid, options.images_dir_fd, options.ps.fd = pid, directory, page_fd
        options.log_level, options.log_file = 2, "dump.log"
        options.notify_scripts = True
        options.leave_running = leave_running
        options.empty_ns = self.empty_namespaces
        options.network_lock = rpc.NFTABLES
        options.manage_cgroups, options.manage_cgroups_mode = True, rpc.IGNORE
        return request

    def _publish(self, _pid: int) -> None:
        if self._filter is not None:
            assert self._filter.loaded
            self._filter.publish(self._known, shortest_bytes=self.shortest_bytes)


def private_memory(pid: int) -> dict[str, PageRanges]:
    """Address ranges of private mappings by kind: "anonymous" (the stack too), "files"."""
    spans: dict[str, list[tuple[int, int]]] = {"anonymous": [], "files": []}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        where, mode, _offset, _device, inode, *name = line.split(maxsplit=5)
        if "s" not in mode and not (name and name[0].startswith("[v")):
            start, end = (int(part, 16) for part in where.split("-"))
            spans["anonymous" if inode == "0" else "files"].append((start, end))
    return {kind: PageRanges.from_spans(found) for kind, found in spans.items()}


def existing_pages(pid: int) -> PageRanges:
    found = EMPTY
    with Pagemap(pid) as pagemap:
        for kind, ranges in private_memory(pid).items():
            for start, end in ranges.spans():
                found = found | PageRanges.of(pagemap.own_pages(start, end, of_files=kind == "files"))
    return found


def every_nth_page(ranges: PageRanges, nth: int) -> PageRanges:
    """One page of ``nth``, of each range the first."""
    return PageRanges.from_spans(
        (page, page + PAGE) for start, end in ranges.spans() for page in range(start, end, nth * PAGE)
    )


def copied(pid: int, ranges: PageRanges) -> dict[int, bytes]:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return {start: os.pread(memory.fileno(), end - start, start) for start, end in ranges.spans()}


def write_images(directory: Path, source: Path, received: Received, own: dict[int, dict[int, bytes]]) -> None:
    """What a target would have: our copies, and what came in the dump."""
    writer = PageImageWriter(directory, CRIU.version)
    for space, runs in received.runs.items():
        writer.open(space)
        ours = own.get(space.id, {}) if space.kind == "task" else {}
        parts = [(address, 4, data) for address, data in ours.items()] + runs
        for address, flags, data in sorted(parts, key=lambda part: part[0]):
            writer.write(space, [(address, len(data) // PAGE, flags)], data)
    writer.finish()
    files = ImageSetWriter(directory)
    for path in source.glob("*.img"):
        files.write_file(path.name, path.read_bytes())


@contextlib.contextmanager
def on_tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cmigrate-test-", dir="/dev/shm") as memory:
        yield Path(memory)


def known_and_dirty(tasks: Tasks, nth: int) -> tuple[dict[int, PageRanges], dict[int, PageRanges]]:
    """Of each task: all of its private memory but the dirty pages, and the dirty pages, one of ``nth`` that exist."""
    known, dirty = {}, {}
    for pid in tasks.pids:
        dirty[pid] = every_nth_page(existing_pages(pid), nth)
        memory = private_memory(pid)
        known[pid] = (memory["anonymous"] | memory["files"]) - dirty[pid]
    return known, dirty


def test_only_pages_that_the_target_lacks_are_sent_and_the_rest_comes_from_copies(
    tmp_path: Path, library: Path
) -> None:
    with running_tasks(tmp_path, 170) as tasks, on_tmpfs() as target, PageFilter(library) as page_filter:
        before = tasks.contents()
        known, dirty = known_and_dirty(tasks, 997)
        own = {pid: copied(pid, existing_pages(pid) - dirty[pid]) for pid in tasks.pids}
        assert sum(len(data) for pages in own.values() for data in pages.values()) > 500 * MIB
        source = tmp_path / "source"
        source.mkdir()
        received = Received()
        dump = FilteredDump(source, page_filter, known)
        dump.shortest_bytes = PAGE
        dump.run(tasks.pids[0], received)
        for pid in tasks.pids:
            came = received.ranges(pid)
            assert dirty[pid] - came == EMPTY
            # CRIU sends the vDSO whole, whatever it is told.
            assert (came - dirty[pid]).pages <= 4
        assert page_filter.counters().removed_bytes > 500 * MIB
        tasks.reap()
        write_images(target, source, received, own)
        restore(CRIU, target)
        assert tasks.contents() == before


@pytest.mark.parametrize("nth", [2, 3, 70])
def test_dirty_pages_scattered_as_closely_as_can_be_all_come(tmp_path: Path, library: Path, nth: int) -> None:
    with running_tasks(tmp_path, 24) as tasks, PageFilter(library) as page_filter:
        known, dirty = known_and_dirty(tasks, nth)
        received = Received()
        dump = FilteredDump(tmp_path, page_filter, known)
        dump.shortest_bytes = PAGE
        dump.run(tasks.pids[0], received, leave_running=True)
        for pid in tasks.pids:
            came = received.ranges(pid)
            assert dirty[pid] - came == EMPTY
            assert (came - dirty[pid]).pages <= 4


def test_pages_scattered_so_closely_that_pieces_cost_more_are_sent_with_what_lies_between(
    tmp_path: Path, library: Path
) -> None:
    with running_tasks(tmp_path, 24) as tasks, PageFilter(library) as page_filter:
        existing = {pid: existing_pages(pid) for pid in tasks.pids}
        known, dirty = known_and_dirty(tasks, 5)
        received = Received()
        FilteredDump(tmp_path, page_filter, known).run(tasks.pids[0], received, leave_running=True)
        for pid in tasks.pids:
            came = received.ranges(pid)
            assert dirty[pid] - came == EMPTY
            assert came.pages > 0.9 * existing[pid].pages
            assert len(came) < len(dirty[pid]) / 2


def test_nothing_published_is_nothing_filtered(tmp_path: Path, library: Path) -> None:
    with running_tasks(tmp_path, 4) as tasks, PageFilter(library) as page_filter:
        existing = {pid: existing_pages(pid) for pid in tasks.pids}
        received = Received()
        dump = FilteredDump(tmp_path, page_filter, {tasks.pids[1]: EMPTY, 999999: PageRanges.from_spans([(0, PAGE)])})
        dump.run(tasks.pids[0], received, leave_running=True)
        counters = page_filter.counters()
        assert all(existing[pid] - received.ranges(pid) == EMPTY for pid in tasks.pids)
        assert counters.loaded
        assert counters.calls > 0
        assert (counters.filtered, counters.removed_bytes) == (0, 0)


def test_a_filtered_dump_takes_a_fraction_of_an_unfiltered_one(tmp_path: Path, library: Path) -> None:
    with running_tasks(tmp_path, 170) as tasks:
        known, _dirty = known_and_dirty(tasks, 9973)
        times: dict[str, list[float]] = {"page server": [], "filter": []}
        for attempt in range(3):
            for name in times:
                images = tmp_path / f"{name}-{attempt}"
                images.mkdir()
                with PageFilter(library) as page_filter:
                    dump = FilteredDump(images, page_filter if name == "filter" else None, known)
                    dump.run(tasks.pids[0], Discarded(), leave_running=True)
                times[name].append(dump.dump_s)
        whole_s, filtered_s = (min(found) for found in times.values())
        print(f"\n512 MiB: {whole_s:.3f} s to discard, {filtered_s:.3f} s filtered: {whole_s / filtered_s:.1f}")
        assert filtered_s < whole_s


CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def in_own_network() -> Iterator[int]:
    """A process in a network namespace of its own, in which a connection is tracked."""
    chain = "add chain ip t c { type filter hook output priority 0; }"
    track = f"add table ip t; {chain}; add rule ip t c ct state new accept"
    script = f"ip link set lo up && nft '{track}' && echo >/dev/udp/127.0.0.1/9; exec sleep 600"
    process = subprocess.Popen(
        ["unshare", "--net", "bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    try:
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "sleep to run")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_connection_tracking_is_left_out_when_asked_and_only_then(tmp_path: Path, library: Path) -> None:
    times: dict[bool, list[float]] = {False: [], True: []}
    with in_own_network() as pid:
        for number in range(3):
            for without in times:
                images = tmp_path / f"{number}-{without}"
                images.mkdir()
                with PageFilter(library, without_conntrack=without) as page_filter:
                    dump = FilteredDump(images, page_filter, {})
                    dump.empty_namespaces = CLONE_NEWNET
                    dump.run(pid, Discarded(), leave_running=True)
                    assert page_filter.counters().skipped_dumps == (2 if without else 0)
                times[without].append(dump.dump_s * 1000)
                # CRIU keeps no image that is empty.
                assert bool(list(images.glob("netns-ct-*.img"))) is not without
    print(f"\nwith connection tracking {min(times[False]):.1f} ms, without {min(times[True]):.1f} ms")


def test_programs_that_criu_starts_do_not_get_the_filter(tmp_path: Path, library: Path) -> None:
    """CRIU runs an action script for each notification when it is told to; its environment is what it got."""
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\nenv >"{tmp_path}/environment"\nls -l /proc/self/fd >"{tmp_path}/descriptors"\n')
    script.chmod(0o755)
    with running_tasks(tmp_path, 4) as tasks, PageFilter(library) as page_filter:
        images = tmp_path / "images"
        images.mkdir()
        subprocess.run(
            [*CRIU.argv, "dump", "-t", str(tasks.pids[0]), "-D", str(images), "-R", "--action-script", str(script)],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **page_filter.environment},
            pass_fds=page_filter.pass_fds,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE_S,
            check=True,
        )
        assert page_filter.loaded
    environment = (tmp_path / "environment").read_text()
    assert "CRTOOLS_SCRIPT_ACTION" in environment
    assert "PRELOAD" not in environment
    assert "CMIGRATE" not in environment
    assert "cmigrate-filter" not in (tmp_path / "descriptors").read_text()


def test_the_filter_is_found_to_work_here_or_why_not_is_said(tmp_path: Path) -> None:
    assert filter_available(CRIU, tmp_path / "cache") == ""
    not_criu = CriuBinary(argv=("/nonexistent/criu",), version=(4, 2, 1), origin="env")
    assert "did not start" in filter_available(not_criu, tmp_path / "cache")


def test_a_static_criu_is_noticed(tmp_path: Path) -> None:
    program = tmp_path / "static"
    source = tmp_path / "static.c"
    intel, arm = "mov $60, %eax; xor %edi, %edi; syscall", "mov x8, 93; mov x0, 0; svc 0"
    leave = arm if platform.machine() == "aarch64" else intel
    source.write_text(f'void _start(void) {{ __asm__("{leave}"); }}\n')
    subprocess.run(["cc", "-static", "-nostdlib", "-o", str(program), str(source)], check=True, timeout=60)
    static = CriuBinary(argv=(str(program),), version=(4, 2, 1), origin="env")
    assert "statically" in filter_available(static, tmp_path / "cache")


def test_a_table_without_room_leaves_out_tasks_not_dumps(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.criu.filter.table.CAPACITY_BYTES", 1 << 16)
    many = every_nth_page(PageRanges.from_spans([(0, 8192 * PAGE)]), 2)
    with PageFilter(library) as page_filter:
        page_filter.publish({1: many, 2: PageRanges.from_spans([(0, PAGE)])})
        assert page_filter.counters() == FilterCounters(loaded=False, calls=0, filtered=0, scans=0, removed_bytes=0)
        started = time.monotonic()
    assert time.monotonic() - started < 30
