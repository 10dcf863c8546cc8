"""Sending no faster than asked: a token bucket, and a channel that obeys one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from transport.api import Buffer, Channel, ChannelClosed, Deadline, DeadlineExpired, Frame, FrameKind
from transport.delegating import DelegatingChannel
from transport.streams import CLOSED_HERE


class TokenBucket:
    """Allows `rate_Bps` bytes a second on average and `burst_bytes` at once. May be shared by several channels.

    Debt is allowed: a frame longer than the burst is sent whole, and those after it wait longer. So the average holds
    and no frame size is impossible.
    """

    def __init__(self, *, rate_Bps: float, burst_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        if rate_Bps <= 0 or burst_bytes < 0:
            raise ValueError("a rate must be above 0 and a burst not below 0")
        self._lock = threading.Lock()
        self._clock = clock
        self._rate_Bps = rate_Bps
        self._burst_bytes = burst_bytes
        self._tokens = float(burst_bytes)
        self._updated_s = clock()

    def set_rate(self, rate_Bps: float) -> None:
        """Use another rate from now on."""
        if rate_Bps <= 0:
            raise ValueError("a rate must be above 0")
        with self._lock:
            self._refill()
            self._rate_Bps = rate_Bps

    def take(self, count: int) -> float:
        """Account for `count` bytes; returns the seconds to wait before sending them."""
        with self._lock:
            self._refill()
            wait_s = max(0.0, -self._tokens) / self._rate_Bps
            self._tokens -= count
            return wait_s

    def _refill(self) -> None:
        now_s = self._clock()
        self._tokens = min(self._burst_bytes, self._tokens + (now_s - self._updated_s) * self._rate_Bps)
        self._updated_s = now_s


class PacedChannel(DelegatingChannel):
    """A channel whose DATA frames wait for `bucket`. CONTROL frames are counted too but never wait: a COMMIT must not
    queue behind a limit on bandwidth. Owns `inner`."""

    def __init__(self, inner: Channel, bucket: TokenBucket) -> None:
        super().__init__(inner)
        self._bucket: TokenBucket | None = bucket
        self._interrupted = threading.Event()

    def lift(self) -> None:
        """No limit from now on, as in a blackout; a frame that waits already waits its time."""
        self._bucket = None

    def send(self, frame: Frame, *, deadline: Deadline) -> None:
        self._pace(frame.kind, len(frame.body), deadline)
        super().send(frame, deadline=deadline)

    def send_data(self, tag: int, buffers: Sequence[Buffer], *, deadline: Deadline) -> None:
        self._pace(FrameKind.DATA, sum(memoryview(buffer).nbytes for buffer in buffers), deadline)
        super().send_data(tag, buffers, deadline=deadline)

    def abort(self) -> None:
        super().abort()
        self._interrupted.set()

    def close(self) -> None:
        self._interrupted.set()
        super().close()

    def _pace(self, kind: FrameKind, count: int, deadline: Deadline) -> None:
        bucket = self._bucket
        wait_s = bucket.take(count) if bucket else 0.0
        if kind is FrameKind.CONTROL or not wait_s:
            return
        remaining = deadline.remaining()
        if self._interrupted.wait(wait_s if remaining is None else min(wait_s, remaining)):
            raise ChannelClosed(CLOSED_HERE)
        if remaining is not None and remaining < wait_s:
            raise DeadlineExpired("the bandwidth limit did not let the frame go in time")
