"""The page filter on a container of ours: user, PID, mount and network namespaces, and CRIU started as for a move."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.container import Containers
from runtime.criu.binary import find_criu
from runtime.criu.dump import HeldDump
from runtime.criu.filter.build import build_filter
from runtime.criu.filter.table import PageFilter
from runtime.criu.pages import PageServer, RunReader, SpaceId, page_socketpair
from runtime.linux.pagemap import Pagemap
from runtime.memory.ranges import EMPTY, PageRanges
from runtime.specify import new_spec
from tests.support.containers import one_host
from tests.support.tasks import PATIENCE_S, wait_for

MIB = 1 << 20
CRIU = find_criu()
# Counts in memory of its own, and says so in the container's root.
COUNTER = """
import mmap, os, time
area = mmap.mmap(-1, 96 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(area), 1 << 20):
    area[at : at + (1 << 20)] = os.urandom(1 << 20)
count = 0
while True:
    count += 1
    area[0:8] = count.to_bytes(8, "little")
    open("/count.new", "w").write(str(int.from_bytes(area[0:8], "little")))
    os.rename("/count.new", "/count")
    time.sleep(0.01)
"""


@pytest.fixture
def containers() -> Iterator[Containers]:
    with one_host("cmpf0") as found:
        yield found


class Arrived:
    def __init__(self) -> None:
        self.ranges = EMPTY

    def open(self, space: SpaceId) -> None:
        pass

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        if space.kind == "task":
            self.ranges = self.ranges | PageRanges.from_spans([(address, address + pages * 4096)])


def big_area(pid: int) -> PageRanges:
    """The counter's own 96 MiB."""
    with Pagemap(pid) as pagemap:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if end - start >= 96 * MIB and line.split()[4] == "0":
                return PageRanges.of(pagemap.own_pages(start, end, of_files=False))
    raise AssertionError("the counter has no memory")


def dump_and_resume(
    containers: Containers, images: Path, library: Path | None, *, known_but_first_page: bool
) -> tuple[Arrived, PageRanges, float]:
    """What came of the counter's memory, what it is, and how long CRIU took from the walk on, in ms."""
    arrived = Arrived()
    ours, theirs = page_socketpair()
    server = PageServer(ours, CRIU.version, arrived)
    thread = threading.Thread(target=lambda: server.serve(idle_timeout_s=PATIENCE_S))
    known = EMPTY
    pids = containers.cgroup(containers.get("web1").id).pids()
    counter = next(pid for pid in pids if "python" in Path(f"/proc/{pid}/comm").read_text())
    with contextlib.ExitStack() as stack:
        page_filter = stack.enter_context(PageFilter(library, without_conntrack=True)) if library else None
        dump = HeldDump(containers, containers.get("web1"), CRIU, images)

        def publish() -> None:
            nonlocal known
            known = big_area(counter)
            if page_filter is not None and known_but_first_page:
                first = known.spans()[0][0]
                page_filter.publish({counter: known - PageRanges.from_spans([(first, first + 4096)])})

        try:
            dump.prepare(page_socket=theirs, page_filter=page_filter, leave_running=True)
            theirs.close()
            thread.start()
            assert page_filter is None or page_filter.loaded
            dump.freeze()
            dump.dump(before_walk=publish)
            thread.join(PATIENCE_S)
            dump.resume()
        except BaseException:
            dump.rollback()
            raise
        finally:
            ours.close()
    return arrived, known, (dump.marks["dumped"] - dump.marks["scanned"]) * 1000


def test_a_container_is_dumped_without_its_known_memory_and_runs_on(containers: Containers, tmp_path: Path) -> None:
    library = build_filter(tmp_path / "cache")
    argv = [os.path.realpath("/usr/bin/python3"), "-I", "-S", "-B", "-c", COUNTER]
    spec = new_spec(containers, argv=argv, name="web1", rootfs="host")
    containers.run(spec)
    count = containers.store.directory(spec.id) / "upper/count"
    wait_for(count.exists, "the counter to count")
    times: dict[str, list[float]] = {"plain": [], "filter": []}
    for number in range(3):
        for name, times_ms in times.items():
            images = tmp_path / f"{name}-{number}"
            images.mkdir()
            used = library if name == "filter" else None
            arrived, memory, took_ms = dump_and_resume(containers, images, used, known_but_first_page=True)
            times_ms.append(took_ms)
            assert memory.bytes == 96 * MIB
            came = arrived.ranges & memory
            if used:
                assert came.spans() == [(memory.spans()[0][0], memory.spans()[0][0] + 4096)]
            else:
                assert came == memory
            before = int(count.read_text())
            wait_for(lambda before=before: int(count.read_text()) > before + 3, "the counter to go on")
    print(f"\n96 MiB container: {min(times['plain']):.1f} ms plain, {min(times['filter']):.1f} ms filtered")
