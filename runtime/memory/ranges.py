"""Sets of memory pages as sorted ranges. Values; numpy does the work, because a round can have 100 000 ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096

Bounds = NDArray[np.uint64]
"""Shape (n, 2): first byte and first byte after, multiples of PAGE_BYTES."""


class PageRange(NamedTuple):
    address: int
    pages: int


class PageRanges:
    """A set of pages: ranges sorted by address that neither overlap nor touch. Never changes.

    ``bounds`` has a row (start, end) in bytes for each range, as uint64.
    """

    __slots__ = ("bounds",)

    def __init__(self, bounds: Bounds) -> None:
        """``bounds`` must be sorted, disjoint and not adjacent; ``PageRanges.of`` takes anything."""
        bounds.flags.writeable = False
        self.bounds = bounds

    @classmethod
    def of(cls, bounds: Bounds) -> PageRanges:
        """From (start, end) in bytes in any order; overlapping and adjacent ones are joined, empty ones dropped."""
        kept = bounds[bounds[:, 1] > bounds[:, 0]]
        if len(kept) == 0:
            return EMPTY
        if (kept[1:, 0] < kept[:-1, 1]).any():
            return cls(_sweep([kept], lambda depth: depth >= 1))
        # In order already, as the kernel reports them: only join what touches.
        apart = kept[1:, 0] > kept[:-1, 1]
        first, last = np.concatenate(([True], apart)), np.concatenate((apart, [True]))
        return cls(np.column_stack([kept[first, 0], kept[last, 1]]))

    @classmethod
    def from_spans(cls, spans: Iterable[tuple[int, int]]) -> PageRanges:
        """From pairs (start, end) in bytes."""
        listed = list(spans)
        return cls.of(np.array(listed, dtype=np.uint64).reshape(-1, 2))

    @property
    def pages(self) -> int:
        return self.bytes // PAGE_BYTES

    @property
    def bytes(self) -> int:
        return int((self.bounds[:, 1] - self.bounds[:, 0]).sum())

    def spans(self) -> list[tuple[int, int]]:
        """(start, end) in bytes."""
        return [(int(start), int(end)) for start, end in self.bounds.tolist()]

    def __iter__(self) -> Iterator[PageRange]:
        for start, end in self.bounds.tolist():
            yield PageRange(start, (end - start) // PAGE_BYTES)

    def __len__(self) -> int:
        """How many ranges; not how many pages."""
        return len(self.bounds)

    def __bool__(self) -> bool:
        return len(self.bounds) > 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageRanges) and np.array_equal(self.bounds, other.bounds)

    def __hash__(self) -> int:
        return hash(self.bounds.tobytes())

    def __repr__(self) -> str:
        shown = ", ".join(f"{start:x}-{end:x}" for start, end in self.bounds[:8].tolist())
        return f"PageRanges({shown}{', ...' if len(self) > 8 else ''})"

    def __contains__(self, address: int) -> bool:
        index = int(np.searchsorted(self.bounds[:, 0], np.uint64(address), side="right")) - 1
        return index >= 0 and address < int(self.bounds[index, 1])

    def __or__(self, other: PageRanges) -> PageRanges:
        if not self or not other:
            return self or other
        return PageRanges(_sweep([self.bounds, other.bounds], lambda depth: depth >= 1))

    def __and__(self, other: PageRanges) -> PageRanges:
        if not self or not other:
            return EMPTY
        return _ranges(_sweep([self.bounds, other.bounds], lambda depth: depth >= 2))

    def __sub__(self, other: PageRanges) -> PageRanges:
        if not self or not other:
            return self
        # Weight 1 inside self, -2 inside other: 1 is left only where self alone is.
        return _ranges(_sweep([self.bounds, other.bounds], lambda depth: depth == 1, weights=(1, -2)))


def _ranges(bounds: Bounds) -> PageRanges:
    return PageRanges(bounds) if len(bounds) else EMPTY


def _sweep(parts: list[Bounds], inside: Any, weights: tuple[int, ...] = (1, 1)) -> Bounds:
    """Walk along all ends of all parts, sum up weights, and keep the stretches whose sum ``inside`` accepts."""
    positions = np.concatenate([side for part in parts for side in (part[:, 0], part[:, 1])])
    steps = np.concatenate(
        [
            np.full(len(part), sign * weight, dtype=np.int64)
            for part, weight in zip(parts, weights, strict=False)
            for sign in (1, -1)
        ]
    )
    order = np.argsort(positions, kind="stable")
    points, first = np.unique(positions[order], return_index=True)
    depth = np.cumsum(np.add.reduceat(steps[order], first))
    kept = inside(depth)
    # A stretch begins where ``kept`` turns true and ends where it turns false; after the last point nothing is kept.
    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept)).astype(np.int8)))
    return np.ascontiguousarray(points[edges].reshape(-1, 2))


EMPTY = PageRanges(np.empty((0, 2), dtype=np.uint64))
