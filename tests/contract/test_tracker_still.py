"""The tracker of memory that stands still: one copy is all there is to make."""

import os
import signal

import pytest

from runtime.memory.tracker_still import StillTracker
from tests.support.mapper import Copies, running_mapper
from tests.support.tasks import wait_for

pytestmark = pytest.mark.root


def stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def test_after_one_copy_nothing_is_dirty_and_the_copy_is_right() -> None:
    with running_mapper() as mapper:
        assert mapper.order("map", area=1, pages=64, kind="anon")
        assert mapper.order("write", area=1, page=0, count=64, value=1, how="instruction")
        for pid in mapper.pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: all(map(stopped, mapper.pids)), "the processes to stop")
            tracker = StillTracker()
            copies = Copies(tracker)
            (first,) = copies.follow(mapper.pids).processes
            assert first.to_copy == first.existing
            assert first.existing.pages > 100
            (last,) = copies.follow(mapper.pids, final=True).processes
            assert (last.to_copy.pages, last.existing) == (0, first.existing)
            copies.check(mapper.pids)
        finally:
            for pid in mapper.pids:
                os.kill(pid, signal.SIGCONT)
