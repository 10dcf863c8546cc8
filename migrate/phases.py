"""Phases of a move on one clock. They are marks, not timers: nothing is computed or shown while a phase runs."""

from __future__ import annotations

import time
from collections.abc import Callable


class PhaseClock:
    """``mark(name)`` ends the phase before it and begins ``name``; ``phases()`` gives (name, milliseconds) in order."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._marks: list[tuple[str, float]] = []

    def mark(self, name: str, at: float | None = None, *, ago_s: float = 0.0) -> float:
        """``ago_s``: it began so long ago, but not before the phase before it."""
        moment = max(self._now() - ago_s, self._marks[-1][1] if self._marks else 0.0) if at is None else at
        self._marks.append((name, moment))
        return moment

    @property
    def current(self) -> tuple[str, float] | None:
        """The phase that runs, and when it began; None before the first."""
        return self._marks[-1] if self._marks else None

    def at(self, name: str) -> float:
        """When ``name`` began. Raises KeyError."""
        return dict(self._marks)[name]

    def __contains__(self, name: str) -> bool:
        return any(name == known for known, _moment in self._marks)

    @property
    def frozen_ms(self) -> float | None:
        """Of a move that was rolled back: how long the container was frozen for it."""
        if "freeze" not in self or "thawed" not in self:
            return None
        return (self.at("thawed") - self.at("freeze")) * 1000

    def phases(self, end: float) -> list[tuple[str, float]]:
        """What began before ``end``."""
        marks = [mark for mark in self._marks if mark[1] < end]
        moments = [*[moment for _name, moment in marks], end]
        return [(name, (after - moment) * 1000) for (name, moment), after in zip(marks, moments[1:], strict=True)]
