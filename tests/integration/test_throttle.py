"""A container that was slowed down gets its speed back, whoever dies."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.api import Limits
from runtime.cgroup import ContainerCgroup
from runtime.cgroup_layout import CgroupLayout
from runtime.errors import MissingFeature, ProgramFailed
from runtime.throttle import CpuThrottle

TOP = Path(__file__).resolve().parents[2]
PARENT = f"cmigrate-test-{secrets.token_hex(3)}/throttle"
ID = "aa0000000002"
WAIT_S = 10.0

# What a migrating process does; it says so when the limit is in force, and then hangs.
VICTIM = f"""
import sys, time
sys.path.insert(0, {str(TOP)!r})
from runtime.cgroup import ContainerCgroup
from runtime.cgroup_layout import CgroupLayout
from runtime.throttle import CpuThrottle
cgroup = ContainerCgroup(CgroupLayout.probe(), {PARENT!r}, {ID!r})
throttle = CpuThrottle(cgroup, own_cpus=1.5, silence_s=float(sys.argv[1]))
throttle.slow_to(0.2)
print("slowed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def cgroup() -> Iterator[ContainerCgroup]:
    group = ContainerCgroup(CgroupLayout.probe(), PARENT, ID)
    group.create(Limits(cpus=1.5))
    yield group
    group.kill()
    assert group.wait_empty(WAIT_S)
    group.remove()


def limit_of(cgroup: ContainerCgroup) -> float | None:
    """In processors, as the kernel has it."""
    for directory in cgroup.paths():
        if (directory / "cpu.cfs_quota_us").exists():
            quota = int((directory / "cpu.cfs_quota_us").read_text())
            return None if quota < 0 else quota / int((directory / "cpu.cfs_period_us").read_text())
        if (directory / "cpu.max").exists():
            value, period = (directory / "cpu.max").read_text().split()
            return None if value == "max" else int(value) / int(period)
    raise AssertionError("no cpu controller here")


def wait_for_limit(cgroup: ContainerCgroup, wanted: float | None) -> None:
    end = time.monotonic() + WAIT_S
    while limit_of(cgroup) != wanted:
        assert time.monotonic() < end, f"the limit is {limit_of(cgroup)}, not {wanted}"
        time.sleep(0.01)


def spinning(cgroup: ContainerCgroup, seconds: float) -> float:
    """Processor time that a busy member gets in so long, as a share of one."""

    def join() -> None:
        for path in cgroup.paths():
            (path / "cgroup.procs").write_text("0")

    with subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"], preexec_fn=join) as process:
        before = (cgroup.stats().cpu_usage_s or 0.0, time.monotonic())
        time.sleep(seconds)
        after = (cgroup.stats().cpu_usage_s or 0.0, time.monotonic())
        process.kill()
    return (after[0] - before[0]) / (after[1] - before[1])


def test_a_slowed_container_is_slow_and_has_its_own_limit_afterwards(cgroup: ContainerCgroup) -> None:
    with CpuThrottle(cgroup, own_cpus=1.5) as throttle:
        assert limit_of(cgroup) == 1.5
        throttle.slow_to(0.2)
        assert limit_of(cgroup) == 0.2
        assert spinning(cgroup, 1.0) < 0.4
        throttle.slow_to(0.1)
        assert (limit_of(cgroup), throttle.cpus) == (0.1, 0.1)
        throttle.lift()
        assert (limit_of(cgroup), throttle.cpus) == (1.5, None)
        assert throttle.withheld_cpu_s > 1.0
        throttle.lift()
    assert limit_of(cgroup) == 1.5


def test_a_container_without_a_limit_has_none_afterwards(cgroup: ContainerCgroup) -> None:
    cgroup.set_cpu_quota(None)
    with CpuThrottle(cgroup, own_cpus=None) as throttle:
        throttle.slow_to(0.5)
        assert limit_of(cgroup) == 0.5
    assert limit_of(cgroup) is None


def test_it_never_gets_more_than_its_own_limit(cgroup: ContainerCgroup) -> None:
    with CpuThrottle(cgroup, own_cpus=1.5) as throttle:
        throttle.slow_to(8)
        assert limit_of(cgroup) == 1.5


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_when_the_throttling_process_is_killed_the_limit_is_given_back(
    cgroup: ContainerCgroup, how: signal.Signals
) -> None:
    with slowing(600) as process:
        assert limit_of(cgroup) == 0.2
        # To its whole group, as a terminal does.
        os.killpg(process.pid, how)
        process.wait(WAIT_S)
        wait_for_limit(cgroup, 1.5)


def test_when_the_throttling_process_hangs_the_limit_is_given_back(cgroup: ContainerCgroup) -> None:
    with slowing(0.5) as process:
        os.kill(process.pid, signal.SIGSTOP)
        wait_for_limit(cgroup, 1.5)
        process.kill()


def slowing(silence_s: float) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(silence_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"slowed\n"
    return process


def test_signs_of_life_keep_the_limit(cgroup: ContainerCgroup) -> None:
    with CpuThrottle(cgroup, own_cpus=1.5, silence_s=0.5) as throttle:
        throttle.slow_to(0.2)
        for _step in range(8):
            time.sleep(0.1)
            throttle.still_here()
        assert limit_of(cgroup) == 0.2


def test_without_its_watchdog_nothing_is_slowed(cgroup: ContainerCgroup) -> None:
    with CpuThrottle(cgroup, own_cpus=1.5, silence_s=0.1) as throttle:
        throttle.slow_to(0.2)
        # It takes silence for death, writes the limit back, and ends.
        wait_for_limit(cgroup, 1.5)
        time.sleep(0.3)
        with pytest.raises(ProgramFailed):
            throttle.slow_to(0.2)
        assert limit_of(cgroup) == 1.5


def test_a_container_that_is_gone_troubles_nobody() -> None:
    group = ContainerCgroup(CgroupLayout.probe(), PARENT, "aa0000000003")
    group.create(Limits(cpus=1.5))
    with CpuThrottle(group, own_cpus=1.5) as throttle:
        throttle.slow_to(0.2)
        group.remove()


def test_without_a_cpu_controller_it_says_so() -> None:
    group = ContainerCgroup(CgroupLayout(v2=None, v1=()), PARENT, ID)
    with CpuThrottle(group, own_cpus=None) as throttle, pytest.raises(MissingFeature):
        throttle.slow_to(0.2)
