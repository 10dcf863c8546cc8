"""Bare processes restored with their memory still in the stores, and filled by the pager while they run."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.criu.lazy_images import write_lazy_images
from runtime.criu.pages import SpaceId
from runtime.memory.pager import Pager
from tests.support.lazy import (
    CRIU,
    Churn,
    ToStores,
    churn_goes_on_and_is_right,
    dump_to_stores,
    present,
    restore_lazily,
)
from tests.support.tasks import PATIENCE_S, Tasks, running_tasks

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cmigrate-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@contextlib.contextmanager
def moved(tasks: Tasks | Churn, directory: Path, *, early: bool = False) -> Iterator[Pager]:
    """Dumped into stores and restored lazily; the pager fills, if ``early`` before the release, the highest first."""
    consumer = ToStores()
    try:
        dump_to_stores(tasks.pids[0], directory, consumer)
        tasks.reap()
        spaces = write_lazy_images(
            directory, CRIU.version, consumer.stores, present=present(consumer.stores), eager=consumer.eager
        )
        with Pager([], record=directory / "pager.json") as pager:
            for space in spaces:
                store = consumer.stores[SpaceId("task", space.vpid)]
                pager.add_space(space.vpid, store, space.spans, hot=reversed(space.spans) if early else ())
            consumer.close()
            pager.listen(directory)
            restore_lazily(directory, (lambda _pid: pager.begin_filling()) if early else (lambda _pid: None))
            pager.begin_filling()
            yield pager
    finally:
        consumer.close()


@contextlib.contextmanager
def churning(directory: Path, mib: int) -> Iterator[Churn]:
    churn = Churn(directory, mib)
    try:
        yield churn
    finally:
        churn.kill()


@pytest.mark.parametrize("early", [False, True])
def test_memory_of_every_kind_is_what_it_was_after_a_lazy_restore(tmp_path: Path, memory: Path, early: bool) -> None:
    with running_tasks(tmp_path, 64) as tasks:
        before = tasks.contents()
        with moved(tasks, memory, early=early) as pager:
            assert tasks.contents() == before
            report = pager.wait(PATIENCE_S)
            assert report.filled_bytes > 64 * MIB
            assert tasks.contents() == before
            tasks.count_up(1)
            assert tasks.contents()[2]["count"] == before[2]["count"] + 1


def test_memory_is_right_while_it_is_moved_given_back_and_forked_in_mid_fill(tmp_path: Path, memory: Path) -> None:
    with churning(tmp_path, 192) as churn:
        churn_goes_on_and_is_right(tmp_path, churn.workers)
        with moved(churn, memory) as pager:
            report = pager.wait(PATIENCE_S)
            assert min(report.faults, report.moves, report.removals, report.forks) > 0
        churn_goes_on_and_is_right(tmp_path, churn.workers)
