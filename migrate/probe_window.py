"""What a probe has seen from one mark to the next: counts, histograms, the longest time without an answer. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NS_PER_MS = 1_000_000
# Upper edges of the histograms, in milliseconds.
BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SLOW_NS = 10 * NS_PER_MS


@dataclass(kw_only=True)
class Window:
    """What was seen from one mark to the next."""

    begin_ns: int
    last_answer_ns: int
    requests: int = 0
    failed: int = 0
    resets: int = 0
    reconnects: int = 0
    out_of_sequence: int = 0
    longest_gap_ns: int = 0
    probe_late_ns: int = 0
    slow: int = 0
    latencies: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_MS) + 1))
    gaps: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_MS) + 1))

    def answered(self, now_ns: int, asked_ns: int) -> None:
        gap_ns, took_ns = now_ns - self.last_answer_ns, now_ns - asked_ns
        self.longest_gap_ns = max(self.longest_gap_ns, gap_ns)
        self.last_answer_ns = now_ns
        self.slow += took_ns >= SLOW_NS
        self.latencies[_bucket(took_ns)] += 1
        self.gaps[_bucket(gap_ns)] += 1

    def to_json(self, kind: str, now_ns: int, last: int) -> dict[str, Any]:
        # A service that never answered again has a gap without an end: it counts as far as it goes.
        gap_ms = round(max(self.longest_gap_ns, now_ns - self.last_answer_ns) / NS_PER_MS, 3)
        return {
            "type": kind,
            "requests": self.requests,
            "failed": self.failed,
            "resets": self.resets,
            "reconnects": self.reconnects,
            "out_of_sequence": self.out_of_sequence,
            "longest_gap_ms": gap_ms,
            "downtime_ms": gap_ms,
            "slow_requests": self.slow,
            "latency_ms": _named(self.latencies),
            "gaps_ms": _named(self.gaps),
            "duration_ms": round((now_ns - self.begin_ns) / NS_PER_MS, 3),
            "probe_late_ms": round(self.probe_late_ns / NS_PER_MS, 3),
            "last": last,
        }


def _bucket(span_ns: int) -> int:
    span_ms = span_ns / NS_PER_MS
    return next((number for number, edge in enumerate(BUCKETS_MS) if span_ms < edge), len(BUCKETS_MS))


def _named(counts: Sequence[int]) -> dict[str, int]:
    names = [f"<{edge}" for edge in BUCKETS_MS] + [f">={BUCKETS_MS[-1]}"]
    return {name: count for name, count in zip(names, counts, strict=True) if count}
