"""Copying takes little of a processor that others want."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.background import GROUP, Background
from runtime.cgroup_layout import CgroupLayout
from tests.support.lab import TwoHosts, nothing_left_on
from tests.support.tasks import wait_for

TOP = Path(__file__).resolve().parents[2]
ENTER = """
from runtime.background import Background
background = Background()
background.enter()
print(flush=True)
input()
background.leave()
print(flush=True)
input()
"""
HOLDER = "import mmap, time; area = mmap.mmap(-1, 64 << 20); area[:] = b'x' * len(area); time.sleep(1000)"


def members() -> set[int]:
    """Of the group; empty also where there is none."""
    layout = CgroupLayout.probe()
    top = dict(layout.v1).get("cpu") or layout.v2
    assert top is not None
    with contextlib.suppress(FileNotFoundError):
        return {int(line) for line in (top / GROUP / "cgroup.procs").read_text().split()}
    return set()


@pytest.fixture(autouse=True)
def weights() -> None:
    layout = CgroupLayout.probe()
    of_v2 = (layout.v2 / "cgroup.controllers").read_text().split() if layout.v2 is not None else []
    if "cpu" not in [*dict(layout.v1), *of_v2]:
        pytest.skip("no cgroup hierarchy here has the cpu controller: nothing gives way to anything")


def groups() -> list[Path]:
    return [path for path in Path("/sys/fs/cgroup").glob(f"**/{GROUP}") if path.is_dir()]


def copier() -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", ENTER]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TOP)
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"
    return process


def test_the_group_is_there_while_anybody_is_in_it() -> None:
    with copier() as first, copier() as second:
        assert members() == {first.pid, second.pid}
        for process in (first, second):
            assert process.stdin is not None
            assert process.stdout is not None
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "\n"
            assert members() == ({second.pid} if process is first else set())
        assert groups() == []
        first.kill()
        second.kill()


def test_what_a_killed_one_leaves_is_swept_away() -> None:
    with copier() as process:
        process.kill()
    wait_for(lambda: not members(), "the killed one to be gone")
    assert len(groups()) == 1
    Background().sweep()
    assert groups() == []


@pytest.fixture
def holder(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    program = os.path.realpath("/usr/bin/python3")
    with nothing_left_on(two_hosts, "host1", "host2"):
        two_hosts.cmigrate("host1", "run", "-d", "--name", "h", "--rootfs", "host", "--", program, "-c", HOLDER)
        try:
            yield two_hosts
        finally:
            for host in ("host1", "host2"):
                two_hosts.cmigrate(host, "rm", "-f", "h", check=False)


def test_both_sides_copy_there_and_nobody_stays(holder: TwoHosts) -> None:
    slowly = ("--mode", "precopy", "--transport", "stream", "--compress", "none", "--bandwidth", "32M")
    with holder.moving("h", *slowly) as mover:
        # The mover, and the session on the target.
        wait_for(lambda: len(members()) == 2 and mover.pid in members(), "both to copy")
        assert mover.wait(60) == 0
    assert groups() == []
    (line,) = holder.lines("host2", "ps", "--json")
    assert (line["name"], line["status"]) == ("h", "running")
