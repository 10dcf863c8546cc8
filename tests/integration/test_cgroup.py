"""Control groups of this kernel, in the layout this host has, and in what a v1-only and a bare v2 host would have."""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.api import Limits
from runtime.cgroup import ContainerCgroup
from runtime.cgroup_layout import CgroupLayout
from runtime.errors import KernelCallFailed, RuntimeFault, WrongState

HOST = CgroupLayout.probe()
LAYOUTS = {"host": HOST}
if HOST.v2 is not None:
    LAYOUTS["bare v2"] = CgroupLayout(v2=HOST.v2, v1=())
if "freezer" in dict(HOST.v1):
    LAYOUTS["v1 alone"] = CgroupLayout(v2=None, v1=HOST.v1)
PARENT = f"cmigrate-test-{secrets.token_hex(3)}/inner"
MIB = 1 << 20
WAIT_S = 10.0

LOOP = "while :; do sleep 0.005; done"
SPIN = "while :; do :; done"


@pytest.fixture(params=list(LAYOUTS.values()), ids=list(LAYOUTS))
def cgroup(request: pytest.FixtureRequest) -> Iterator[ContainerCgroup]:
    with made(request.param) as group:
        yield group


@contextlib.contextmanager
def made(layout: CgroupLayout, limits: Limits | None = None) -> Iterator[ContainerCgroup]:
    group = ContainerCgroup(layout, PARENT, "aa0000000001")
    group.create(limits or Limits())
    try:
        yield group
    finally:
        group.kill()
        assert group.wait_empty(WAIT_S)
        group.remove()


@contextlib.contextmanager
def member(cgroup: ContainerCgroup, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that was in the cgroup before it became ``argv``."""

    def join() -> None:
        for path in cgroup.paths():
            (path / "cgroup.procs").write_text("0")

    with subprocess.Popen(argv, preexec_fn=join, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            cgroup.thaw()
            process.kill()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_making_and_removing_can_each_be_done_twice_and_leave_nothing(cgroup: ContainerCgroup) -> None:
    cgroup.create(Limits())
    assert all(path.is_dir() for path in cgroup.paths())
    cgroup.remove()
    cgroup.remove()
    assert not any(path.exists() or path.parent.exists() for path in cgroup.paths())


def test_a_frozen_group_does_not_run_and_a_thawed_one_goes_on(cgroup: ContainerCgroup) -> None:
    with member(cgroup, "sh", "-c", SPIN) as process:
        assert cgroup.pids() == [process.pid]
        assert not cgroup.frozen()
        cgroup.freeze()
        assert cgroup.frozen()
        before = cpu_ticks(process.pid)
        cgroup.freeze()
        time.sleep(0.1)
        assert cpu_ticks(process.pid) == before
        cgroup.thaw()
        assert not cgroup.frozen()
        assert eventually(lambda: cpu_ticks(process.pid) > before)


def test_freezing_takes_children_and_groups_inside_along(cgroup: ContainerCgroup) -> None:
    with member(cgroup, "sh", "-c", f"({LOOP}) & ({LOOP}) & {LOOP}"):
        assert eventually(lambda: len(cgroup.pids()) >= 3)
        inner = [path / "inner" for path in cgroup.paths()]
        for path in inner:
            path.mkdir()
            (path / "cgroup.procs").write_text(str(cgroup.pids()[-1]))
        cgroup.freeze()
        # The loops start a program each time; frozen they do not.
        frozen = cgroup.pids()
        time.sleep(0.1)
        assert len(frozen) >= 3
        assert cgroup.pids() == frozen
        cgroup.thaw()
        cgroup.kill()
        assert cgroup.wait_empty(WAIT_S)


def test_freezing_again_at_once_is_quick(cgroup: ContainerCgroup) -> None:
    # What a dump does: the container is thawed for a moment, and the kernel tells of changes every 10 ms only.
    with member(cgroup, "sh", "-c", LOOP):
        times = []
        for _ in range(30):
            begin = time.monotonic()
            cgroup.freeze()
            times.append(time.monotonic() - begin)
            cgroup.thaw()
        # On a busy machine many take longer, for want of a processor; waiting for a notice would delay all.
        assert min(times) < 0.008


def test_what_does_not_freeze_in_time_runs_on_and_is_told(cgroup: ContainerCgroup) -> None:
    done = threading.Event()

    def meddle() -> None:
        while not done.is_set():
            cgroup.thaw()

    meddler = threading.Thread(target=meddle)
    with member(cgroup, "sh", "-c", f"({SPIN}) & ({SPIN}) & ({SPIN}) & {SPIN}"):
        assert eventually(lambda: len(cgroup.pids()) == 4)
        meddler.start()
        try:
            failure = None
            deadline = time.monotonic() + WAIT_S
            while failure is None and time.monotonic() < deadline:
                failure = failure_of_freezing(cgroup)
        finally:
            done.set()
            meddler.join(WAIT_S)
        assert failure is not None
        assert "could not be frozen within 0 s" in failure.what
        assert failure.hint
        cgroup.thaw()
        assert not cgroup.frozen()


def failure_of_freezing(cgroup: ContainerCgroup) -> RuntimeFault | None:
    try:
        cgroup.freeze(timeout_s=0.0)
    except RuntimeFault as error:
        return error
    return None


def test_a_removed_group_can_not_be_frozen(cgroup: ContainerCgroup) -> None:
    cgroup.remove()
    with pytest.raises(WrongState):
        cgroup.freeze()


@pytest.mark.parametrize("frozen", [False, True])
def test_killing_ends_everything_also_what_is_frozen_or_makes_children_all_the_time(
    cgroup: ContainerCgroup, frozen: bool
) -> None:
    forker = "while :; do sleep 0.2 & done"
    with member(cgroup, "sh", "-c", f"trap '' TERM INT; ulimit -u 4000; {LOOP} & {forker}") as process:
        assert eventually(lambda: len(cgroup.pids()) > 5)
        if frozen:
            cgroup.freeze()
        cgroup.kill()
        assert process.wait(WAIT_S) == -signal.SIGKILL
        assert cgroup.wait_empty(WAIT_S)
        assert cgroup.pids() == []


def test_waiting_for_members_to_go_ends_after_the_time_given(cgroup: ContainerCgroup) -> None:
    with member(cgroup, "sleep", "60"):
        assert not cgroup.wait_empty(0.02)
        with pytest.raises(KernelCallFailed, match="rmdir"):
            cgroup.remove()


def test_a_process_from_elsewhere_can_be_added(cgroup: ContainerCgroup) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        cgroup.add(process.pid)
        assert cgroup.pids() == [process.pid]
        with pytest.raises(KernelCallFailed):
            cgroup.add(2**22 + 1)
        process.kill()


def test_groups_made_and_removed_at_once_do_not_disturb_each_other() -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        group = ContainerCgroup(HOST, PARENT, f"{number:012x}")
        try:
            for _ in range(40):
                group.create(Limits())
                group.remove()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert failures == []


# Limits and what is measured


def test_memory_beyond_the_limit_ends_the_process_and_is_counted() -> None:
    with made(HOST, Limits(memory_bytes=40 * MIB)) as cgroup:
        with member(cgroup, sys.executable, "-c", "x = bytearray(20 << 20); print(1, flush=True); input()") as process:
            assert process.stdout
            process.stdout.readline()
        with member(cgroup, sys.executable, "-c", "x = b'x' * (200 << 20)") as process:
            assert process.wait(WAIT_S) == -signal.SIGKILL
        stats = cgroup.stats()
        assert stats.oom_kills >= 1
        assert stats.memory_limit_bytes == 40 * MIB
        cgroup.set_limits(Limits(memory_bytes=400 * MIB))
        with member(cgroup, sys.executable, "-c", "x = b'x' * (200 << 20)") as process:
            assert process.wait(WAIT_S) == 0
        cgroup.set_limits(Limits(memory_bytes=30 * MIB))
        assert cgroup.stats().memory_limit_bytes == 30 * MIB
        cgroup.set_limits(Limits())
        assert cgroup.stats().memory_limit_bytes is None


def test_memory_in_use_is_measured() -> None:
    program = "x = b'x' * (50 << 20); print(1, flush=True); import time; time.sleep(60)"
    with made(HOST) as cgroup, member(cgroup, sys.executable, "-c", program) as process:
        assert process.stdout
        process.stdout.readline()
        used = cgroup.stats().memory_bytes
        assert used is not None
        assert 50 * MIB < used < 200 * MIB


def test_more_processes_than_allowed_can_not_be_made() -> None:
    program = (
        "import os, signal\n"
        "for n in range(20):\n"
        "    try:\n"
        "        if os.fork() == 0: signal.pause()\n"
        "    except BlockingIOError: os._exit(n)\n"
    )
    with made(HOST, Limits(pids=5)) as cgroup, member(cgroup, sys.executable, "-c", program) as process:
        assert process.wait(WAIT_S) == 4
        assert cgroup.stats().pids == 4


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "bare v2"])
def test_a_share_of_a_processor_is_kept_lifted_and_measured(name: str) -> None:
    with made(LAYOUTS[name], Limits(cpus=0.2)) as cgroup, member(cgroup, "sh", "-c", SPIN):

        def used_in(seconds: float) -> float:
            before = cgroup.stats().cpu_usage_s
            time.sleep(seconds)
            after = cgroup.stats().cpu_usage_s
            assert before is not None
            assert after is not None
            return after - before

        used_in(0.1)
        slow = used_in(0.6)
        assert 0.02 < slow < 0.3
        cgroup.set_cpu_quota(None)
        # On a busy machine it may not get a whole one.
        assert used_in(0.6) > slow


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "bare v2"])
def test_a_group_that_has_used_up_its_share_freezes_without_waiting_for_the_next_and_keeps_its_limit(name: str) -> None:
    with made(LAYOUTS[name], Limits(cpus=0.02)) as cgroup, member(cgroup, "sh", "-c", f"({SPIN}) & {SPIN}"):
        time.sleep(0.3)
        times = []
        for _ in range(7):
            begin = time.monotonic()
            cgroup.freeze()
            times.append(time.monotonic() - begin)
            cgroup.thaw()
            time.sleep(0.02)
        # A share of 2 ms in every 100: waiting for one takes 50 ms on average, and two for both.
        assert min(times[1:]) < 0.04
        before = cgroup.stats().cpu_usage_s
        time.sleep(0.5)
        after = cgroup.stats().cpu_usage_s
        assert before is not None
        assert after is not None
        assert after - before < 0.1
