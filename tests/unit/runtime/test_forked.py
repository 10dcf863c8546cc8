"""A child that goes on from here."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from runtime.forked import fork

TIMEOUT_S = 60.0


def sleep_long() -> int:
    time.sleep(TIMEOUT_S)
    return 0


def test_what_the_call_returns_is_the_exit_code() -> None:
    assert fork(lambda: 7, keep=[], comm="child").wait(TIMEOUT_S) == 7


def test_a_call_that_raises_is_told_on_stderr_and_exits_with_1(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ValueError("no luck")

    assert fork(fail, keep=[], comm="child").wait(TIMEOUT_S) == 1
    assert "ValueError: no luck" in capfd.readouterr().err


def test_a_child_has_its_name_its_own_session_and_no_descriptor_but_those_it_was_to_keep() -> None:
    reading, writing = os.pipe()
    other, other_end = os.pipe()
    try:

        def look() -> int:
            fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
            leads = os.getsid(0) == os.getpid()
            os.write(writing, repr((Path("/proc/self/comm").read_text(), leads, writing in fds, other in fds)).encode())
            return 0

        assert fork(look, keep=[writing], comm="its-name").wait(TIMEOUT_S) == 0
        assert os.read(reading, 1000) == repr(("its-name\n", True, True, False)).encode()
    finally:
        for fd in (reading, writing, other, other_end):
            os.close(fd)


def test_a_signal_ends_a_child_whatever_its_parent_does_about_it() -> None:
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        child = fork(sleep_long, keep=[], comm="child")
        child.terminate()
        assert child.wait(TIMEOUT_S) == -signal.SIGTERM
        child.terminate()  # has no effect on whoever may have that pid by now
    finally:
        signal.signal(signal.SIGTERM, before)


def test_waiting_for_a_child_has_an_end() -> None:
    child = fork(sleep_long, keep=[], comm="child")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    assert child.poll() is None
    child.kill()
    assert child.wait() == -signal.SIGKILL
