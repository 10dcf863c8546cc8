"""A task inside vfork is told from one that sleeps for another reason."""

import ctypes
import os
import signal
import time
from pathlib import Path

from runtime.linux.vfork import tasks_in_vfork, waits_for_child


def test_a_task_that_sleeps_in_a_clone_waits_for_its_child() -> None:
    assert waits_for_child("7 (a) b) D 1 7", "58 0x0 0x0")
    assert waits_for_child("7 (sh) D 1 7", "435 0x7ffd 0x58")
    assert not waits_for_child("7 (sh) D 1 7", "0 0x3 0x7ffd")
    assert not waits_for_child("7 (sh) S 1 7", "58 0x0")
    assert not waits_for_child("7 (sh) D 1 7", "running")


def test_a_parent_whose_vforked_child_does_not_go_on_is_found() -> None:
    """The child of the child runs on the same stack and must not return, so it sleeps until it is killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        try:
            # In a ctypes call the interpreter's lock is free, but nobody else is here to take it.
            if libc.vfork() == 0:
                libc.pause()
        finally:
            os._exit(0)
    try:
        deadline = time.monotonic() + 5
        while tasks_in_vfork([child]) != [child]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert tasks_in_vfork([os.getpid()]) == []
    finally:
        grandchildren = Path(f"/proc/{child}/task/{child}/children").read_text().split()
        for pid in (*map(int, grandchildren), child):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(child, 0)
