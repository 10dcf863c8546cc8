"""A channel that breaks in a way that was chosen: to the byte, and each time the same."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from transport.api import ChannelClosed, Deadline, DeadlineExpired
from transport.channel import StreamChannel
from transport.streams import CLOSED_HERE, ByteStream


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong. Offsets count the bytes of one direction from 0, headers included; frames count from 0."""

    cut_sent_at: int | None = None
    """The connection breaks when so many bytes were sent: the peer gets exactly these."""
    cut_received_at: int | None = None
    stall_sent_at: int | None = None
    """Nothing more goes out after so many bytes, and nothing says so."""
    stall_received_at: int | None = None
    flip_sent_at: int | None = None
    """The lowest bit of the byte at this offset arrives changed."""
    flip_received_at: int | None = None
    delay_s: float = 0.0
    """Before each frame sent."""
    duplicate_frame: int | None = None
    """This frame is sent twice."""
    drop_frame: int | None = None
    """This frame is not sent."""


class FaultyStream:
    """A stream with faults. Owns `inner`."""

    def __init__(self, inner: ByteStream, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._sent = 0
        self._received = 0
        self._frame = -1
        self._woken = threading.Event()

    def read_into(self, buffer: memoryview, deadline: Deadline) -> int:
        faults = self._faults
        if self._received == faults.cut_received_at:
            self._inner.abort()
            return 0
        if self._received == faults.stall_received_at:
            self._stall(deadline, "nothing came from the peer in time")
        room = _room(self._received, buffer.nbytes, faults.cut_received_at, faults.stall_received_at)
        count = self._inner.read_into(buffer[:room], deadline)
        _flip(buffer[:count], self._received, faults.flip_received_at)
        self._received += count
        return count

    def write_all(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        # A channel writes each frame with one call, which is what makes frames countable here.
        self._frame += 1
        if self._faults.delay_s:
            remaining = deadline.remaining()
            self._woken.wait(self._faults.delay_s if remaining is None else min(self._faults.delay_s, remaining))
            self._check()
        if self._frame == self._faults.drop_frame:
            return
        for _ in range(2 if self._frame == self._faults.duplicate_frame else 1):
            self._write(b"".join(buffers), deadline)

    def _write(self, data: bytes, deadline: Deadline) -> None:
        faults = self._faults
        room = _room(self._sent, len(data), faults.cut_sent_at, faults.stall_sent_at)
        part = bytearray(data[:room])
        _flip(memoryview(part), self._sent, faults.flip_sent_at)
        if part:
            self._inner.write_all([memoryview(part)], deadline)
        self._sent += room
        if self._sent == faults.cut_sent_at:
            self._inner.abort()
            raise BrokenPipeError(0, "cut by a test")
        if room < len(data):
            self._stall(deadline, "the peer took nothing more in time")

    def _stall(self, deadline: Deadline, what: str) -> None:
        self._woken.wait(deadline.remaining())
        self._check()
        raise DeadlineExpired(what)

    def _check(self) -> None:
        if self._woken.is_set():
            raise ChannelClosed(CLOSED_HERE)

    def readable(self, timeout_s: float) -> bool:
        if self._received == self._faults.stall_received_at:
            return self._woken.wait(timeout_s)
        return self._received == self._faults.cut_received_at or self._inner.readable(timeout_s)

    def wake(self) -> None:
        self._inner.wake()
        self._woken.set()

    def abort(self) -> None:
        self._inner.abort()
        self._woken.set()

    def close(self) -> None:
        self._inner.close()

    def last_words(self) -> str:
        return self._inner.last_words()


class FaultyChannel(StreamChannel):
    """`inner` with `faults`. Takes over `inner`, which must not have been used yet."""

    def __init__(self, inner: StreamChannel, faults: Faults | None = None) -> None:
        super().__init__(FaultyStream(inner.stream, faults or Faults()), inner.peer)


def _room(position: int, count: int, *limits: int | None) -> int:
    """How many of `count` bytes from `position` on come before the first limit that lies ahead."""
    return min([count, *(limit - position for limit in limits if limit is not None and limit >= position)])


def _flip(part: memoryview, position: int, offset: int | None) -> None:
    if offset is not None and position <= offset < position + part.nbytes:
        part[offset - position] ^= 1
