"""``--verify`` on the source: hashes of every page of the frozen container, which the target compares with its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from migrate.outgoing import RUNS_PER_MESSAGE, Outgoing
from runtime.criu.rseq import rseq_areas
from runtime.memory.frozen import FrozenMemory, Window
from runtime.memory.hashes import Hashes
from runtime.memory.ranges import PAGE_BYTES
from runtime.memory.tasks import pid_inside

# Of one data frame; 8 bytes each.
HASHES_PER_MESSAGE = 1 << 17


def send_hashes(out: Outgoing, pids: Iterable[int], images: Path) -> int:
    """Of all processes, after the complete dump, whose ``images`` tell what the kernel writes by itself. How many.

    Memory that several processes share is read once.
    """
    masked = rseq_areas(images)
    windows: set[Window] = set()
    sent = 0
    for pid in pids:
        inside = pid_inside(pid)
        if inside:
            try:
                memory = FrozenMemory(pid, masked=masked.get(inside, ()))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it had ended, and waits for its parent
            memory.leave_out(windows)
            sent += _Sender(out, inside).send(memory)
    return sent


class _Sender:
    """Of one process."""

    def __init__(self, out: Outgoing, inside: int) -> None:
        self._out = out
        self._inside = inside
        self._runs: list[int] = []
        self._hashes: list[Hashes] = []
        self._count = 0

    def send(self, memory: FrozenMemory) -> int:
        mapped = [number for run in memory.mapped for number in (run.address, run.pages)]
        for first in range(0, len(mapped), 2 * RUNS_PER_MESSAGE):
            self._announce([], mapped[first : first + 2 * RUNS_PER_MESSAGE])
        sent = 0
        for address, hashes in memory.hashes(memory.existing()):
            if self._runs and self._runs[-2] + self._runs[-1] * PAGE_BYTES == address:
                self._runs[-1] += len(hashes)
            else:
                self._runs += (address, len(hashes))
            self._hashes.append(hashes)
            self._count += len(hashes)
            sent += len(hashes)
            if self._count >= HASHES_PER_MESSAGE or len(self._runs) >= 2 * RUNS_PER_MESSAGE:
                self._flush()
        self._flush()
        return sent

    def _flush(self) -> None:
        if self._hashes:
            self._announce(self._runs, [])
            self._out.data("control", 0, [hashes.tobytes() for hashes in self._hashes])
            self._runs, self._hashes, self._count = [], [], 0

    def _announce(self, runs: list[int], mapped: list[int]) -> None:
        self._out.control({"type": "hashes", "id": self._inside, "runs": runs, "mapped": mapped})
