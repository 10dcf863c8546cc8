"""What a channel that goes over another one has in common with every other such channel."""

from __future__ import annotations

from collections.abc import Sequence

from transport.api import Buffer, Channel, Deadline, Frame, Into, Peer
from transport.closing import Closing


class DelegatingChannel(Closing):
    """Passes everything on to `inner`, which it owns. A subclass says what it does otherwise."""

    def __init__(self, inner: Channel) -> None:
        self._inner = inner

    @property
    def peer(self) -> Peer:
        return self._inner.peer

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._inner.bytes_received

    def send(self, frame: Frame, *, deadline: Deadline) -> None:
        self._inner.send(frame, deadline=deadline)

    def send_data(self, tag: int, buffers: Sequence[Buffer], *, deadline: Deadline) -> None:
        self._inner.send_data(tag, buffers, deadline=deadline)

    def receive(self, *, deadline: Deadline, into: Into | None = None) -> Frame:
        return self._inner.receive(deadline=deadline, into=into)

    def readable(self, timeout_s: float) -> bool:
        return self._inner.readable(timeout_s)

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()
