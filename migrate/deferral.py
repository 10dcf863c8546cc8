"""Pages that are dirty round after round, and what was kept back for the freeze. Pure: sets of pages, no process."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from runtime.memory.ranges import EMPTY, PageRanges

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Split(Generic[K]):
    """What a scan found, by process: ``hot`` pages were dirty in the scan before as well; ``pending`` holds all."""

    pending: Mapping[K, PageRanges]
    hot: Mapping[K, PageRanges]
    dirty_bytes: int
    hot_bytes: int
    pending_bytes: int

    def to_send(self, *, defer_hot: bool) -> dict[K, PageRanges]:
        if not defer_hot:
            return dict(self.pending)
        return {key: ranges - self.hot.get(key, EMPTY) for key, ranges in self.pending.items()}


class Deferral(Generic[K]):
    """Remembers what the last scan found and what was kept back, so that nothing is forgotten at the freeze."""

    def __init__(self) -> None:
        self._last: Mapping[K, PageRanges] = {}
        self._kept: dict[K, PageRanges] = {}

    def scanned(self, dirty: Mapping[K, PageRanges], existing: Mapping[K, PageRanges] | None = None) -> Split[K]:
        """After a scan. What is not in ``existing`` is no longer there, and a process not in it is gone."""
        pending = {key: dirty.get(key, EMPTY) | self._kept.get(key, EMPTY) for key in {**self._kept, **dirty}}
        if existing is not None:
            pending = {key: ranges & existing[key] for key, ranges in pending.items() if key in existing}
        hot = {key: ranges & self._last.get(key, EMPTY) for key, ranges in dirty.items() if key in pending}
        self._last, self._kept = dict(dirty), dict(pending)
        return Split(
            pending=pending,
            hot=hot,
            dirty_bytes=sum(ranges.bytes for ranges in dirty.values()),
            hot_bytes=sum(ranges.bytes for ranges in hot.values()),
            pending_bytes=sum(ranges.bytes for ranges in pending.values()),
        )

    def sent(self, sent: Mapping[K, PageRanges]) -> None:
        """These were sent after the last scan; the rest of what was pending is kept back."""
        self._kept = {key: ranges - sent.get(key, EMPTY) for key, ranges in self._kept.items()}
