"""Probes that do not wait for an answer before they ask again: a connection each time, or a datagram.

What probe.py says of windows and signals is true here as well. A datagram without an answer is ``failed`` (lost); a
connection that was refused is a reset, one that nobody took within the time an answer may take has failed.
"""

from __future__ import annotations

import errno
import gc
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from migrate.probe_window import NS_PER_MS, Window

# A connection costs both sides more than a question on a kept one.
CONNECT_INTERVAL_MS = 5.0
ANSWER_TIMEOUT_S = 30.0
LAST_ANSWER_S = 1.0
MAX_PENDING = 4096
Tell = Callable[[dict[str, Any]], None]


class _Scatter:
    """Asks at every interval; subclasses know how to ask and what an answer is."""

    def __init__(self, address: tuple[str, int], *, interval_ms: float) -> None:
        self._family, self._address = _resolve(address, self.KIND)
        self._interval_ns = int(interval_ms * NS_PER_MS)
        self._poll = select.poll()
        self.mark = False
        self.end = False
        self.announce = False
        self._begin()

    KIND = socket.SOCK_STREAM

    def _begin(self) -> None:
        now_ns = time.monotonic_ns()
        self._window = Window(begin_ns=now_ns, last_answer_ns=now_ns)
        self._total = Window(begin_ns=now_ns, last_answer_ns=now_ns)

    def run(self, duration_s: float | None, tell: Tell) -> None:
        """Until told to end. Raises OSError when nothing at all could be asked."""
        gc.disable()
        self._open()
        if self.announce:
            tell({"type": "connected"})
        self._begin()
        due_ns = begin_ns = time.monotonic_ns()
        end_ns = None if duration_s is None else begin_ns + int(duration_s * 1e9)
        while not self.end and (end_ns is None or due_ns < end_ns):
            self._hear_until(due_ns)
            late_ns = time.monotonic_ns() - due_ns
            for window in (self._window, self._total):
                window.probe_late_ns = max(window.probe_late_ns, late_ns)
            self._ask()
            self._count("requests")
            due_ns = max(due_ns + self._interval_ns, time.monotonic_ns() - self._interval_ns)
            self._close_window(tell)
        last_ns = time.monotonic_ns() + int(LAST_ANSWER_S * 1e9)
        while self._pending and (now_ns := time.monotonic_ns()) < last_ns:
            self._hear_until(min(last_ns, now_ns + 10 * NS_PER_MS))
        self._count("failed", self._pending)
        tell(self._total.to_json("total", self._total.last_answer_ns if not self._pending else last_ns, 0))
        self.close()

    def _close_window(self, tell: Tell) -> None:
        # Never in the middle of a gap.
        now_ns = time.monotonic_ns()
        if self.mark and now_ns - self._window.last_answer_ns < 3 * self._interval_ns:
            self.mark = False
            tell(self._window.to_json("window", now_ns, 0))
            self._window = Window(begin_ns=now_ns, last_answer_ns=self._window.last_answer_ns)

    def _hear_until(self, due_ns: int) -> None:
        while (left_ns := due_ns - time.monotonic_ns()) > 0:
            if left_ns < NS_PER_MS:
                # poll() knows milliseconds only.
                time.sleep(left_ns / 1e9)
                left_ns = 0
            for fd, _event in self._poll.poll(left_ns // NS_PER_MS):
                self._hear(fd)
        for fd, _event in self._poll.poll(0):
            self._hear(fd)

    def _answered(self, asked_ns: int) -> None:
        now_ns = time.monotonic_ns()
        for window in (self._window, self._total):
            window.answered(now_ns, asked_ns)

    def _count(self, name: str, amount: int = 1) -> None:
        for window in (self._window, self._total):
            setattr(window, name, getattr(window, name) + amount)

    @property
    def _pending(self) -> int:
        raise NotImplementedError

    def _open(self) -> None:
        raise NotImplementedError

    def _ask(self) -> None:
        raise NotImplementedError

    def _hear(self, fd: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class DatagramProbe(_Scatter):
    """The same text to one UDP service each time; answers are not told apart, only counted."""

    KIND = socket.SOCK_DGRAM

    def __init__(self, address: tuple[str, int], text: bytes, *, interval_ms: float = 1.0) -> None:
        super().__init__(address, interval_ms=interval_ms)
        self._text = text
        self._asked: deque[int] = deque(maxlen=1 << 20)
        self._socket: socket.socket | None = None

    @property
    def _pending(self) -> int:
        return len(self._asked)

    def _open(self) -> None:
        self._socket = socket.socket(self._family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.connect(self._address)
        self._poll.register(self._socket, select.POLLIN)

    def _ask(self) -> None:
        assert self._socket is not None
        try:
            self._socket.send(self._text)
            self._asked.append(time.monotonic_ns())
        except OSError:
            # Also what an earlier one came back with: nobody listens there.
            self._count("failed")

    def _hear(self, _fd: int) -> None:
        assert self._socket is not None
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                self._count("resets")
                return
            if self._asked:
                self._answered(self._asked.popleft())

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class ConnectProbe(_Scatter):
    """A new TCP connection each time, closed as soon as it stands."""

    def __init__(self, address: tuple[str, int], *, interval_ms: float = CONNECT_INTERVAL_MS) -> None:
        super().__init__(address, interval_ms=interval_ms)
        self._waiting: dict[int, tuple[socket.socket, int]] = {}

    @property
    def _pending(self) -> int:
        return len(self._waiting)

    def _open(self) -> None:
        with socket.create_connection(self._address[:2], 5.0):
            pass

    def _ask(self) -> None:
        self._give_up_on_old()
        if len(self._waiting) >= MAX_PENDING:
            self._count("failed")
            return
        connection = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # Closed by a reset: thousands of connections in TIME_WAIT would use up the ports of this host.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        asked_ns = time.monotonic_ns()
        error = connection.connect_ex(self._address)
        if error not in (0, errno.EINPROGRESS):
            connection.close()
            self._count("failed")
            return
        self._waiting[connection.fileno()] = connection, asked_ns
        self._poll.register(connection, select.POLLOUT)

    def _give_up_on_old(self) -> None:
        limit_ns = time.monotonic_ns() - int(ANSWER_TIMEOUT_S * 1e9)
        for fd in [fd for fd, (_connection, asked_ns) in self._waiting.items() if asked_ns < limit_ns]:
            self._forget(fd)
            self._count("failed")

    def _hear(self, fd: int) -> None:
        connection, asked_ns = self._waiting[fd]
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._forget(fd)
        if not error:
            self._answered(asked_ns)
            return
        self._count("failed")
        if error in (errno.ECONNREFUSED, errno.ECONNRESET):
            self._count("resets")

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._waiting.pop(fd)[0].close()

    def close(self) -> None:
        for fd in list(self._waiting):
            self._forget(fd)


def _resolve(address: tuple[str, int], kind: int) -> tuple[int, Any]:
    """Family and the kernel's form of an address: asked once, not in the middle of a measurement."""
    family, _kind, _protocol, _name, where = socket.getaddrinfo(*address, type=kind)[0]
    return family, where
