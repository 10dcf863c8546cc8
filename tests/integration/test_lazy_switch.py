"""The machine's switch for userfaultfds of other user namespaces: on while somebody needs it, then as it was."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.memory.lazy import SYSCTL, eager_is_better, lazy_restore_allowed, turn_off_what_is_left

TOP = Path(__file__).resolve().parents[2]
HOLDER = """
import pathlib, sys
from runtime.memory.lazy import lazy_restore_allowed
with lazy_restore_allowed(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.readline()
print("out", flush=True)
"""
MIB = 1 << 20


@pytest.fixture(autouse=True)
def switch_is_off_before_and_after() -> Iterator[None]:
    before = SYSCTL.read_text()
    SYSCTL.write_text("0\n")
    yield
    SYSCTL.write_text(before)


class Holder:
    """Another process that is inside."""

    def __init__(self, run_dir: Path, *inside: str) -> None:
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-c", HOLDER, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TOP,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "in\n"

    def leave(self) -> None:
        self.process.communicate("\n", timeout=20)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=20)


def switch() -> int:
    return int(SYSCTL.read_text())


def test_the_last_one_out_turns_it_off(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    assert switch() == 1
    second = Holder(tmp_path)
    first.leave()
    assert switch() == 1
    with lazy_restore_allowed(tmp_path):
        second.leave()
        assert switch() == 1
    assert switch() == 0


def test_who_is_in_another_pid_namespace_counts(tmp_path: Path) -> None:
    first, second = Holder(tmp_path), Holder(tmp_path, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    first.leave()
    assert switch() == 1
    second.leave()
    assert switch() == 0


def test_what_an_administrator_turned_on_stays_on(tmp_path: Path) -> None:
    SYSCTL.write_text("1\n")
    with lazy_restore_allowed(tmp_path):
        assert switch() == 1
    assert switch() == 1
    turn_off_what_is_left(tmp_path)
    assert switch() == 1


def test_it_is_turned_off_after_the_only_one_was_killed(tmp_path: Path) -> None:
    Holder(tmp_path).kill()
    assert switch() == 1
    second = Holder(tmp_path)
    turn_off_what_is_left(tmp_path)
    assert switch() == 1, "somebody is inside"
    second.leave()
    assert switch() == 0
    Holder(tmp_path).kill()
    turn_off_what_is_left(tmp_path)
    assert switch() == 0
    assert not list(tmp_path.iterdir())


def test_it_is_turned_off_after_one_of_several_was_killed(tmp_path: Path) -> None:
    first, second = Holder(tmp_path), Holder(tmp_path)
    first.kill()
    assert switch() == 1
    second.leave()
    assert switch() == 0


def test_little_memory_and_much_shared_memory_are_better_restored_at_once() -> None:
    assert eager_is_better(16 * MIB, 0)
    assert not eager_is_better(64 * MIB, 0)
    assert eager_is_better(1024 * MIB, 512 * MIB)
    assert not eager_is_better(1024 * MIB, 10 * MIB)
