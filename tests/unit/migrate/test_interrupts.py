"""Ctrl-C where Python can not raise it well: each in a process of its own, with a signal of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[3]
BEGIN = """
import asyncio, os, signal, sys, time
from migrate.interrupts import ctrl_c_is_heard

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)

whole = []  # what was not to be broken off
"""
WAIT_FOR_IT = """
with ctrl_c_is_heard() as interrupts:
    try:
        happen()
        time.sleep(30)
    except KeyboardInterrupt:
        print("heard", interrupts.asked, whole, flush=True)
"""
IN_AN_IMPORT = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "json.tool":
            ctrl_c()
            time.sleep(0.3)  # it comes again meanwhile
            whole.append("import")
sys.meta_path.insert(0, Finder())
def happen():
    import json.tool
"""
IN_A_LOOP = """
def happen():
    async def work():
        ctrl_c()
        await asyncio.sleep(0.3)
        whole.append("loop")
    asyncio.new_event_loop().run_until_complete(work())
"""
IN_A_FINALIZER = """
class Last:
    def __del__(self):
        ctrl_c()
        time.sleep(0.001)
def happen():
    Last()
"""
# The whole command; Ctrl-C comes when it imports a module of this name.
COMMAND = """
import os, signal, sys
wanted = sys.argv.pop(1)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from migrate.__main__ import main
sys.exit(main())
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", program, *arguments]
    return subprocess.run(argv, cwd=TOP, timeout=240, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("happen", "whole"), [(IN_AN_IMPORT, "import"), (IN_A_LOOP, "loop")], ids=["import", "loop"])
def test_it_is_heard_when_that_is_over(happen: str, whole: str) -> None:
    done = run(BEGIN + happen + WAIT_FOR_IT)
    assert (done.stdout, done.stderr) == (f"heard True ['{whole}']\n", "")


def test_what_python_threw_away_comes_again_and_nothing_is_said_about_it() -> None:
    done = run(BEGIN + IN_A_FINALIZER + WAIT_FOR_IT)
    assert (done.stdout, done.stderr) == ("heard True []\n", "")


def test_elsewhere_it_is_raised_at_once() -> None:
    done = run(BEGIN + "happen = ctrl_c" + WAIT_FOR_IT)
    assert (done.stdout, done.stderr) == ("heard True []\n", "")


def test_who_was_told_to_ignore_it_does_so() -> None:
    program = BEGIN + "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwith ctrl_c_is_heard(): ctrl_c()\nprint('ignored')"
    assert run(program).stdout == "ignored\n"


def test_an_import_that_takes_for_ever_is_interrupted_all_the_same() -> None:
    done = run(BEGIN + IN_AN_IMPORT.replace("0.3", "300") + WAIT_FOR_IT)
    assert done.stdout == "heard True []\n"


@pytest.mark.parametrize("module", ["click", "migrate.cli"])
def test_a_command_that_has_not_begun_ends_by_the_signal_without_a_word(module: str) -> None:
    done = run(COMMAND, module, "move", "web1", "--to", "host2")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
