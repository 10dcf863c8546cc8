"""The faulty channel does exactly what it is told to."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from transport.api import ChannelClosed, Deadline, DeadlineExpired, Frame, ProtocolError
from transport.channel import StreamChannel
from transport.frames import HEADER_BYTES
from transport.testing.faulty import Faults, FaultyChannel
from transport.testing.memory import memory_pair

FRAME_BYTES = HEADER_BYTES + 10


def soon() -> Deadline:
    return Deadline.after(10)


def send(channel: StreamChannel, number: int) -> None:
    channel.send(Frame.data(number, b"0123456789"), deadline=soon())


def tag(channel: StreamChannel) -> int:
    return channel.receive(deadline=soon()).tag


def faulty(faults: Faults) -> tuple[StreamChannel, StreamChannel]:
    near, far = memory_pair()
    return FaultyChannel(near, faults), far


@pytest.mark.parametrize("extra", [0, 1, HEADER_BYTES, FRAME_BYTES - 1])
def test_a_cut_connection_delivers_exactly_the_bytes_before_the_cut(extra: int) -> None:
    near, far = faulty(Faults(cut_sent_at=2 * FRAME_BYTES + extra))
    send(near, 0)
    # The second frame ends at the cut or before it; the third cannot.
    with contextlib.suppress(ChannelClosed):
        send(near, 1)
    with pytest.raises(ChannelClosed):
        send(near, 2)
    assert [tag(far), tag(far)] == [0, 1]
    with pytest.raises(ChannelClosed):
        tag(far)
    assert far.bytes_received == 2 * FRAME_BYTES + extra


def test_a_cut_while_receiving_ends_the_channel_there() -> None:
    near, far = faulty(Faults(cut_received_at=FRAME_BYTES + 3))
    send(far, 0)
    send(far, 1)
    assert tag(near) == 0
    with pytest.raises(ChannelClosed, match="after 3 of 24"):
        tag(near)
    with pytest.raises(ChannelClosed):
        send(far, 2)


def test_a_stalled_sender_is_noticed_by_deadlines_alone() -> None:
    near, far = faulty(Faults(stall_sent_at=FRAME_BYTES + 3))
    send(near, 0)
    with pytest.raises(DeadlineExpired):
        near.send(Frame.data(1, b"0123456789"), deadline=Deadline.after(0.05))
    assert tag(far) == 0
    with pytest.raises(DeadlineExpired):
        far.receive(deadline=Deadline.after(0.05))


def test_a_stalled_receiver_is_noticed_by_deadlines_alone() -> None:
    near, far = faulty(Faults(stall_received_at=FRAME_BYTES))
    send(far, 0)
    send(far, 1)
    assert tag(near) == 0
    assert not near.readable(0.05)
    with pytest.raises(DeadlineExpired):
        near.receive(deadline=Deadline.after(0.05))


def test_abort_ends_a_stall() -> None:
    near, _ = faulty(Faults(stall_sent_at=0))
    timer = threading.Timer(0.05, near.abort)
    timer.start()
    with pytest.raises(ChannelClosed):
        send(near, 0)
    timer.join()


def test_a_flipped_bit_of_a_body_arrives_and_one_of_a_header_is_refused() -> None:
    near, far = faulty(Faults(flip_sent_at=HEADER_BYTES + 2, flip_received_at=5))
    send(near, 0)
    assert far.receive(deadline=soon()).body == b"0133456789"
    send(far, 0)
    with pytest.raises(ProtocolError):
        tag(near)


def test_a_frame_is_sent_twice_and_another_not_at_all() -> None:
    near, far = faulty(Faults(duplicate_frame=1, drop_frame=3))
    for number in range(5):
        send(near, number)
    assert [tag(far) for _ in range(5)] == [0, 1, 1, 2, 4]


def test_each_frame_is_delayed() -> None:
    near, far = faulty(Faults(delay_s=0.05))
    begin_s = time.monotonic()
    send(near, 0)
    send(near, 1)
    assert time.monotonic() - begin_s > 0.09
    assert [tag(far), tag(far)] == [0, 1]
