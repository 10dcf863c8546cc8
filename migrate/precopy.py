"""When to go on copying, when to freeze, when to slow the container down, when to give up. Pure: time is in its input.

The blackout if frozen now is F + D / B + R (costs.py). After each round ``Precopy.decide`` compares that with what one
more round is predicted to give, in both ways a round can be run: everything again, or without hot pages, which are
dirty round after round and are kept for the freeze.

* Above the limit a round pays when it takes at least 5 % off the blackout, whatever it costs.
* Below the limit it must be worth its time too: four seconds of copying for each second of blackout at most.
* No round pays, and the blackout is above the limit: slow the container to a computed share of a processor; if that
  is not allowed, has no effect, or is at its floor, ``on_timeout`` applies, as it does when rounds, time or bytes end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

from migrate.costs import (
    LEAST_GAIN,
    MIB,
    WORTH,
    DirtyCurve,
    DirtySample,
    FixedCosts,
    blended_rate,
    fit_curve,
    round_pays,
)

OnTimeout = Literal["abort", "stopcopy", "postcopy"]

# With the rest fetched after the switch, a round is worth it only while it at least halves what is left.
HYBRID_GAIN = 0.5
# Throttle so that dirtying runs at this share of the link's rate: each round then leaves 0.6 of the one before.
THETA = 0.6
# More of the memory than this dirty in one round says nothing about how fast it is written: it can not get dirtier.
SATURATED = 0.8
# A throttled writer whose rate fell by less than this share of what was taken from it waits for something else.
THROTTLE_EFFECT = 0.25
KNOWN_SAMPLES = 3
_FORECAST_ROUNDS = 50


class Kind(StrEnum):
    CONTINUE = "continue"
    FREEZE = "freeze"
    THROTTLE = "throttle"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the operator allows. ``min_cpu`` is the least share of its processor time the container keeps.

    ``hybrid``: what is left is fetched after the switch, so it does not count for the blackout.
    """

    downtime_limit_ms: float = 300.0
    max_rounds: int = 30
    max_time_s: float = math.inf
    max_bytes: float = math.inf
    on_timeout: OnTimeout = "stopcopy"
    throttle: bool = True
    min_cpu: float = 0.1
    hybrid: bool = False

    def __post_init__(self) -> None:
        if self.downtime_limit_ms <= 0 or self.max_rounds < 1 or self.max_time_s <= 0 or self.max_bytes <= 0:
            raise ValueError(f"a budget must be above zero: {self}")
        if not 0 < self.min_cpu <= 1:
            raise ValueError(f"min_cpu is a share above 0 and up to 1, not {self.min_cpu}")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round that is over: it began with a scan, and ended with the scan that found what is here.

    ``seconds`` lie between the two scans, ``sending_s`` of which the data flowed (0: all of them). ``page_bytes`` are
    memory, ``wire_bytes`` what they became on the link. ``dirty_bytes`` were found by the last scan; ``hot_bytes`` of
    them by the one before as well; ``pending_bytes`` (0: as dirty) is all that the target still lacks, with what was
    kept back. ``cpu_s`` is the processor time the container used; None where nobody counts.
    """

    seconds: float
    page_bytes: int
    wire_bytes: int
    dirty_bytes: int
    hot_bytes: int = 0
    pending_bytes: int = 0
    sending_s: float = 0.0
    cpu_s: float | None = None

    @property
    def left_bytes(self) -> int:
        return max(self.pending_bytes, self.dirty_bytes)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do next.

    CONTINUE   run another round, without hot pages if ``defer_hot``
    THROTTLE   limit the container to ``cpus`` processors, then run another round as for CONTINUE
    FREEZE     the limit is met, or no round makes it better
    STOP       the limit can not be met: ``action`` (stopcopy: freeze nevertheless)

    ``blackout_ms`` is predicted for a freeze now; ``next_blackout_ms`` for one after the next round, which takes
    ``next_round_s``; ``remaining_s`` is until the container runs on the target. A throttle is lifted by whoever set it
    as soon as the decision is FREEZE or STOP, or everything has ended.
    """

    kind: Kind
    blackout_ms: float
    next_blackout_ms: float
    next_round_s: float
    remaining_s: float
    action: OnTimeout | None = None
    cpus: float | None = None
    defer_hot: bool = False
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Option:
    defer_hot: bool
    send_bytes: float
    seconds: float
    left_bytes: float
    blackout_ms: float


@dataclass(kw_only=True)
class _Throttle:
    cpus: float
    unthrottled_cpus: float
    steps: int = 1
    before: DirtyCurve = field(default_factory=DirtyCurve)
    asked: float = 1.0
    judged: bool = False


class Precopy:
    """The decisions of one move's rounds. ``decide`` after each; the first is that of round 0, which sent everything.

    ``rate_Bps`` is in memory bytes a second, as far as it is known before the first round. ``switchover_rate_Bps`` is
    for a link that is faster in the blackout than in rounds (``--bandwidth`` paces only these). ``samples`` are of the
    dirty curve, taken before anything was sent.
    """

    def __init__(
        self,
        budget: Budget,
        costs: FixedCosts,
        *,
        rate_Bps: float | None = None,
        switchover_rate_Bps: float | None = None,
        samples: Sequence[DirtySample] = (),
    ) -> None:
        self.budget = budget
        self.costs = costs
        self.rounds = 0
        self.elapsed_s = 0.0
        self.sent_bytes = 0
        self._page_bytes = 0
        self._memory_bytes = 0
        self._rate_Bps = rate_Bps
        self._looking_s = 0.0
        self._switchover_rate_Bps = switchover_rate_Bps
        self._samples = list(samples)
        self._prior: DirtyCurve | None = None
        self._throttle: _Throttle | None = None

    @property
    def rate_Bps(self) -> float:
        """Memory bytes a second, compression included. A rate nobody measured yet counts as that of 1 Gbit/s."""
        return self._rate_Bps or 1e9 / 8

    @property
    def blackout_rate_Bps(self) -> float:
        return self._switchover_rate_Bps or self.rate_Bps

    @property
    def curve(self) -> DirtyCurve:
        return fit_curve(self._samples, self._prior or DirtyCurve())

    @property
    def _wire_share(self) -> float:
        return self.sent_bytes / self._page_bytes if self._page_bytes else 1.0

    def decide(self, done: Round) -> Decision:
        """What to do after this round. Counts it."""
        self._learn(done)
        curve = self.curve
        # What is written between the scan and the freeze was mostly written before the scan as well.
        until_freeze = done.seconds + self.costs.scan_to_freeze_s
        late_bytes = curve.dirty_bytes(until_freeze) - curve.dirty_bytes(done.seconds)
        now_ms = self._blackout_ms(done.left_bytes + late_bytes)
        best = self._best_option(done.left_bytes, done.hot_bytes, curve)
        decided = self._decide(done, curve, now_ms, best)
        going_on = decided.kind in (Kind.CONTINUE, Kind.THROTTLE)
        remaining = self._remaining_s(best, curve) if going_on else now_ms / 1000
        return replace(decided, remaining_s=remaining)

    def _learn(self, done: Round) -> None:
        self.rounds += 1
        self._memory_bytes = max(self._memory_bytes, done.page_bytes)
        self.elapsed_s += done.seconds
        self.sent_bytes += done.wire_bytes
        self._page_bytes += done.page_bytes
        self._rate_Bps = blended_rate(self._rate_Bps, done.page_bytes, done.sending_s or done.seconds)
        self._looking_s = done.seconds - (done.sending_s or done.seconds)
        # What the container did lately tells more than what it did a minute ago.
        self._samples = [replace(sample, weight=sample.weight * 0.7) for sample in self._samples][-12:]
        # Of a round in which nearly everything became dirty it is only known that it was at least so much.
        as_foreseen = (self._samples or self._prior) and self.curve.dirty_bytes(done.seconds) >= done.dirty_bytes
        if not (as_foreseen and self._saturated(done)):
            self._samples.append(DirtySample(seconds=max(done.seconds, 1e-4), dirty_bytes=done.dirty_bytes))

    def _saturated(self, done: Round) -> bool:
        return done.dirty_bytes > SATURATED * self._memory_bytes

    def _blackout_ms(self, dirty_bytes: float) -> float:
        return self.costs.blackout_ms(0 if self.budget.hybrid else dirty_bytes, self.blackout_rate_Bps)

    def _best_option(self, left_bytes: float, hot_bytes: float, curve: DirtyCurve) -> _Option:
        whole = self._option(left_bytes, 0.0, curve)
        if hot_bytes <= 0:
            return whole
        deferred = self._option(left_bytes, hot_bytes, curve)
        # Pages that will be dirty again before the freeze are traffic without effect, unless that is seen to gain.
        gains = whole.blackout_ms < deferred.blackout_ms * (1 - LEAST_GAIN)
        return whole if gains else deferred

    def _option(self, left_bytes: float, kept_bytes: float, curve: DirtyCurve) -> _Option:
        send = max(0.0, left_bytes - kept_bytes)
        seconds = max(send / self.rate_Bps + self._looking_s, self.costs.round_s)
        left = kept_bytes + curve.without_hot(kept_bytes, seconds + self.costs.scan_to_freeze_s)
        return _Option(
            defer_hot=kept_bytes > 0,
            send_bytes=send,
            seconds=seconds,
            left_bytes=left,
            blackout_ms=self._blackout_ms(left),
        )

    def _decide(self, done: Round, curve: DirtyCurve, now_ms: float, best: _Option) -> Decision:
        limit = self.budget.downtime_limit_ms
        meets = now_ms <= limit
        said = (
            f"a freeze now is predicted to take {now_ms:.0f} ms ({_size(done.left_bytes)} dirty at "
            f"{_size(self.blackout_rate_Bps)}/s, {self._blackout_ms(0):.0f} ms fixed)",
            f"one more round: {best.seconds * 1000:.0f} ms for {_size(best.send_bytes)}, "
            f"then {best.blackout_ms:.0f} ms",
        )
        decision = Decision(
            kind=Kind.CONTINUE,
            blackout_ms=now_ms,
            next_blackout_ms=best.blackout_ms,
            next_round_s=best.seconds,
            remaining_s=0.0,
            defer_hot=best.defer_hot,
            reasons=said,
        )
        spent = self._spent(best)
        pays = self._pays(done, now_ms, best)
        if pays and not spent:
            return decision
        if meets or self.budget.hybrid:
            why = spent or "one more round gains less than it costs"
            return replace(decision, kind=Kind.FREEZE, reasons=(*said, why))
        above = f"{now_ms:.0f} ms is above the limit of {limit:.0f} ms"
        if not spent:
            throttled = self._throttled(done, decision, curve)
            if isinstance(throttled, Decision):
                return throttled
            spent = throttled
        return replace(decision, kind=Kind.STOP, action=self.budget.on_timeout, reasons=(*said, above, spent))

    def _pays(self, done: Round, now_ms: float, best: _Option) -> bool:
        if self.budget.hybrid:
            return best.left_bytes <= done.left_bytes * HYBRID_GAIN and best.send_bytes > MIB
        # A slowed container pays for every round with its own time.
        worth = WORTH if self._throttle is None else 1.0
        limit_ms = self.budget.downtime_limit_ms
        return round_pays(now_ms, best.blackout_ms, best.seconds, limit_ms=limit_ms, worth=worth)

    def _spent(self, best: _Option) -> str:
        """Which limit of the budget the next round would break; empty when none."""
        budget = self.budget
        if self.rounds >= budget.max_rounds:
            return f"{self.rounds} rounds are over, the most that are allowed"
        if self.elapsed_s + best.seconds > budget.max_time_s:
            return f"after {self.elapsed_s:.1f} s another round does not fit into {budget.max_time_s:.1f} s"
        if self.sent_bytes + best.send_bytes * self._wire_share > budget.max_bytes:
            return f"after {_size(self.sent_bytes)} another round does not fit into {_size(budget.max_bytes)}"
        return ""

    # Throttling

    def _throttled(self, done: Round, decision: Decision, curve: DirtyCurve) -> Decision | str:
        """A tighter quota, or why there is none."""
        budget, throttle = self.budget, self._throttle
        if self._blackout_ms(0) >= budget.downtime_limit_ms:
            return f"the fixed costs alone are {self._blackout_ms(0):.0f} ms"
        if not budget.throttle:
            return "no round makes it shorter, and throttling is off"
        if done.cpu_s is None:
            return "no round makes it shorter, and nobody counts the container's processor time"
        if throttle and not throttle.judged:
            throttle.judged = True
            if self._without_effect(throttle, done):
                return "slowing the container down does not slow its writing"
        used = min(done.cpu_s / done.seconds, throttle.cpus if throttle else math.inf)
        first = throttle.unthrottled_cpus if throttle else used
        factor = self._factor(done, curve)
        # The first step goes half of the way where little is known, so that one wrong measurement does no harm.
        step = math.sqrt(factor) if throttle is None and len(self._samples) < KNOWN_SAMPLES else factor
        cpus = max(used * step, first * budget.min_cpu, 0.01)
        if used <= 0 or cpus > used * 0.95:
            return f"the container is already slowed to {used:.2f} processors"
        steps = throttle.steps + 1 if throttle else 1
        share = cpus / used
        self._throttle = _Throttle(cpus=cpus, unthrottled_cpus=first, steps=steps, before=curve, asked=share)
        self._prior, self._samples = curve.slowed(share), []
        best = self._best_option(done.left_bytes, done.hot_bytes, self._prior)
        return replace(
            decision,
            kind=Kind.THROTTLE,
            cpus=cpus,
            defer_hot=best.defer_hot,
            next_round_s=best.seconds,
            next_blackout_ms=best.blackout_ms,
            reasons=(
                *decision.reasons,
                f"no round meets the limit: {used:.2f} processors in use, slowed to {cpus:.2f}",
            ),
        )

    def _factor(self, done: Round, curve: DirtyCurve) -> float:
        """The share of its present speed at which rounds shrink, and the shortest one leaves what the limit allows."""
        seconds = max(done.left_bytes / self.rate_Bps, self.costs.round_s)
        shrink = THETA * self.rate_Bps / max(curve.rate_Bps(seconds), 1.0)
        allowed_ms = self.budget.downtime_limit_ms - self._blackout_ms(0)
        allowed = allowed_ms / 1000 * self.blackout_rate_Bps
        last = THETA * allowed / max(curve.dirty_bytes(self.costs.round_s), 1.0)
        return min(0.5 if self._saturated(done) else 1.0, shrink, last)

    def _without_effect(self, throttle: _Throttle, done: Round) -> bool:
        expected_before = throttle.before.dirty_bytes(done.seconds)
        if expected_before <= 0 or throttle.asked > 0.9 or self._saturated(done):
            return False
        fell = 1 - done.dirty_bytes / expected_before
        asked = 1 - throttle.before.slowed(throttle.asked).dirty_bytes(done.seconds) / expected_before
        return fell < asked * THROTTLE_EFFECT

    def _remaining_s(self, option: _Option, curve: DirtyCurve) -> float:
        """Until the container runs on the target, if everything goes on as it does now."""
        total, left = 0.0, math.inf
        for _round in range(min(_FORECAST_ROUNDS, self.budget.max_rounds)):
            if option.left_bytes >= left * (1 - LEAST_GAIN):
                break
            total, left = total + option.seconds, option.left_bytes
            option = self._option(left, 0.0, curve)
        return total + self._blackout_ms(left) / 1000


def _size(size_bytes: float) -> str:
    if size_bytes == math.inf:
        return "any number of bytes"
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.1f} {units[0]}" if units[0] != "B" else f"{value:.0f} B"
