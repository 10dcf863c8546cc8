"""What every channel promises (transport.api.Channel), asked of every kind there is."""

from __future__ import annotations

import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.contract.pairs import Pair
from transport.api import (
    MAX_BODY_BYTES,
    MAX_CONTROL_BYTES,
    MAX_TAG,
    ChannelClosed,
    Deadline,
    DeadlineExpired,
    Frame,
    FrameKind,
    ProtocolError,
)
from transport.channel import StreamChannel
from transport.frames import HEADER_BYTES, encode_header

# Before the function's own fixtures, so that the server does not look like something a test left behind.
pytestmark = pytest.mark.usefixtures("ssh_server")

MIB = 1024 * 1024


def soon() -> Deadline:
    return Deadline.after(20)


def receive(channel: StreamChannel) -> Frame:
    return channel.receive(deadline=soon())


def send_raw(channel: StreamChannel, *parts: bytes) -> None:
    channel.stream.write_all([memoryview(part) for part in parts], soon())


@contextmanager
def in_background(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Run `work` in a thread during the block; what it raised is in the list afterwards."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        thread.join(30)
        assert not thread.is_alive()


def fill_until_stuck(channel: StreamChannel, deadline: Deadline) -> None:
    body = bytes(MIB)
    for number in range(1000):
        channel.send(Frame.data(number, body), deadline=deadline)
    raise AssertionError("the channel swallowed 1000 MiB that nobody read")


def test_frames_arrive_in_order_with_kind_tag_and_body(ends: Pair) -> None:
    frames = [
        Frame.control({"type": "hello", "list": [1, b"\0", None, {"nested": 0.5}]}),
        Frame.data(0, b""),
        Frame.data(MAX_TAG, b"x"),
        Frame.control({}, tag=7),
        Frame.data(3, bytes(range(256)) * 40),
    ]
    for frame in frames:
        ends.near.send(frame, deadline=soon())
    received = [receive(ends.far) for _ in frames]
    assert received == frames
    assert received[0].message() == {"type": "hello", "list": [1, b"\0", None, {"nested": 0.5}]}


def test_the_largest_frames_arrive(ends: Pair) -> None:
    body = bytes(range(251)) * (MAX_BODY_BYTES // 251 + 1)
    frames = [
        Frame.data(1, memoryview(body)[:MAX_BODY_BYTES]),
        Frame(FrameKind.CONTROL, 2, memoryview(body)[:MAX_CONTROL_BYTES]),
    ]

    def send_all() -> None:
        for frame in frames:
            ends.near.send(frame, deadline=soon())

    with in_background(send_all) as errors:
        received = [receive(ends.far) for _ in frames]
    assert not errors
    assert received == frames


def test_many_small_frames_arrive(ends: Pair) -> None:
    def send_all() -> None:
        for number in range(2000):
            ends.near.send(Frame.data(number, b"%d" % number), deadline=soon())

    with in_background(send_all) as errors:
        received = [receive(ends.far) for _ in range(2000)]
    assert not errors
    assert [(frame.tag, bytes(frame.body)) for frame in received] == [(n, b"%d" % n) for n in range(2000)]


def test_both_directions_flow_at_once_without_a_deadlock(pair: Pair) -> None:
    count = 12
    bodies = {pair.near: b"n" * MIB, pair.far: b"f" * MIB}

    def send_all(channel: StreamChannel) -> None:
        for number in range(count):
            channel.send(Frame.data(number, bodies[channel]), deadline=soon())

    received: dict[StreamChannel, list[Frame]] = {}

    def receive_all(channel: StreamChannel) -> None:
        received[channel] = [receive(channel) for _ in range(count)]

    with (
        in_background(lambda: send_all(pair.near)) as one,
        in_background(lambda: send_all(pair.far)) as two,
        in_background(lambda: receive_all(pair.near)) as three,
    ):
        receive_all(pair.far)
    assert one == two == three == []
    assert received[pair.far] == [Frame.data(number, bodies[pair.near]) for number in range(count)]
    assert received[pair.near] == [Frame.data(number, bodies[pair.far]) for number in range(count)]


def test_buffers_of_one_frame_are_gathered_in_order(ends: Pair) -> None:
    buffers = [bytes([number % 251]) * (number % 1500) for number in range(3000)]
    whole = b"".join(buffers)
    memory = [memoryview(bytearray(buffer)) if number % 2 else buffer for number, buffer in enumerate(buffers)]
    with in_background(lambda: ends.near.send_data(9, memory, deadline=soon())) as errors:
        frame = receive(ends.far)
    assert not errors
    assert (frame.tag, bytes(frame.body)) == (9, whole)


def test_bodies_are_read_into_the_memory_that_the_caller_names(ends: Pair) -> None:
    place = bytearray(10)
    asked = []

    def into(tag: int, length: int) -> memoryview | None:
        asked.append((tag, length))
        return memoryview(place)[2 : 2 + length] if tag == 5 else None

    for frame in (Frame.control({"a": 1}), Frame.data(5, b"hello"), Frame.data(6, b"other")):
        ends.near.send(frame, deadline=soon())
    assert ends.far.receive(deadline=soon(), into=into).message() == {"a": 1}
    assert ends.far.receive(deadline=soon(), into=into).body == b"hello"
    assert place == b"\0\0hello\0\0\0"
    assert ends.far.receive(deadline=soon(), into=into).body == b"other"
    assert asked == [(5, 5), (6, 5)]


def test_an_error_of_the_caller_who_names_memory_does_not_lose_the_frame(pair: Pair) -> None:
    def refuse(tag: int, length: int) -> memoryview | None:
        raise LookupError(tag)

    pair.near.send(Frame.data(5, b"hello"), deadline=soon())
    with pytest.raises(LookupError):
        pair.far.receive(deadline=soon(), into=refuse)
    with pytest.raises(ValueError, match="5 bytes long"):
        pair.far.receive(deadline=soon(), into=lambda tag, length: memoryview(bytearray(4)))
    assert receive(pair.far) == Frame.data(5, b"hello")


def test_a_receive_that_ran_into_its_deadline_can_be_repeated(ends: Pair) -> None:
    begin = time.monotonic()
    with pytest.raises(DeadlineExpired):
        ends.far.receive(deadline=Deadline.after(0.05))
    assert 0.04 < time.monotonic() - begin < 30
    header = encode_header(FrameKind.DATA, 4, 6)
    for part in (header[:10], header[10:] + b"abc"):
        send_raw(ends.near, part)
        with pytest.raises(DeadlineExpired):
            ends.far.receive(deadline=Deadline.after(0.05))
    send_raw(ends.near, b"def")
    assert receive(ends.far) == Frame.data(4, b"abcdef")


def test_a_deadline_in_the_past_still_takes_what_is_there(pair: Pair) -> None:
    pair.near.send(Frame.data(1, b"x"), deadline=soon())
    assert pair.far.readable(10)
    assert pair.far.receive(deadline=Deadline.after(-1)) == Frame.data(1, b"x")
    with pytest.raises(DeadlineExpired):
        pair.far.receive(deadline=Deadline.after(-1))


def test_sending_to_a_peer_that_does_not_read_ends_at_the_deadline(ends: Pair) -> None:
    begin = time.monotonic()
    with pytest.raises(DeadlineExpired):
        fill_until_stuck(ends.near, Deadline.after(0.3))
    assert 0.2 < time.monotonic() - begin < 30
    with pytest.raises(ChannelClosed, match="whole"):
        ends.near.send(Frame.data(0, b""), deadline=soon())


def test_a_second_sender_waits_its_turn_no_longer_than_its_deadline(pair: Pair) -> None:
    with in_background(lambda: fill_until_stuck(pair.near, Deadline.after(0.5))) as errors:
        time.sleep(0.2)
        with pytest.raises(DeadlineExpired):
            pair.near.send(Frame.data(0, b""), deadline=Deadline.after(0.1))
    assert isinstance(errors[0], DeadlineExpired)


def test_the_peer_gets_what_was_sent_before_close_and_then_the_end(ends: Pair) -> None:
    for number in range(20):
        ends.near.send(Frame.data(number, b"x" * 1000), deadline=soon())
    ends.near.close()
    assert [receive(ends.far).tag for _ in range(20)] == list(range(20))
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            receive(ends.far)


def test_sending_to_a_peer_that_closed_raises(ends: Pair) -> None:
    ends.far.close()
    with pytest.raises(ChannelClosed):
        fill_until_stuck(ends.near, soon())


def test_a_closed_channel_raises_at_once_and_closes_again_without_complaint(ends: Pair) -> None:
    ends.near.close()
    ends.near.close()
    ends.near.abort()
    with pytest.raises(ChannelClosed):
        receive(ends.near)
    with pytest.raises(ChannelClosed):
        ends.near.send(Frame.data(0, b"x"), deadline=soon())
    assert ends.near.readable(0)


def test_the_end_of_a_with_block_closes(pair: Pair) -> None:
    with pair.near as near:
        assert near is pair.near
    with pytest.raises(ChannelClosed):
        receive(pair.near)


@pytest.mark.parametrize("end", ["abort", "close"])
def test_a_blocked_receive_ends_when_another_thread_ends_the_channel(ends: Pair, end: str) -> None:
    with in_background(lambda: ends.near.receive(deadline=Deadline.never())) as errors:
        time.sleep(0.1)
        begin = time.monotonic()
        getattr(ends.near, end)()
    assert time.monotonic() - begin < 30
    assert isinstance(errors[0], ChannelClosed)


@pytest.mark.parametrize("end", ["abort", "close"])
def test_a_blocked_send_ends_when_another_thread_ends_the_channel(ends: Pair, end: str) -> None:
    with in_background(lambda: fill_until_stuck(ends.near, Deadline.never())) as errors:
        time.sleep(0.15)
        begin = time.monotonic()
        getattr(ends.near, end)()
    assert time.monotonic() - begin < 30
    assert isinstance(errors[0], ChannelClosed)


def test_abort_in_a_signal_handler_ends_a_blocked_receive(ends: Pair) -> None:
    before = signal.signal(signal.SIGALRM, lambda number, frame: ends.near.abort())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(ChannelClosed):
            ends.near.receive(deadline=soon())
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_peer_of_an_aborted_channel_sees_the_end(ends: Pair) -> None:
    ends.near.abort()
    ends.near.abort()
    ends.near.close()
    with pytest.raises(ChannelClosed):
        receive(ends.far)


@pytest.mark.parametrize(
    "garbage", [b"SSH-2.0-OpenSSH_9.2\r\n" + b"x" * 40, bytes(64), b"CMG1" + bytes(60), b"\xff" * 4096]
)
def test_garbage_from_the_peer_is_refused_for_good(pair: Pair, garbage: bytes) -> None:
    pair.near.send(Frame.data(1, b"good"), deadline=soon())
    send_raw(pair.near, garbage)
    assert receive(pair.far) == Frame.data(1, b"good")
    for _ in range(2):
        with pytest.raises(ProtocolError):
            receive(pair.far)


@pytest.mark.parametrize(("kind", "limit"), [(1, MAX_CONTROL_BYTES), (2, MAX_BODY_BYTES)])
def test_a_frame_longer_than_the_limit_is_refused_by_both_sides(pair: Pair, kind: int, limit: int) -> None:
    with pytest.raises(ProtocolError, match="longer"):
        pair.near.send(Frame(FrameKind(kind), 0, bytes(limit + 1)), deadline=soon())
    pair.near.send(Frame.data(1, b"still fine"), deadline=soon())
    assert receive(pair.far).body == b"still fine"
    fields = struct.pack(">4sBBHIQ", b"CMG1", kind, 0, 0, limit + 1, 0)
    send_raw(pair.near, fields + struct.pack(">I", zlib.crc32(fields)))
    with pytest.raises(ProtocolError, match="longer"):
        receive(pair.far)


@pytest.mark.parametrize("count", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5])
def test_half_a_frame_and_then_the_end_is_no_frame(pair: Pair, count: int) -> None:
    frame = encode_header(FrameKind.DATA, 4, 10) + b"0123456789"
    send_raw(pair.near, frame[:count])
    pair.near.close()
    with pytest.raises(ChannelClosed, match="after .* bytes of a frame"):
        receive(pair.far)


def test_counters_of_both_ends_agree(ends: Pair) -> None:
    ends.near.send(Frame.data(1, b"12345"), deadline=soon())
    ends.near.send_data(1, [b"123", b"45"], deadline=soon())
    receive(ends.far)
    receive(ends.far)
    assert ends.near.bytes_sent == ends.far.bytes_received == 2 * (HEADER_BYTES + 5)
    assert ends.near.bytes_received == ends.far.bytes_sent == 0


def test_readable_tells_whether_there_is_something_to_receive(ends: Pair) -> None:
    begin = time.monotonic()
    assert not ends.far.readable(0)
    assert not ends.far.readable(0.1)
    assert 0.09 < time.monotonic() - begin < 30
    for number in range(2):
        ends.near.send(Frame.data(number, b"x" * 100), deadline=soon())
    for number in range(2):
        assert ends.far.readable(10)
        assert receive(ends.far).tag == number
    assert not ends.far.readable(0.05)
    ends.near.close()
    assert ends.far.readable(10)


def test_a_channel_says_who_its_peer_is(pair: Pair) -> None:
    assert pair.near.peer.name
    assert pair.near.peer.transport in {"ssh", "stream", "local", "memory"}
