"""Byte streams under a channel: descriptors and sockets, non-blocking, with deadlines, and woken from other threads."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from transport.api import ChannelClosed, Deadline, DeadlineExpired

IOV_MAX = 1024
"""Buffers one writev takes (UIO_MAXIOV of the kernel)."""

CLOSED_HERE = "the channel was closed on this side"


class ByteStream(Protocol):
    """Bytes both ways. One thread may read while another writes; `wake` and `abort` are for any thread."""

    def read_into(self, buffer: memoryview, deadline: Deadline) -> int:
        """Put at least one byte at the start of `buffer`; returns how many, 0 at the end of the stream. Raises
        DeadlineExpired, ChannelClosed (woken), OSError or TransportError for a broken connection."""
        ...

    def write_all(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        """Write all of it. Raises like `read_into`; then it is unknown how much was written."""
        ...

    def readable(self, timeout_s: float) -> bool:
        """Whether `read_into` has something to do within that time: bytes, the end, or the news that it was woken."""
        ...

    def wake(self) -> None:
        """For good: calls that wait, now or later, raise ChannelClosed. Fit for signal handlers."""
        ...

    def abort(self) -> None:
        """`wake`, and cut the connection as far as that is possible without closing a descriptor in use."""
        ...

    def close(self) -> None:
        """Called once, after `wake`, when no call is under way: end in good order and release everything."""
        ...

    def last_words(self) -> str:
        """What is known about why the other end went away; "" when nothing is."""
        ...


class Waker:
    """Waits until a descriptor is ready, a deadline passes, or someone wakes it for good."""

    def __init__(self) -> None:
        # Re-entrant because a signal handler may call `wake` while the same thread holds it.
        self._lock = threading.RLock()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.woken = False

    def wake(self) -> None:
        with self._lock:
            self.woken = True
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def close(self) -> None:
        with self._lock:
            self.woken = True
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)

    def check(self) -> None:
        if self.woken:
            raise ChannelClosed(CLOSED_HERE)

    def wait(self, fd: int, events: int, deadline: Deadline) -> None:
        """Return when `fd` has one of the poll `events` (or is broken); raise DeadlineExpired or ChannelClosed."""
        if not self.ready(fd, events, deadline.remaining()):
            raise DeadlineExpired(
                "the peer took nothing more in time"
                if events & select.POLLOUT
                else "nothing came from the peer in time"
            )
        self.check()

    def ready(self, fd: int, events: int, timeout_s: float | None) -> bool:
        """Whether `fd` got ready, or someone woke this, before the timeout."""
        if self.woken:
            return True
        poll = select.poll()
        poll.register(fd, events)
        poll.register(self._event, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


class FdStream:
    """Two descriptors, or twice the same. Owns them and makes them non-blocking."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._waker = Waker()
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    @property
    def descriptors(self) -> tuple[int, int]:
        return self._read_fd, self._write_fd

    def read_into(self, buffer: memoryview, deadline: Deadline) -> int:
        while True:
            self._waker.check()
            try:
                return os.readv(self._read_fd, [buffer])
            except BlockingIOError:
                self._waker.wait(self._read_fd, select.POLLIN, deadline)

    def write_all(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        pending = list(buffers)
        first = 0
        while first < len(pending):
            self._waker.check()
            try:
                count = os.writev(self._write_fd, pending[first : first + IOV_MAX])
            except BlockingIOError:
                self._waker.wait(self._write_fd, select.POLLOUT, deadline)
                continue
            first = _skip(pending, first, count)

    def readable(self, timeout_s: float) -> bool:
        return self._waker.ready(self._read_fd, select.POLLIN, timeout_s)

    def wake(self) -> None:
        self._waker.wake()

    def abort(self) -> None:
        self._waker.wake()

    def close(self) -> None:
        for fd in {self._read_fd, self._write_fd}:
            os.close(fd)
        self._waker.close()

    def last_words(self) -> str:
        return ""


class SocketStream(FdStream):
    """A connected stream socket, taken over."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock.fileno(), sock.fileno())
        self._socket = sock

    def abort(self) -> None:
        self._waker.wake()
        shut_down(self._socket)

    def close(self) -> None:
        self._socket.close()
        self._waker.close()


def shut_down(sock: socket.socket) -> None:
    """Cut a connection so that both ends notice; a socket that is no longer connected, or closed, is fine."""
    try:
        # Not sock.shutdown: an SSLSocket would forget its TLS state there while another thread uses it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.EBADF):
            raise


def pieces(buffers: Sequence[memoryview], unit_bytes: int) -> Iterator[memoryview]:
    """The same bytes for a stream that pays per unit (a TLS record, an SSH packet): buffers shorter than a unit are
    joined up to one, longer ones stay as they are."""
    small = bytearray()
    for buffer in buffers:
        taken = 0
        if small or buffer.nbytes < unit_bytes:
            taken = min(buffer.nbytes, unit_bytes - len(small))
            small += buffer[:taken]
            if len(small) == unit_bytes:
                yield memoryview(small)
                small = bytearray()
        if taken < buffer.nbytes:
            yield buffer[taken:]
    if small:
        yield memoryview(small)


def _skip(buffers: list[memoryview], first: int, count: int) -> int:
    """Take `count` written bytes off `buffers` from index `first` on; returns the index of what is left."""
    while first < len(buffers) and count >= buffers[first].nbytes:
        count -= buffers[first].nbytes
        first += 1
    if count:
        buffers[first] = buffers[first][count:]
    return first
