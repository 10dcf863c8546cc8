import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migrate.errors import MemoryDiffers, ProtocolViolation
from migrate.verify_target import ExpectedMemory
from runtime.memory.frozen import FrozenMemory
from runtime.memory.hashes import Hashes
from runtime.memory.ranges import PAGE_BYTES, PageRanges
from runtime.memory.store import Store

PROGRAM = """
import ctypes, mmap, sys
area = mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, 64, 2):
    area[page * 4096] = page + 1
print(hex(ctypes.addressof(ctypes.c_char.from_buffer(area))), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def idle() -> Iterator[tuple[int, int]]:
    """The pid of a process that does nothing, and the address of an area of which it has touched every second page."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        area = int(process.stdout.readline(), 16)
        # It would go on to where it waits, and write to its memory on the way.
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        yield process.pid, area
        process.send_signal(signal.SIGCONT)
        process.stdin.close()


def expected_of(pid: int, *, change: int = 0, leave_out: int = 0) -> ExpectedMemory:
    """What the process holds now; another hash than it has for the page at ``change``, none for ``leave_out``."""
    memory = FrozenMemory(pid)
    expected = ExpectedMemory()
    expected.expect(7, [], [(run.address, run.pages) for run in memory.mapped], lambda view: None)
    for address, hashes in memory.hashes(memory.existing()):
        for number, value in enumerate(hashes):
            page = address + number * PAGE_BYTES
            if page != leave_out:
                sent = np.array([value ^ np.uint64(page == change)], dtype=np.uint64)
                expected.expect(7, [(page, 1)], [], lambda view, sent=sent: fill(view, sent))  # type: ignore[misc]
    return expected


def fill(view: memoryview, hashes: Hashes) -> None:
    view[:] = hashes.tobytes()


def test_a_process_compares_equal_to_itself(idle: tuple[int, int]) -> None:
    pid, _area = idle
    found = expected_of(pid).compare({7: pid}, None)
    assert found.pages > 100
    assert found.later == 0


def test_one_page_that_differs_is_named(idle: tuple[int, int]) -> None:
    pid, area = idle
    page = area + 10 * PAGE_BYTES
    with pytest.raises(MemoryDiffers, match=f"^1 of .* first at {page:#x} of process 7 "):
        expected_of(pid, change=page).compare({7: pid}, None)


def test_a_page_that_should_hold_nothing_is_named(idle: tuple[int, int]) -> None:
    pid, area = idle
    with pytest.raises(MemoryDiffers, match=f"^1 of .* first at {area:#x} of process 7 "):
        expected_of(pid, leave_out=area).compare({7: pid}, None)


def test_a_process_that_is_not_there_is_named(idle: tuple[int, int]) -> None:
    pid, _area = idle
    with pytest.raises(MemoryDiffers, match="process 7 of the container was not restored"):
        expected_of(pid).compare({8: pid}, None)


def test_what_is_not_in_memory_is_read_from_the_store(idle: tuple[int, int]) -> None:
    pid, area = idle
    untouched = PageRanges.from_spans([(area + PAGE_BYTES, area + 2 * PAGE_BYTES)])
    with Store("t") as store:
        store.write(area + PAGE_BYTES, b"x" * PAGE_BYTES)
        there, nowhere = FrozenMemory(pid, store=store), FrozenMemory(pid)
        for memory in (there, nowhere):
            memory.existing()
        assert next(there.hashes(untouched))[1] != next(nowhere.hashes(untouched))[1]


def test_bytes_that_the_kernel_writes_do_not_count(idle: tuple[int, int]) -> None:
    pid, area = idle
    page = PageRanges.from_spans([(area, area + PAGE_BYTES)])
    masked, empty = FrozenMemory(pid, masked=[(area, area + 8)]), FrozenMemory(pid)
    for memory in (masked, empty):
        memory.existing()
    zeros = next(empty.hashes_of_file(page))[1]
    assert next(masked.hashes(page))[1] == zeros
    assert next(empty.hashes(page))[1] != zeros


def test_what_arrives_later_is_counted(tmp_path: Path) -> None:
    expected = ExpectedMemory()
    page = bytes(range(256)) * 16
    other = ExpectedMemory()
    for each in (expected, other):
        each.expect(7, [], [(0x1000, 3)], lambda view: None)
    expected.arrived_zeros(7, [(0x1000, 2)])
    assert (expected.later.pages, expected.later.differing) == (2, 0)
    other.arrived(7, [(0x1000, 1), (0x2000, 1)], memoryview(bytes(PAGE_BYTES) + page))
    assert (other.later.pages, other.later.differing) == (2, 1)


def test_addresses_of_no_memory_are_refused() -> None:
    for run in ((1, 1), (1 << 56, 1)):
        with pytest.raises(ProtocolViolation):
            ExpectedMemory().expect(7, [run], [], lambda view: None)
