"""A process whose memory does what a test says (tests/workloads/mapper.py), and a copy kept of it as a store would.

The copy is judged by means of its own: /proc/PID/pagemap and /proc/PID/mem, nothing of runtime/.
"""

import contextlib
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.memory.api import DirtyTracker, ProcessScan, Scan, Segment, SegmentScan
from runtime.memory.ranges import PageRanges

WORKLOAD = Path(__file__).resolve().parents[1] / "workloads" / "mapper.py"
PAGE = 4096
ZEROS = bytes(PAGE)
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ (\d+) *(.*)$", re.MULTILINE)
_SHARED = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) ...s ([0-9a-f]+) (\S+) (\d+) +((?:/dev/zero|/memfd:|/SYSV).*)$", re.MULTILINE
)
_KERNEL_MADE = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")


class Mapper:
    """The running workload. ``pids``: itself, then its forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(WORKLOAD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pids: list[int] = self._answer()["pids"]
        self._wait_until_it_waits(self.pids[0])

    def order(self, op: str, **arguments: Any) -> bool:
        """Whether it could be done."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.pids = answer["pids"]
        for pid in self.pids:
            self._wait_until_it_waits(pid)
        return bool(answer["ok"])

    def _wait_until_it_waits(self, pid: int) -> None:
        """After its answer a process still runs for a moment, and writes to its memory while it does."""
        end = time.monotonic() + 10
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, f"process {pid} does not come to rest"
            time.sleep(0.0005)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the workload died: {self._process.wait(5)}"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        # Its forks end when their sockets close with it.
        assert self._process.wait(10) == 0


@contextlib.contextmanager
def running_mapper() -> Iterator[Mapper]:
    mapper = Mapper()
    try:
        yield mapper
    finally:
        mapper.close()


class Copies:
    """Copies of the pages of processes, kept as a tracker says. ``check`` compares them with the memory itself."""

    def __init__(self, tracker: DirtyTracker) -> None:
        self._tracker = tracker
        self._pages: dict[int, dict[int, bytes]] = {}
        self._segments: dict[Segment, dict[int, bytes]] = {}

    def follow(self, pids: list[int], *, final: bool = False) -> Scan:
        """Scan, and bring the copies up to date as far as the scan tells."""
        scan = self._tracker.scan(pids, final=final)
        for pid in scan.gone:
            self._pages.pop(pid, None)
        for process in scan.processes:
            self._follow_process(process)
        self._segments = {each.segment: self._follow_segment(each) for each in scan.segments}
        return scan

    def glance(self, pids: list[int]) -> None:
        """As ``follow``, as far as a glance tells. Of what can not be read it is only known that it has changed."""
        for pid, ranges in self._tracker.glance(pids).items():
            kept = self._pages.setdefault(pid, {})
            for start, end in ranges.spans():
                for page in range(start, end, PAGE):
                    kept.pop(page, None)
            self._copy_ranges(pid, ranges, kept)

    def _follow_segment(self, scan: SegmentScan) -> dict[int, bytes]:
        kept = self._segments.get(scan.segment, {})
        existing = {page for start, end in scan.existing.spans() for page in range(start, end, PAGE)}
        kept = {page: data for page, data in kept.items() if page in existing}
        with open(scan.path, "rb", buffering=0) as file:
            for start, end in scan.dirty.spans():
                data = os.pread(file.fileno(), end - start, start)
                self._tracker.copied(scan.segment, start, memoryview(data))
                kept |= {start + at: data[at : at + PAGE] for at in range(0, len(data), PAGE)}
        return kept

    def _follow_process(self, process: ProcessScan) -> None:
        kept = self._pages.setdefault(process.pid, {})
        existing = {page for start, end in process.existing.spans() for page in range(start, end, PAGE)}
        for page in kept.keys() - existing:
            del kept[page]
        self._copy_ranges(process.pid, process.to_copy, kept)

    def _copy_ranges(self, pid: int, ranges: PageRanges, kept: dict[int, bytes]) -> None:
        # It may end between the scan and this.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for start, end in ranges.spans():
                    self._copy(memory, pid, start, end, kept)
            finally:
                os.close(memory)

    def _copy(self, memory_fd: int, pid: int, start: int, end: int, kept: dict[int, bytes]) -> None:
        while start < end:
            try:
                data = os.pread(memory_fd, end - start, start)
            except OSError:
                data = b""
            if not data:
                start += PAGE  # unmapped since the scan, or the process has gone: the next scan knows
                continue
            self._tracker.copied(pid, start, memoryview(data))
            for at in range(0, len(data), PAGE):
                kept[start + at] = data[at : at + PAGE]
            start += len(data)

    def check(self, pids: list[int]) -> None:
        for pid in pids:
            wrong = self._differences(pid, self._pages.get(pid, {}))
            assert not wrong, f"process {pid}: " + ", ".join(wrong[:10])

    def check_shared(self, pid: int) -> int:
        """Compare all shared memory that the process maps, as it sees it. How many mappings there were."""
        text = Path(f"/proc/{pid}/maps").read_text()
        found = _SHARED.findall(text)
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for start, end, offset, device, inode, name in found:
                kept = self._segments.get(Segment(device, int(inode), name), {})
                for page in range(int(start, 16), int(end, 16), PAGE):
                    at = page - int(start, 16) + int(offset, 16)
                    assert os.pread(memory.fileno(), PAGE, page) == kept.get(at, ZEROS), f"{name} at {at:#x}"
        return len(found)

    def _differences(self, pid: int, kept: dict[int, bytes]) -> list[str]:
        wrong = []
        mapped: set[int] = set()
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for start, end, of_file in private_mappings(pid):
                present = pages_present(pid, start, end, of_file=of_file)
                mapped |= present
                content = b""
                for page in sorted(present):
                    if not content:
                        content = os.pread(memory.fileno(), _run_length(page, present) * PAGE, page)
                    truth, content = content[:PAGE], content[PAGE:]
                    if kept.get(page, ZEROS) != truth:
                        wrong.append(f"{page:x} {'is stale' if page in kept else 'was never copied'}")
        wrong += [f"{page:x} is kept and gone" for page, data in kept.items() if page not in mapped and data != ZEROS]
        return wrong


def _run_length(first: int, pages: set[int]) -> int:
    """How many pages from ``first`` on follow each other; 64 at most."""
    return next((count for count in range(1, 64) if first + count * PAGE not in pages), 64)


def private_mappings(pid: int) -> list[tuple[int, int, bool]]:
    """Start, end, and whether a file is mapped there."""
    text = Path(f"/proc/{pid}/maps").read_text()
    return [
        (int(start, 16), int(end, 16), inode != "0")
        for start, end, inode, name in _MAPPING.findall(text)
        if name not in _KERNEL_MADE
    ]


def pages_present(pid: int, start: int, end: int, *, of_file: bool) -> set[int]:
    """Pages that are the process's own: present or swapped, not a file's, and not the kernel's note about no page."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        data = os.pread(pagemap.fileno(), (end - start) // PAGE * 8, start // PAGE * 8)
    found = set()
    for index, (entry,) in enumerate(struct.iter_unpack("Q", data)):
        present, swapped, shows_file = entry >> 63 & 1, entry >> 62 & 1, entry >> 61 & 1
        marker = not present and entry & 0x1F == 31
        if (present or (swapped and not marker)) and not (of_file and shows_file):
            found.add(start + index * PAGE)
    return found
