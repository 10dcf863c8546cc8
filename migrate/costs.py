"""What a move costs: fixed costs, and how much memory is dirty after how long. Pure values and arithmetic.

A writer dirties D(t) = W (1 - e^(-t/tau)) + c t different bytes within t seconds: a working set of W bytes that is
written again and again, and c bytes a second that are written once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MIB = 1 << 20
GIB = 1 << 30
# A round must take this share off the blackout. Below the limit it must also save this much blackout for each second it
# lasts: at 1 the container's dirty rate would have to be zero, at 0 a round would be run for a gain that nobody sees.
LEAST_GAIN = 0.05
WORTH = 0.25
# Nobody minds that a move takes so much longer, so less is asked of such a round. What is left at the end is pages here
# and there, which cost more than their bytes say.
SHORT_ROUND_S = 0.1
LEAST_GAIN_OF_SHORT = 0.02
# Time constants that are tried, in seconds; a quarter apart, which is finer than any round can tell.
_TAUS_S = tuple(0.004 * 1.25**step for step in range(42))
# Fits this close to the best are as good as it; of them the quickest working set is taken, the cautious answer.
_AS_GOOD = 1.02


@dataclass(frozen=True, kw_only=True)
class FixedCosts:
    """What a blackout costs whatever is dirty, as measured for this container on these hosts.

    ``freeze_ms`` and ``restore_ms`` are F and R, everything of the blackout that is no memory; ``state_bytes`` are
    images and changed files that are sent in it; ``round_s`` is the shortest time one round takes (scan, answers).
    """

    freeze_ms: float = 40.0
    restore_ms: float = 40.0
    state_bytes: int = 0
    round_s: float = 0.02
    scan_to_freeze_s: float = 0.005

    def blackout_ms(self, dirty_bytes: float, rate_Bps: float) -> float:
        """F + D / B + R, with B in page bytes a second, before compression."""
        return self.freeze_ms + self.restore_ms + (self.state_bytes + max(0.0, dirty_bytes)) / rate_Bps * 1000


def round_pays(now_ms: float, then_ms: float, round_s: float, *, limit_ms: float, worth: float = WORTH) -> bool:
    """Whether to run a round of ``round_s`` that takes the blackout from ``now_ms`` to ``then_ms``."""
    gain_ms, short = now_ms - then_ms, round_s <= SHORT_ROUND_S
    if gain_ms < now_ms * (LEAST_GAIN_OF_SHORT if short else LEAST_GAIN):
        return False
    return now_ms > limit_ms or short or gain_ms >= round_s * 1000 * worth


@dataclass(frozen=True, kw_only=True)
class DirtySample:
    """``dirty_bytes`` different bytes were written within ``seconds``."""

    seconds: float
    dirty_bytes: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.dirty_bytes < 0 or self.weight <= 0:
            raise ValueError(f"no sample of a dirty curve: {self}")


@dataclass(frozen=True, kw_only=True)
class DirtyCurve:
    """D(t). ``hot_bytes`` is W, the writable working set; ``cold_Bps`` is c."""

    hot_bytes: float = 0.0
    tau_s: float = 1.0
    cold_Bps: float = 0.0

    def dirty_bytes(self, seconds: float) -> float:
        return self.hot_bytes * -math.expm1(-max(0.0, seconds) / self.tau_s) + self.cold_Bps * max(0.0, seconds)

    def rate_Bps(self, seconds: float) -> float:
        """Different bytes a second on average over so long."""
        return self.dirty_bytes(seconds) / seconds

    def without_hot(self, kept_bytes: float, seconds: float) -> float:
        """D(t) of everything but ``kept_bytes`` of the working set, which are counted apart."""
        return replace(self, hot_bytes=max(0.0, self.hot_bytes - kept_bytes)).dirty_bytes(seconds)

    def slowed(self, factor: float) -> DirtyCurve:
        """The same writer with ``factor`` of its processor time."""
        return replace(self, tau_s=self.tau_s / factor, cold_Bps=self.cold_Bps * factor)


def fit_curve(samples: Sequence[DirtySample], prior: DirtyCurve | None = None) -> DirtyCurve:
    """The curve nearest to the samples, by relative error. One sample gives a straight line, or scales ``prior``.

    Raises ValueError without samples and prior.
    """
    if not samples:
        if prior is None:
            raise ValueError("a dirty curve needs at least one sample")
        return prior
    if len({sample.seconds for sample in samples}) == 1:
        mean = sum(sample.dirty_bytes * sample.weight for sample in samples) / sum(s.weight for s in samples)
        return _through(samples[0].seconds, mean, prior)
    fits = [(_error(curve, samples), curve) for curve in (_fit_at(tau, samples) for tau in _TAUS_S)]
    best = min(error for error, _curve in fits)
    return next(curve for error, curve in fits if error <= best * _AS_GOOD + 1e-6)


def _through(seconds: float, dirty_bytes: float, prior: DirtyCurve | None) -> DirtyCurve:
    before = prior.dirty_bytes(seconds) if prior else 0.0
    if prior is None or before <= 0:
        return DirtyCurve(cold_Bps=dirty_bytes / seconds)
    scale = dirty_bytes / before
    return replace(prior, hot_bytes=prior.hot_bytes * scale, cold_Bps=prior.cold_Bps * scale)


def _fit_at(tau_s: float, samples: Sequence[DirtySample]) -> DirtyCurve:
    """Least squares of W and c, neither negative, for one time constant."""
    aa = ab = bb = ad = bd = 0.0
    for sample in samples:
        weight = sample.weight / max(sample.dirty_bytes, MIB) ** 2
        a, b, d = -math.expm1(-sample.seconds / tau_s), sample.seconds, sample.dirty_bytes
        aa, ab, bb = aa + weight * a * a, ab + weight * a * b, bb + weight * b * b
        ad, bd = ad + weight * a * d, bd + weight * b * d
    determinant = aa * bb - ab * ab
    hot = cold = -1.0
    # Nearly parallel: for a tau far above all samples the working set looks like a straight line.
    if determinant > 1e-9 * aa * bb:
        hot, cold = (ad * bb - bd * ab) / determinant, (bd * aa - ad * ab) / determinant
    if hot >= 0 and cold >= 0:
        return DirtyCurve(hot_bytes=hot, tau_s=tau_s, cold_Bps=cold)
    only_hot = DirtyCurve(hot_bytes=ad / aa, tau_s=tau_s)
    only_cold = DirtyCurve(tau_s=tau_s, cold_Bps=bd / bb)
    return min(only_hot, only_cold, key=lambda curve: _error(curve, samples))


def _error(curve: DirtyCurve, samples: Sequence[DirtySample]) -> float:
    return sum(
        sample.weight * ((curve.dirty_bytes(sample.seconds) - sample.dirty_bytes) / max(sample.dirty_bytes, MIB)) ** 2
        for sample in samples
    )


def blended_rate(
    rate_Bps: float | None, page_bytes: int, seconds: float, *, enough_bytes: int = 4 * MIB
) -> float | None:
    """The rate after a round that moved ``page_bytes`` in ``seconds``: small rounds measure answers, not the link."""
    if page_bytes <= 0 or seconds <= 0:
        return rate_Bps
    measured = page_bytes / seconds
    if rate_Bps is None:
        return measured
    share = min(1.0, page_bytes / enough_bytes) * 0.5
    return rate_Bps * (1 - share) + measured * share
