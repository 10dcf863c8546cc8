"""Whoever tracks a process may be killed at any moment: the process goes on as if nothing had been."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.memory.place import NotInjected
from runtime.memory.tracer_process import TracerProcess
from tests.support.tasks import wait_for

TOP = Path(__file__).resolve().parents[2]
# Half of its time it has a thread of the other process in hand.
MOVER = """
import os, sys
from runtime.memory.tracer_process import TracerProcess
tracer = TracerProcess()
print(flush=True)
while True:
    os.close(tracer.make_userfaultfd(int(sys.argv[1])).descriptor)
"""
# Calculates, sleeps, and ends when anything is not as it must be.
VICTIM = """
import time
print(flush=True)
while True:
    begin = time.monotonic()
    assert sum(range(2000)) == 1999000
    time.sleep(0.0005)
    assert time.monotonic() - begin < 60
"""


def python(code: str, *argv: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, text=True, cwd=TOP)
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"
    return process


def traced_by(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("TracerPid")]
    return int(line.split()[1])


def test_the_process_outlives_movers_that_are_killed_while_it_is_in_hand() -> None:
    with python(VICTIM) as victim:
        try:
            for _attempt in range(12):
                with python(MOVER, str(victim.pid)) as mover:
                    time.sleep(random.uniform(0.02, 0.1))
                    mover.send_signal(signal.SIGKILL)
                wait_for(lambda: not traced_by(victim.pid), "the tracer to let go")
                assert victim.poll() is None
        finally:
            victim.kill()


def test_a_tracer_that_died_is_told_of_and_replaced() -> None:
    with python(VICTIM) as victim:
        tracer = TracerProcess()
        try:
            process = tracer._process
            assert process is not None
            process.kill()
            process.wait(20)
            with pytest.raises(NotInjected, match="tracer"):
                tracer.close_descriptor(victim.pid, 99)
            tracer.close_descriptor(victim.pid, 99)
            assert victim.poll() is None
        finally:
            tracer.close()
            victim.kill()
