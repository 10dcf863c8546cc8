"""Bandwidth limits."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.api import ChannelClosed, Deadline, DeadlineExpired, Frame
from transport.pacing import PacedChannel, TokenBucket
from transport.testing.memory import memory_pair


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_burst_goes_at_once_and_the_rest_at_the_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(rate_Bps=1000, burst_bytes=500, clock=clock)
    assert bucket.take(500) == 0
    assert bucket.take(250) == 0
    assert bucket.take(250) == pytest.approx(0.25)
    clock.now_s += 0.5
    assert bucket.take(1) == pytest.approx(0)
    clock.now_s += 60
    assert bucket.take(500) == 0


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 2)), min_size=1, max_size=50))
def test_no_pattern_of_sending_exceeds_rate_and_burst(sends: list[tuple[int, float]]) -> None:
    clock = Clock()
    bucket = TokenBucket(rate_Bps=1000, burst_bytes=2000, clock=clock)
    begin_s = clock.now_s
    earlier = 0
    for count, pause_s in sends:
        clock.now_s += pause_s
        clock.now_s += bucket.take(count)
        # What was let go before this frame fits the limit; the frame itself may be in debt.
        assert earlier <= 2000 + (clock.now_s - begin_s) * 1000 + 1e-6
        earlier += count


def test_a_new_rate_counts_from_the_change_on() -> None:
    clock = Clock()
    bucket = TokenBucket(rate_Bps=1000, burst_bytes=0, clock=clock)
    bucket.take(1000)
    bucket.set_rate(10_000)
    assert bucket.take(0) == pytest.approx(0.1)


@pytest.mark.parametrize(("rate_Bps", "burst_bytes"), [(0, 1), (-1, 1), (1, -1)])
def test_a_senseless_limit_is_refused(rate_Bps: float, burst_bytes: int) -> None:
    with pytest.raises(ValueError):
        TokenBucket(rate_Bps=rate_Bps, burst_bytes=burst_bytes)


def test_data_frames_wait_and_control_frames_do_not() -> None:
    near, far = memory_pair()
    with PacedChannel(near, TokenBucket(rate_Bps=100_000, burst_bytes=10_000)) as paced, far:
        begin_s = time.monotonic()
        paced.send(Frame.data(1, bytes(20_000)), deadline=Deadline.after(5))
        paced.send(Frame.control({"a": 1}), deadline=Deadline.after(5))
        paced.send_data(2, [b"x", b"y"], deadline=Deadline.after(5))
        assert 0.09 < time.monotonic() - begin_s < 30
        assert [far.receive(deadline=Deadline.after(5)).tag for _ in range(3)] == [1, 0, 2]
        assert paced.peer == near.peer
        assert (paced.bytes_sent, paced.bytes_received) == (near.bytes_sent, 0)


def test_a_lifted_limit_no_longer_counts() -> None:
    near, far = memory_pair()
    with PacedChannel(near, TokenBucket(rate_Bps=1, burst_bytes=0)) as paced, far:
        paced.send(Frame.data(1, b"x" * 100), deadline=Deadline.after(5))
        paced.lift()
        paced.send(Frame.data(2, b"x" * 100), deadline=Deadline.after(5))
        assert paced.bytes_sent == 248


def test_a_frame_that_would_have_to_wait_beyond_its_deadline_is_not_sent() -> None:
    near, far = memory_pair()
    with PacedChannel(near, TokenBucket(rate_Bps=1, burst_bytes=0)) as paced, far:
        paced.send(Frame.data(1, b"x"), deadline=Deadline.after(5))
        with pytest.raises(DeadlineExpired):
            paced.send(Frame.data(2, b"x"), deadline=Deadline.after(0.05))
        assert far.receive(deadline=Deadline.after(5)).tag == 1
        assert not far.readable(0)


def test_abort_ends_the_wait_for_bandwidth() -> None:
    near, far = memory_pair()
    with PacedChannel(near, TokenBucket(rate_Bps=1, burst_bytes=0)) as paced, far:
        paced.send(Frame.data(1, b"x" * 100), deadline=Deadline.after(5))
        timer = threading.Timer(0.05, paced.abort)
        timer.start()
        with pytest.raises(ChannelClosed):
            paced.send(Frame.data(2, b"x"), deadline=Deadline.after(20))
        timer.join()
