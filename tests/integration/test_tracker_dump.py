"""CRIU dumps what was tracked just as it dumps what was not."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.criu.binary import find_criu
from runtime.memory.tracker_uffd import UffdTracker
from tests.support.tasks import Tasks, dump_session, restore, running_tasks

CRIU = find_criu()
PATIENCE_S = 60.0
PAGE = 4096


@pytest.fixture
def images() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cmigrate-test-", dir="/dev/shm") as directory:
        yield Path(directory)


def dump(tasks: Tasks, images: Path, at_frozen: Callable[[], None], *, leave_running: bool = True) -> int:
    """How many bytes of pages were written."""
    images.mkdir()

    def frozen(_pid: int) -> None:
        at_frozen()

    with dump_session(CRIU, tasks.pids[0], images, leave_running=leave_running) as (session, request):
        answer = session.run(request, {"query-ext-files": frozen}, PATIENCE_S)
    assert answer.success, (images / "dump.log").read_text()
    return sum(file.stat().st_size for file in images.glob("pages-*.img"))


@pytest.mark.parametrize("way", ["close", "clear_marks"])
def test_a_dump_after_tracking_is_as_large_as_one_without(way: str, tmp_path: Path, images: Path) -> None:
    with running_tasks(tmp_path, 16) as tasks:
        contents = tasks.contents()
        before = dump(tasks, images / "untracked", lambda: None)
        tracker = UffdTracker()
        tracker.arm(tasks.pids)
        for _ in range(3):
            tracker.scan(tasks.pids)
        found = []

        def last_scan() -> None:
            # Seized by CRIU as they are now, the tasks are not touched by this.
            found.append(tracker.scan(tasks.pids, final=True))
            getattr(tracker, way)()

        after = dump(tasks, images / "tracked", last_scan)
        assert [process.reason for process in found[0].processes] == [""] * len(tasks.pids)
        # CRIU's own code in the tasks may leave a page of stack more or less.
        assert abs(after - before) < 32 * PAGE
        tracker.close()
        assert tasks.contents() == contents


def test_what_was_dumped_while_still_watched_is_restored_as_it_was(tmp_path: Path, images: Path) -> None:
    with running_tasks(tmp_path, 16) as tasks:
        tracker = UffdTracker()
        tracker.arm(tasks.pids)
        tracker.scan(tasks.pids)
        contents = tasks.contents()
        tracker.scan(tasks.pids)

        def last_scan() -> None:
            tracker.scan(tasks.pids, final=True)
            tracker.clear_marks()

        dump(tasks, images / "tracked", last_scan, leave_running=False)
        tracker.close()
        tasks.reap()
        restore(CRIU, images / "tracked")
        assert tasks.contents() == contents
