"""The one blocking channel there is: frames over any byte stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transport.api import (
    Buffer,
    ChannelClosed,
    Deadline,
    DeadlineExpired,
    Frame,
    FrameKind,
    Into,
    Peer,
    ProtocolError,
)
from transport.closing import Closing
from transport.frames import Decoder, encode_header
from transport.streams import CLOSED_HERE, ByteStream


class StreamChannel(Closing):
    """A Channel (see transport.api for the contract) over `stream`, which it owns."""

    def __init__(self, stream: ByteStream, peer: Peer) -> None:
        self.stream = stream
        self._peer = peer
        self._decoder = Decoder()
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._ended = False
        self._closed = False
        self._send_failure = ""
        self._receive_failure: ProtocolError | None = None
        self._bytes_sent = 0
        self._bytes_received = 0

    @property
    def peer(self) -> Peer:
        return self._peer

    @property
    def bytes_sent(self) -> int:
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._bytes_received

    def send(self, frame: Frame, *, deadline: Deadline) -> None:
        self._send(frame.kind, frame.tag, [frame.body], deadline)

    def send_data(self, tag: int, buffers: Sequence[Buffer], *, deadline: Deadline) -> None:
        self._send(FrameKind.DATA, tag, buffers, deadline)

    def receive(self, *, deadline: Deadline, into: Into | None = None) -> Frame:
        with self._turn(self._receive_lock, deadline):
            while True:
                if self._receive_failure is not None:
                    raise ProtocolError(self._receive_failure.what, hint=self._receive_failure.hint)
                count = self._read(self._decoder.want(into), deadline)
                try:
                    frame = self._decoder.got(count)
                except ProtocolError as error:
                    self._receive_failure = error
                    continue
                if frame is not None:
                    return frame

    def readable(self, timeout_s: float) -> bool:
        return self._closed or self.stream.readable(timeout_s)

    @property
    def between_frames(self) -> bool:
        """Nothing of a frame that is not whole has been read."""
        return not self._decoder.position

    def abort(self) -> None:
        self._ended = True
        self.stream.abort()

    def close(self) -> None:
        self._ended = True
        self.stream.wake()
        with self._close_lock, self._send_lock, self._receive_lock:
            if not self._closed:
                self._closed = True
                self.stream.close()

    def _send(self, kind: FrameKind, tag: int, buffers: Sequence[Buffer], deadline: Deadline) -> None:
        views = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view.nbytes]
        header = encode_header(kind, tag, sum(view.nbytes for view in views))
        with self._turn(self._send_lock, deadline):
            if self._send_failure:
                raise ChannelClosed(self._send_failure)
            # Set before and cleared after: not even a KeyboardInterrupt leaves half a frame behind unnoticed.
            self._send_failure = "an earlier frame could not be sent whole, so nothing can follow it"
            try:
                self.stream.write_all([memoryview(header), *views], deadline)
            except OSError as error:
                raise self._gone(error.strerror or str(error)) from error
            self._send_failure = ""
            self._bytes_sent += len(header) + sum(view.nbytes for view in views)

    def _read(self, target: memoryview, deadline: Deadline) -> int:
        try:
            count = self.stream.read_into(target, deadline)
        except OSError as error:
            raise self._gone(error.strerror or str(error)) from error
        if count == 0:
            raise self._gone()
        self._bytes_received += count
        return count

    def _gone(self, reason: str = "") -> ChannelClosed:
        if self._ended:
            return ChannelClosed(CLOSED_HERE)
        what = " ".join(filter(None, (f"{self._peer.name} closed the connection", self._decoder.position)))
        return ChannelClosed(": ".join(filter(None, (what, reason, self.stream.last_words()))))

    @contextmanager
    def _turn(self, lock: threading.Lock, deadline: Deadline) -> Iterator[None]:
        remaining = deadline.remaining()
        if not lock.acquire(timeout=-1 if remaining is None else remaining):
            raise DeadlineExpired("another call on this channel took until the deadline")
        try:
            if self._closed:
                raise ChannelClosed(CLOSED_HERE)
            yield
        finally:
            lock.release()
