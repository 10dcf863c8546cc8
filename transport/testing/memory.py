"""Two channels joined inside one process."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from transport.api import ChannelClosed, Deadline, DeadlineExpired, Peer
from transport.channel import StreamChannel
from transport.streams import CLOSED_HERE

CAPACITY_BYTES = 256 * 1024
"""What fits into one direction before a sender waits; about a socket's."""


class _Pipe:
    """Bytes in one direction."""

    def __init__(self, capacity_bytes: int) -> None:
        # A Condition's own lock is re-entrant, so a signal handler may close the pipe its thread is using.
        self.changed = threading.Condition()
        self.capacity_bytes = capacity_bytes
        self.content = bytearray()
        self.closed = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class MemoryStream:
    """One end of two pipes."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._woken = False

    def read_into(self, buffer: memoryview, deadline: Deadline) -> int:
        pipe = self._incoming
        with pipe.changed:
            if not pipe.changed.wait_for(lambda: self._woken or pipe.content or pipe.closed, deadline.remaining()):
                raise DeadlineExpired("nothing came from the peer in time")
            if self._woken:
                raise ChannelClosed(CLOSED_HERE)
            count = min(buffer.nbytes, len(pipe.content))
            buffer[:count] = pipe.content[:count]
            del pipe.content[:count]
            pipe.changed.notify_all()
            return count

    def write_all(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        for buffer in buffers:
            rest = buffer
            while rest:
                rest = rest[self._write_some(rest, deadline) :]

    def _write_some(self, buffer: memoryview, deadline: Deadline) -> int:
        pipe = self._outgoing
        with pipe.changed:
            room = pipe.changed.wait_for(
                lambda: self._woken or pipe.closed or len(pipe.content) < pipe.capacity_bytes, deadline.remaining()
            )
            if not room:
                raise DeadlineExpired("the peer took nothing more in time")
            if self._woken:
                raise ChannelClosed(CLOSED_HERE)
            if pipe.closed:
                raise BrokenPipeError(0, "it reads no more")
            count = min(buffer.nbytes, pipe.capacity_bytes - len(pipe.content))
            pipe.content += buffer[:count]
            pipe.changed.notify_all()
            return count

    def readable(self, timeout_s: float) -> bool:
        pipe = self._incoming
        with pipe.changed:
            return bool(pipe.changed.wait_for(lambda: self._woken or pipe.content or pipe.closed, timeout_s))

    def wake(self) -> None:
        self._woken = True
        for pipe in (self._incoming, self._outgoing):
            with pipe.changed:
                pipe.changed.notify_all()

    def abort(self) -> None:
        self.wake()
        self._incoming.close()
        self._outgoing.close()

    def close(self) -> None:
        self._incoming.close()
        self._outgoing.close()

    def last_words(self) -> str:
        return ""


def memory_pair(
    names: tuple[str, str] = ("left", "right"), *, capacity_bytes: int = CAPACITY_BYTES
) -> tuple[StreamChannel, StreamChannel]:
    """Two ends of one connection; the first one's peer has the second name."""
    there, back = _Pipe(capacity_bytes), _Pipe(capacity_bytes)
    left = StreamChannel(MemoryStream(back, there), Peer(name=names[1], transport="memory", detail="this process"))
    right = StreamChannel(MemoryStream(there, back), Peer(name=names[0], transport="memory", detail="this process"))
    return left, right
