"""``--verify`` on the target: what the source says its pages hash to, compared with what was restored.

Nothing is made or filled for it: pages that are not memory yet are read from the store in which they wait, and pages
that are still on the source are compared when they arrive.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from migrate.errors import MemoryDiffers, ProtocolViolation
from migrate.memory_target import MAX_SPACES, Receive, StorePages
from migrate.messages import Complete
from runtime.criu.rseq import rseq_areas
from runtime.memory.frozen import ZERO_PAGE_HASH, FrozenMemory
from runtime.memory.hashes import Hashes, PageHashes, hash_pages
from runtime.memory.pager import PagerReport
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges
from runtime.memory.store import MAX_ADDRESS

HASH_BYTES = 8
_UNKNOWN = np.uint64(0)
Span = tuple[int, int]


def complete_message(move_id: str, filled: PagerReport | None, expected: ExpectedMemory | None) -> Complete:
    """What is told when all memory is in place; ``filled`` where a pager put it there."""
    if filled is None:
        return Complete(move_id=move_id, fill_ms=0.0)
    return Complete(
        move_id=move_id,
        fill_ms=filled.complete_ms,
        filled_bytes=filled.filled_bytes,
        faults=filled.faults,
        remote_faults=filled.remote_faults,
        longest_wait_ms=filled.longest_wait_ms,
        verified_pages=expected.later.pages if expected is not None else 0,
        differing_pages=expected.later.differing if expected is not None else 0,
    )


@dataclass(kw_only=True)
class _Space:
    known: PageHashes = field(default_factory=PageHashes)
    named: list[Span] = field(default_factory=list)
    mapped: list[Span] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """``later`` are pages that were still on the source, ``ms`` is what comparing took."""

    pages: int
    later: int
    ms: float


class Tally:
    """Pages that were compared, and those that differ."""

    def __init__(self) -> None:
        self.pages = 0
        self.differing = 0
        self._first = ""

    def note(self, inside: int, address: int, found: Hashes, expected: Hashes) -> None:
        self.pages += len(found)
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            self.differ(inside, address + int(wrong[0]) * PAGE_BYTES, len(wrong))

    def differ(self, inside: int, address: int, pages: int) -> None:
        self._first = self._first or f"the first at {address:#x} of process {inside} (its pid inside)"
        self.differing += pages

    def complain(self) -> None:
        """Raises MemoryDiffers where there is something to complain about."""
        if self.differing:
            raise MemoryDiffers(
                f"{self.differing} of {self.pages} pages are not on the target what they were on the source, "
                f"{self._first}"
            )


class ExpectedMemory:
    """What the source's pages hash to, by pid inside the container."""

    def __init__(self) -> None:
        self._spaces: dict[int, _Space] = {}
        self._masked: Mapping[int, Sequence[Span]] = {}
        self.before = Tally()
        """Of the restored memory."""
        self.later = Tally()
        """Of what arrived afterwards, or meanwhile: another thread's."""

    def expect(
        self, pid: int, runs: Sequence[tuple[int, int]], mapped: Sequence[tuple[int, int]], receive: Receive
    ) -> None:
        """(address, pages) whose hashes come, and that are compared: what of these has no hash must hold nothing."""
        if len(self._spaces) >= MAX_SPACES:
            raise ProtocolViolation("hashes of too many address spaces")
        if any(
            address % PAGE_BYTES or address + pages * PAGE_BYTES > MAX_ADDRESS for address, pages in (*runs, *mapped)
        ):
            raise ProtocolViolation("hashes do not fit")
        space = self._spaces.setdefault(pid, _Space())
        space.mapped += _spans(mapped)
        count = sum(pages for _address, pages in runs)
        if not count:
            return
        space.named += _spans(runs)
        buffer = bytearray(count * HASH_BYTES)
        receive(memoryview(buffer))
        hashes = np.frombuffer(buffer, dtype=np.uint64)
        position = 0
        for address, pages in runs:
            space.known.put(address, hashes[position : position + pages])
            position += pages

    def begin(self, images: Path) -> None:
        """All hashes have come; ``images`` tell what the kernel writes to by itself. Before anything is compared."""
        self._masked = rseq_areas(images)

    def compare(self, pids: Mapping[int, int], stored: StorePages | None) -> Compared:
        """With the restored processes: ``pids`` here by those inside. Raises MemoryDiffers.

        ``stored`` has what is not memory yet; what it misses is compared when it arrives.
        """
        begin = time.monotonic()
        later = 0
        for inside, space in self._spaces.items():
            if inside not in pids:
                raise MemoryDiffers(f"process {inside} of the container was not restored")
            store = stored.kept.get(inside) if stored is not None else None
            missing = stored.missing.get(inside, EMPTY) if stored is not None else EMPTY
            memory = FrozenMemory(pids[inside], store=store, masked=self._masked.get(inside, ()))
            self._compare_space(inside, space, memory, missing)
            later += missing.pages
        if stored is not None:
            stored.close_kept()
        for tally in (self.before, self.later):
            tally.complain()
        return Compared(pages=self.before.pages, later=later, ms=(time.monotonic() - begin) * 1000)

    def arrived(self, inside: int, runs: Sequence[tuple[int, int]], content: memoryview) -> None:
        """Compare pages that were missing before: (address, pages), and their bytes. What differs is counted."""
        position = 0
        for address, pages in runs:
            size = pages * PAGE_BYTES
            view = memoryview(bytearray(content[position : position + size]))
            for first, last in self._masked.get(inside, ()):
                low, high = max(first - address, 0), min(last - address, size)
                if low < high:
                    view[low:high] = bytes(high - low)
            self._compare_arrived(inside, address, hash_pages(view))
            position += size

    def arrived_zeros(self, inside: int, runs: Sequence[tuple[int, int]]) -> None:
        """The same of pages that are all zeros."""
        for address, pages in runs:
            self._compare_arrived(inside, address, np.full(pages, ZERO_PAGE_HASH, dtype=np.uint64))

    def _compare_arrived(self, inside: int, address: int, found: Hashes) -> None:
        space = self._spaces.get(inside)
        expected = space.known.get(address, len(found)) if space is not None else np.zeros_like(found)
        # Only anonymous memory stays behind, and of that what has no hash was zeros.
        self.later.note(inside, address, found, np.where(expected == _UNKNOWN, np.uint64(ZERO_PAGE_HASH), expected))

    def _compare_space(self, inside: int, space: _Space, memory: FrozenMemory, missing: PageRanges) -> None:
        existing = memory.existing() & PageRanges.from_spans(space.mapped)
        named = PageRanges.from_spans(space.named) - missing
        unread = named
        for address, found in memory.hashes(named):
            self.before.note(inside, address, found, space.known.get(address, len(found)))
            unread = unread - PageRanges.from_spans([(address, address + len(found) * PAGE_BYTES)])
        for start, end in unread.spans():
            self.before.differ(inside, start, (end - start) // PAGE_BYTES)
        # What exists here and not there may only be what would be read there anyway.
        extra = existing - named - missing
        known = PageHashes()
        for address, found in memory.hashes(extra):
            known.put(address, found)
        for address, expected in memory.hashes_of_file(extra):
            self.before.note(inside, address, known.get(address, len(expected)), expected)


def _spans(runs: Sequence[tuple[int, int]]) -> list[Span]:
    return [(address, address + pages * PAGE_BYTES) for address, pages in runs]
