"""Our side of the page filter: what is handed to CRIU when it starts, and the table of pages it need not look at."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy

from runtime.criu.filter.mappings import MappingsBefore
from runtime.memory.ranges import PageRanges

VARIABLE = "CMIGRATE_PAGE_FILTER"
# struct table of page_filter.c: magic, capacity, published, tasks, ranges_at, options, segments; loaded, calls,
# filtered, scans, removed_bytes, skipped_dumps, hidden_segments, mappings.
_HEADER = struct.Struct("=15Q")
_TASK = struct.Struct("=5Q")
_SEGMENT = struct.Struct("=4Q")
_MAGIC = 0x324B434142474743
_PUBLISHED_AT = 16
_COUNTERS_AT = 56
_WITHOUT_CONNTRACK = 1
# A stretch of fresh pages shorter than this is let through: to send 32 pages and throw them away takes 20 us, and so
# does each further piece into which what must be sent is cut.
SHORTEST_BYTES = 32 * 4096
# Room for 16 million ranges. It is a sparse file: only what is written takes memory.
CAPACITY_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class FilterCounters:
    """What the filter did: ``calls`` of PAGEMAP_SCAN by CRIU, of which it answered ``filtered`` itself with ``scans``
    real ones; ``removed_bytes`` of address space were answered as known, populated or not. ``skipped_dumps`` are those
    of connection tracking, ``hidden_segments`` questions for the data of shared memory that was denied; ``mappings``
    counts the tasks whose smaps was not read."""

    loaded: bool
    calls: int
    filtered: int
    scans: int
    removed_bytes: int
    skipped_dumps: int = 0
    hidden_segments: int = 0
    mappings: int = 0


class HiddenSegment(NamedTuple):
    """Shared memory that CRIU is to take for a hole: what stat(2) says of it, and whether it is of System V."""

    inode: int
    device: int
    system_v: bool


class PageFilter:
    """For one dump. Start CRIU with ``environment`` and ``pass_fds``, ``publish`` before it looks at memory.

    The object itself is handed over as a memory file too, so that neither odd characters in a path nor a file system
    mounted noexec (as /run often is) are in its way. The programs that CRIU starts do not get it.

    ``without_conntrack``: CRIU finds no connection tracking in the container's network namespace, and its images hold
    none. For a restore into a namespace whose rules are not restored either.
    """

    def __init__(self, library: Path, *, without_conntrack: bool = False) -> None:
        self._fds: list[int] = []
        self._table: mmap.mmap | None = None
        self._before = MappingsBefore()
        try:
            self._fds.append(os.memfd_create("cmigrate-filter-table"))
            self._fds.append(os.memfd_create("cmigrate-filter"))
            table, code = self._fds
            os.ftruncate(table, CAPACITY_BYTES)
            os.write(code, library.read_bytes())
            self._table = mmap.mmap(table, CAPACITY_BYTES)
            self._table[: _HEADER.size] = _HEADER.pack(
                *(_MAGIC, CAPACITY_BYTES, 0, 0, 0, _WITHOUT_CONNTRACK if without_conntrack else 0), *(0,) * 9
            )
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        table, code = self._fds
        return {"LD_PRELOAD": f"/proc/self/fd/{code}", VARIABLE: f"{table}:{CAPACITY_BYTES}:{code}"}

    @property
    def pass_fds(self) -> tuple[int, ...]:
        return tuple(self._fds)

    def note_mappings(self, pids: Callable[[], Collection[int]]) -> None:
        """Shortly before the freeze: what ``publish`` then need not leave to CRIU, see mappings.py."""
        self._before.note(pids)

    def publish(
        self,
        known: Mapping[int, PageRanges],
        *,
        segments: Sequence[HiddenSegment] = (),
        shortest_bytes: int = SHORTEST_BYTES,
    ) -> None:
        """Once, after the freeze and before ``query-ext-files`` is acknowledged.

        ``known``: by this host's pid, address ranges that CRIU is to take for empty: whatever exists in them the target
        has, in its last version. They may cover what is not populated; only private memory is meant, and they are
        wrong for a page that was written since it was sent. A task that has no room is left out, and dumped in full.
        Ranges below ``shortest_bytes`` are left out as well: the page server must still throw away what it has.
        ``segments`` are hidden as a whole.
        """
        view = self._view()
        texts = self._before.unchanged(known)
        end = CAPACITY_BYTES - sum(map(len, texts.values()))
        ranges_at = (_HEADER.size + len(known) * _TASK.size + len(segments) * _SEGMENT.size + 15) // 16 * 16
        tasks: list[bytes] = []
        first, text_at = 0, end
        for pid, ranges in known.items():
            bounds = numpy.asarray(ranges.bounds, dtype=numpy.uint64)
            bounds = numpy.ascontiguousarray(bounds[bounds[:, 1] - bounds[:, 0] >= shortest_bytes])
            at = ranges_at + first * 16
            if at + bounds.nbytes > end:
                bounds = bounds[:0]
            view[at : at + bounds.nbytes] = bounds.tobytes()
            text = texts.get(pid, b"")
            view[text_at : text_at + len(text)] = text
            tasks.append(_TASK.pack(pid, first, len(bounds), text_at, len(text)))
            first += len(bounds)
            text_at += len(text)
        hidden = [
            _SEGMENT.pack(inode, os.major(device), os.minor(device), system_v) for inode, device, system_v in segments
        ]
        listed = b"".join((*tasks, *hidden))
        view[_HEADER.size : _HEADER.size + len(listed)] = listed
        view[24:40] = struct.pack("=2Q", len(tasks), ranges_at)
        view[48:56] = struct.pack("=Q", len(hidden))
        view[_PUBLISHED_AT : _PUBLISHED_AT + 8] = struct.pack("=Q", 1)

    @property
    def loaded(self) -> bool:
        """Whether CRIU runs with the filter; known as soon as it has sent anything."""
        return self.counters().loaded

    def counters(self) -> FilterCounters:
        loaded, calls, filtered, scans, removed, skipped, hidden, mappings = struct.unpack_from(
            "=8Q", self._view(), _COUNTERS_AT
        )
        return FilterCounters(
            loaded=bool(loaded),
            calls=calls,
            filtered=filtered,
            scans=scans,
            removed_bytes=removed,
            skipped_dumps=skipped,
            hidden_segments=hidden,
            mappings=mappings,
        )

    def _view(self) -> mmap.mmap:
        if self._table is None:
            raise ValueError("the page filter is closed")
        return self._table

    def close(self) -> None:
        """Idempotent. CRIU's own mapping lives on until CRIU ends."""
        self._before.close()
        if self._table is not None:
            self._table.close()
            self._table = None
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
