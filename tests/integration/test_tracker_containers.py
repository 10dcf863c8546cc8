"""Containers that are tracked: confined by seccomp, in a user namespace of their own, and busy while it happens."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.api import Container
from runtime.container import Containers
from runtime.memory import remote, tracker_uffd
from runtime.memory.api import DirtyTracker
from runtime.memory.tracker_hash import HashTracker
from runtime.memory.tracker_uffd import UffdTracker
from runtime.specify import new_spec
from tests.support.containers import one_host
from tests.support.mapper import Copies
from tests.support.tasks import descriptors, wait_for
from tests.support.tracer import ThreadTracer

CHURN = Path(__file__).resolve().parents[1] / "workloads" / "churn.py"
MIB, WORKERS = 6, 3


@pytest.fixture
def containers() -> Iterator[Containers]:
    with one_host("cmtr0") as found:
        yield found


class Churning:
    """A container whose processes map, move, unmap and fork all the time, and know what their memory must hold."""

    def __init__(self, containers: Containers) -> None:
        # As text: the checkout may lie where a container does not see the host.
        program = ["-I", "-S", "-B", "-c", CHURN.read_text()]
        argv = [os.path.realpath("/usr/bin/python3"), *program, "/churn", str(MIB), str(WORKERS)]
        self.container: Container = containers.run(new_spec(containers, argv=argv, rootfs="host", network=False))
        self.cgroup = containers.cgroup(self.container.id)
        self._upper = containers.store.directory(self.container.id) / "upper/churn"
        self._log = containers.store.directory(self.container.id) / "log.jsonl"
        wait_for(lambda: all((self._upper / str(n)).exists() for n in range(WORKERS)), "the workload to be busy")

    def steps(self) -> list[int]:
        return [int((self._upper / str(number)).read_text() or 0) for number in range(WORKERS)]

    def goes_on_and_is_right(self) -> None:
        before = self.steps()
        try:
            wait_for(lambda: all(now > then for now, then in zip(self.steps(), before, strict=True)), "more steps")
        except AssertionError as error:
            told = f"{self.wrong()}\n{self._log.read_text()}"
            raise AssertionError(f"{error}: {before}, {self.steps()}\n{told}") from error
        assert not self.wrong()

    def wrong(self) -> str:
        """What the workers have complained about."""
        file = self._upper / "wrong"
        return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("make", [UffdTracker, HashTracker])
def test_copies_of_a_churning_container_are_right_once_it_is_frozen(
    containers: Containers, make: type[DirtyTracker]
) -> None:
    churning = Churning(containers)
    tracker = make()
    try:
        copies = Copies(tracker)
        tracker.arm(churning.cgroup.pids())
        end = time.monotonic() + 3
        while time.monotonic() < end:
            copies.follow(churning.cgroup.pids())
        churning.cgroup.freeze()
        frozen = churning.cgroup.pids()
        last = copies.follow(frozen, final=True)
        copies.check([process.pid for process in last.processes if not process.shares_memory_with])
        assert {process.pid for process in last.processes} >= set(frozen[:WORKERS])
    finally:
        tracker.close()
    churning.cgroup.thaw()
    churning.goes_on_and_is_right()


def test_every_process_is_tracked_though_its_seccomp_filter_forbids_userfaultfd(containers: Containers) -> None:
    churning = Churning(containers)
    pids = churning.cgroup.pids()
    filters = confined(pids)
    assert len(filters) >= WORKERS
    assert all(filters.values())
    tracker = UffdTracker()
    try:
        tracker.arm(pids)
        scan = tracker.scan(pids)
        reasons = {process.pid: process.reason for process in scan.processes if process.reason}
        assert (reasons, tracker.facts().armed >= WORKERS) == ({}, True)
        clean = tracker.scan(pids)
        total = sum(process.existing.pages for process in clean.processes)
        assert sum(process.to_copy.pages for process in clean.processes) < total / 2
    finally:
        tracker.close()
    churning.goes_on_and_is_right()


def holders(pids: list[int]) -> list[int]:
    """Those that hold a userfaultfd, which CRIU can not dump."""
    return [pid for pid in pids if "anon_inode:[userfaultfd]" in descriptors(pid)]


def confined(pids: list[int]) -> dict[int, bool]:
    """By pid of the workload's processes, without those that have ended: whether a seccomp filter holds it."""
    found = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"churn.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    return found


def test_a_frozen_container_is_left_alone_and_tracked_once_it_runs_again(containers: Containers) -> None:
    churning = Churning(containers)
    churning.cgroup.freeze()
    pids = churning.cgroup.pids()
    tracker = UffdTracker()
    try:
        tracker.arm(pids)
        assert set(tracker.facts().untracked.values()) == {"it is frozen"}
        scan = tracker.scan(pids, final=True)
        assert all(process.to_copy == process.existing and process.reason for process in scan.processes)
        assert churning.cgroup.frozen()
        churning.cgroup.thaw()
        churning.goes_on_and_is_right()
        tracker.arm(churning.cgroup.pids())
        assert tracker.facts().armed >= WORKERS
    finally:
        tracker.close()
    churning.goes_on_and_is_right()


@pytest.mark.parametrize("patience_s", [remote.STOP_WAIT_S, 0.0004], ids=["patient", "hasty"])
def test_a_container_that_is_frozen_and_thawed_at_any_moment_is_not_harmed(
    containers: Containers, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    # A hasty tracer sees on any machine what a patient one sees on a busy one: threads that are slow to stop.
    monkeypatch.setattr(remote, "STOP_WAIT_S", patience_s)
    # It needs more attempts, too.
    monkeypatch.setattr(tracker_uffd, "TAKE_BACK_S", 30.0)
    churning = Churning(containers)
    over = threading.Event()

    def freeze_and_thaw() -> None:
        while not over.wait(random.uniform(0, 0.004)):
            churning.cgroup.freeze()
            time.sleep(random.uniform(0, 0.002))
            churning.cgroup.thaw()

    thread = threading.Thread(target=freeze_and_thaw)
    thread.start()
    armed = 0
    try:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            tracker = UffdTracker(tracer=ThreadTracer())
            try:
                tracker.arm(churning.cgroup.pids())
                tracker.scan(churning.cgroup.pids())
                armed += tracker.facts().armed
            finally:
                tracker.close()
            # Who was forked by one that was frozen with ours in hand has inherited it, too.
            assert not holders(churning.cgroup.pids())
    finally:
        over.set()
        thread.join()
    assert armed > 0
    churning.cgroup.freeze()
    assert not holders(churning.cgroup.pids())
    churning.cgroup.thaw()
    churning.goes_on_and_is_right()
