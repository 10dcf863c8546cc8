"""Mappings that were read before a freeze: served to CRIU while they hold, and not a moment longer."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.criu.filter.build import build_filter
from runtime.criu.filter.mappings import MappingsBefore
from runtime.criu.filter.table import PageFilter
from runtime.linux.call_watch import CallWatch
from runtime.memory.ranges import EMPTY
from tests.integration.test_page_filter import Discarded, FilteredDump
from tests.support.tasks import running_tasks

# Does what it is told, line by line, and says so. What it needs exists before: an answer takes no memory.
PROGRAM = """
import ctypes, mmap, os, sys, threading
area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[:] = bytes(range(256)) * 4096
libc = ctypes.CDLL(None)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
word, go = threading.Event(), threading.Event()
def later():
    go.wait()
    area.madvise(mmap.MADV_DONTDUMP)
    word.set()
threading.Thread(target=later, daemon=True).start()
def forked():
    if not (pid := os.fork()):
        libc.mlock(address, 4096)
        os._exit(0)
    os.waitpid(pid, 0)
does = {
    b"r": lambda: (os.stat("/"), os.getpid()),
    b"a": lambda: area.madvise(mmap.MADV_DONTFORK),
    b"l": lambda: libc.mlock(address, 4096),
    b"m": lambda: mmap.mmap(-1, 1 << 20),
    b"p": lambda: libc.prctl(15, b"renamed", 0, 0, 0),
    b"t": lambda: (go.set(), word.wait()),
    b"f": forked,
}
os.write(1, b".")
while order := os.read(0, 1):
    does[order]()
    os.write(1, b".")
"""


class Obedient:
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.pid = process.pid

    def do(self, order: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(order.encode())
        self.wait()

    def wait(self) -> None:
        assert self._process.stdout
        assert self._process.stdout.read(1) == b"."

    def threads(self) -> set[int]:
        return {int(path.name) for path in Path(f"/proc/{self.pid}/task").iterdir()}


@pytest.fixture
def program() -> Iterator[Obedient]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd="/"
    )
    with process:
        obedient = Obedient(process)
        try:
            obedient.wait()
            for _ in range(20):
                obedient.do("r")
            yield obedient
        finally:
            process.kill()


@pytest.mark.parametrize("order", ["a", "l", "m", "p", "t", "f"])
def test_calls_that_can_change_mappings_are_counted_whoever_makes_them(program: Obedient, order: str) -> None:
    with CallWatch(program.threads) as watch:
        program.do("r")
        assert watch.calls() == 0
        program.do(order)
        assert watch.calls() > 0


def test_what_was_read_says_what_smaps_says_of_mappings(program: Obedient) -> None:
    program.do("a")
    with contextlib.closing(MappingsBefore()) as before:
        before.note(lambda: [program.pid])
        text = before.unchanged([program.pid])[program.pid].decode()
    flags = re.compile(r"^(?:[0-9a-f]+-|VmFlags:).*$", re.MULTILINE)
    assert text.splitlines() == flags.findall(Path(f"/proc/{program.pid}/smaps").read_text())
    assert re.search(r"^VmFlags:.* dc ", text, re.MULTILINE)


def test_flags_that_changed_and_left_every_line_of_maps_as_it_was_are_noticed(program: Obedient) -> None:
    maps = Path(f"/proc/{program.pid}/maps")
    with contextlib.closing(MappingsBefore()) as before:
        before.note(lambda: [program.pid])
        lines = maps.read_text()
        program.do("a")
        assert maps.read_text() == lines
        assert before.unchanged([program.pid]) == {}
        before.note(lambda: [program.pid])
        assert list(before.unchanged([program.pid])) == [program.pid]


def test_criu_dumps_the_same_mappings_without_reading_them(tmp_path: Path) -> None:
    library = build_filter(tmp_path / "filter")
    found = {}
    with running_tasks(tmp_path, 4) as tasks:
        for name in ("read", "noted"):
            images = tmp_path / name
            images.mkdir()
            with PageFilter(library) as page_filter:
                if name == "noted":
                    page_filter.note_mappings(lambda: tasks.pids)
                dump = FilteredDump(images, page_filter, dict.fromkeys(tasks.pids, EMPTY))
                dump.run(tasks.pids[0], Discarded(), leave_running=True)
                assert page_filter.counters().mappings == (len(tasks.pids) if name == "noted" else 0)
            found[name] = {path.name: path.read_bytes() for path in sorted(images.glob("mm-*.img"))}
    assert found["read"] == found["noted"]
    assert len(found["read"]) == len(tasks.pids)
