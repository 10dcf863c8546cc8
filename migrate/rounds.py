"""The rounds of a pre-copy: scan, send, ask ``Precopy`` what to do next, until it says freeze or stop.

What is kept from round to round (hot pages, the throttle) is given back or sent by whoever freezes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from migrate.costs import DirtySample, FixedCosts
from migrate.errors import NotConverging
from migrate.memory_source import LiveMemory
from migrate.observe import Observer, RoundEnded, Warning
from migrate.outgoing import Outgoing
from migrate.precopy import Budget, Decision, Kind, Precopy, Round
from runtime.cgroup import ContainerCgroup
from runtime.errors import MissingFeature, ProgramFailed
from runtime.throttle import CpuThrottle

# Windows in which the dirty rate is sampled before the first round; together they cost no more than one round does.
SAMPLE_WINDOWS_S = (0.01, 0.03)


class Copier(Protocol):
    """What a round needs of the container's memory: migrate.memory_source.LiveMemory."""

    @property
    def dirty_bytes(self) -> int: ...

    @property
    def hot_bytes(self) -> int: ...

    @property
    def pending_bytes(self) -> int: ...

    def scan(self) -> None: ...

    def send(self, *, defer_hot: bool = False) -> int: ...


class Slower(Protocol):
    """runtime.throttle.CpuThrottle."""

    def slow_to(self, cpus: float) -> None: ...

    def still_here(self) -> None: ...

    def lift(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Gauges:
    """Counters that are read after each round: bytes of pages on the link, processor seconds of the container."""

    page_wire_bytes: Callable[[], int]
    cpu_s: Callable[[], float | None]
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def sample_dirtying(
    copier: Copier, gauges: Gauges, windows_s: Sequence[float] = SAMPLE_WINDOWS_S
) -> tuple[DirtySample, ...]:
    """How much is written within each of these times. The first scan is made here: afterwards all memory is pending."""
    copier.scan()
    samples = []
    for window_s in windows_s:
        begin = gauges.now()
        gauges.sleep(window_s)
        copier.scan()
        samples.append(DirtySample(seconds=max(gauges.now() - begin, 1e-4), dirty_bytes=copier.dirty_bytes))
    return tuple(samples)


class Rounds:
    """One move's rounds. ``run`` returns when the container is to be frozen; ``count`` and ``last`` are kept."""

    def __init__(
        self,
        copier: Copier,
        gauges: Gauges,
        throttle: Slower,
        observer: Observer,
        budget: Budget,
        *,
        switchover_rate_Bps: float | None = None,
    ) -> None:
        self._copier = copier
        self._gauges = gauges
        self._throttle = throttle
        self._observer = observer
        self._budget = budget
        self._switchover_rate_Bps = switchover_rate_Bps
        self.count = 0
        self.last: Decision | None = None
        self.throttled_cpus: float | None = None
        """The tightest limit that was set; None: it ran at its own speed."""

    def run(self) -> Decision:
        """FREEZE, or STOP with an action other than abort. Raises NotConverging for that; the throttle is lifted."""
        try:
            return self._run()
        finally:
            self._throttle.lift()

    def _run(self) -> Decision:
        gauges = self._gauges
        samples = sample_dirtying(self._copier, gauges)
        control = Precopy(self._budget, FixedCosts(), samples=samples, switchover_rate_Bps=self._switchover_rate_Bps)
        defer_hot = False
        begin, cpu_before = gauges.now(), gauges.cpu_s()
        while True:
            wire_before = gauges.page_wire_bytes()
            page_bytes = self._copier.send(defer_hot=defer_hot)
            sent_at = gauges.now()
            self._copier.scan()
            now, cpu = gauges.now(), gauges.cpu_s()
            done = Round(
                seconds=max(now - begin, 1e-4),
                page_bytes=page_bytes,
                wire_bytes=gauges.page_wire_bytes() - wire_before,
                dirty_bytes=self._copier.dirty_bytes,
                hot_bytes=self._copier.hot_bytes,
                pending_bytes=self._copier.pending_bytes,
                sending_s=max(sent_at - begin, 1e-4),
                cpu_s=None if cpu is None or cpu_before is None else cpu - cpu_before,
            )
            begin, cpu_before = now, cpu
            self.count += 1
            decision = self.last = control.decide(done)
            self._tell(done, decision)
            if decision.kind is Kind.STOP and decision.action == "abort":
                raise NotConverging("; ".join(decision.reasons[-2:]))
            if decision.kind in (Kind.FREEZE, Kind.STOP):
                return decision
            self._slow_down(control, decision)
            defer_hot = decision.defer_hot

    def _slow_down(self, control: Precopy, decision: Decision) -> None:
        try:
            if decision.kind is Kind.THROTTLE and decision.cpus is not None:
                self._throttle.slow_to(decision.cpus)
                self.throttled_cpus = decision.cpus
            else:
                self._throttle.still_here()
        except (MissingFeature, ProgramFailed) as error:
            self._observer.on_event(Warning(what=f"the container is not slowed down: {error}"))
            control.budget = replace(control.budget, throttle=False)

    def _tell(self, done: Round, decision: Decision) -> None:
        self._observer.on_event(
            RoundEnded(
                round=self.count,
                ms=done.seconds * 1000,
                sent_bytes=done.wire_bytes,
                rate_Bps=done.page_bytes / max(done.sending_s, 1e-4),
                dirty_bytes=done.left_bytes,
                dirty_rate_Bps=done.dirty_bytes / done.seconds,
                predicted_blackout_ms=decision.blackout_ms,
                remaining_s=decision.remaining_s,
                decision=decision.kind.value,
                cpus=decision.cpus,
                reasons=decision.reasons,
            )
        )


def rounds_of(
    live: LiveMemory,
    out: Outgoing,
    cgroup: ContainerCgroup,
    own_cpus: float | None,
    observer: Observer,
    budget: Budget,
) -> Rounds:
    """Of a container in ``cgroup``, by ``live``, that may use so many processors."""
    gauges = Gauges(page_wire_bytes=lambda: out.sent_bytes["pages"], cpu_s=lambda: cgroup.stats().cpu_usage_s)
    throttle, fast = CpuThrottle(cgroup, own_cpus=own_cpus), out.pace.switchover_Bps
    return Rounds(live, gauges, throttle, observer, budget, switchover_rate_Bps=fast)


def untracked_warning(untracked: Mapping[int, str]) -> Warning | None:
    """What the operator should know of processes that could not be tracked."""
    if not untracked:
        return None
    pid, reason = next(iter(sorted(untracked.items())))
    more = f" and {len(untracked) - 1} more" if len(untracked) > 1 else ""
    return Warning(what=f"the memory of process {pid}{more} is copied in the blackout: {reason}")
