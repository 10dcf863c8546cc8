"""The stdin and stdout of a command that an SSH server runs for us, as a byte stream over a paramiko channel."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import paramiko

from transport.api import ChannelClosed, Deadline, DeadlineExpired
from transport.local import Tail, describe_exit
from transport.streams import Waker, pieces, shut_down

WINDOW_BYTES = 16 * 1024 * 1024
"""What the server may send before we read: 1.3 Gbit/s at 100 ms, and the most memory that a slow reader costs."""

_PACKET_BYTES = 32768 - 64  # What paramiko sends in a packet when the server takes OpenSSH's 32 KiB.
_TICK_S = 0.05  # Longest that a sender sleeps on the window before it looks whether it was woken.
_EXIT_NEWS_S = 0.3  # The exit code comes after the end of the stream.
_JOIN_S = 2.0


@dataclass(frozen=True, kw_only=True)
class CompletedRemote:
    exit_code: int
    stdout: bytes
    stderr: bytes


class SshStream:
    """stdin and stdout of a command on the other side. Owns the transport."""

    def __init__(self, transport: paramiko.Transport, channel: paramiko.Channel, *, close_grace_s: float) -> None:
        self._transport = transport
        self._channel = channel
        self._close_grace_s = close_grace_s
        self._tail = Tail()
        self._tail_lock = threading.Lock()
        self._waker = Waker()
        self._cut = False
        # paramiko may close its socket at any moment, and the number be given to another file: ask and cut by our own.
        assert isinstance(transport.sock, socket.socket)
        self._socket = transport.sock.dup()
        # Non-blocking, because paramiko has one timeout for both directions; waiting is done here.
        channel.settimeout(0.0)
        self._arrival = _Arrival()
        channel.in_buffer.set_event(self._arrival)
        self._unread = memoryview(b"")

    def read_into(self, buffer: memoryview, deadline: Deadline) -> int:
        while not self._unread:
            self._waker.check()
            self._drain_stderr()
            try:
                # All there is: paramiko's buffer moves its rest to the front at each read.
                with _as_os_error():
                    data = self._channel.recv(WINDOW_BYTES)
            except TimeoutError:
                self._waker.wait(self._arrival.fileno(), select.POLLIN, deadline)
                continue
            if not data:
                return 0
            self._unread = memoryview(data)
        count = min(len(self._unread), buffer.nbytes)
        buffer[:count] = self._unread[:count]
        self._unread = self._unread[count:]
        return count

    def write_all(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        for packet in pieces(buffers, _PACKET_BYTES):
            rest = packet
            while rest:
                self._waker.check()
                self._drain_stderr()
                # paramiko's own wait for the network knows no deadline. When poll says so there is room for a packet.
                self._waker.wait(self._socket.fileno(), select.POLLOUT, deadline)
                try:
                    with _as_os_error():
                        count = self._channel.send(bytes(rest[:_PACKET_BYTES]))
                except TimeoutError:
                    self._wait_for_window(deadline)
                    continue
                # On a dead connection paramiko counts a packet as sent that it threw away; and when the command has
                # closed its end, OpenSSH takes what we send and throws it away.
                if not count or self._channel.eof_received or not self._transport.is_active():
                    raise BrokenPipeError(errno.EPIPE, "it reads no more")
                rest = rest[count:]

    def _wait_for_window(self, deadline: Deadline) -> None:
        remaining = deadline.remaining()
        with self._channel.out_buffer_cv:
            if not self._channel.out_window_size and not self._channel.closed:
                self._channel.out_buffer_cv.wait(_TICK_S if remaining is None else min(_TICK_S, remaining))
        if deadline.expired():
            raise DeadlineExpired("the peer took nothing more in time")

    def communicate(self, stdin: bytes, deadline: Deadline) -> CompletedRemote:
        """Write, read to the end, wait for the exit code."""
        # A command that does not want its stdin may end; its exit code says whether that was right.
        with contextlib.suppress(OSError):
            self.write_all([memoryview(stdin)], deadline)
        with contextlib.suppress(OSError), _as_os_error():
            self._channel.shutdown_write()
        stdout = bytearray()
        chunk = memoryview(bytearray(65536))
        while count := self.read_into(chunk, deadline):
            stdout += chunk[:count]
        if not self._channel.status_event.wait(deadline.remaining()):
            raise DeadlineExpired("the remote command closed its output but did not end in time")
        self._drain_stderr()
        if self._channel.exit_status < 0:
            raise ChannelClosed(
                f"the remote command ended without an exit code: {self._tail.text() or 'no reason given'}"
            )
        return CompletedRemote(
            exit_code=self._channel.exit_status, stdout=bytes(stdout), stderr=self._tail.text().encode()
        )

    def readable(self, timeout_s: float) -> bool:
        return bool(self._unread) or self._waker.ready(self._arrival.fileno(), select.POLLIN, timeout_s)

    def wake(self) -> None:
        self._waker.wake()

    def abort(self) -> None:
        self._cut = True
        self._waker.wake()
        shut_down(self._socket)

    def close(self) -> None:
        try:
            if not self._cut and self._transport.is_active():
                self._end_command()
        finally:
            close_transport(self._transport)
            self._socket.close()
            self._arrival.close()
            self._waker.close()

    def _end_command(self) -> None:
        """Let the command see the end of its input, and end. Closing the connection under it could lose what we sent
        last: the kernel resets a connection that is closed with something unread."""
        with cut_at(Deadline.after(self._close_grace_s), self._socket):
            with contextlib.suppress(OSError), _as_os_error():
                self._channel.shutdown_write()
            self._channel.status_event.wait(self._close_grace_s)

    def last_words(self) -> str:
        self._channel.status_event.wait(_EXIT_NEWS_S)
        self._drain_stderr()
        code = self._channel.exit_status
        return describe_exit(code if code >= 0 else None, self._tail.text())

    def _drain_stderr(self) -> None:
        if not self._channel.recv_stderr_ready():
            return
        with self._tail_lock, contextlib.suppress(OSError), _as_os_error():
            while data := self._channel.recv_stderr(WINDOW_BYTES):
                self._tail.add(data)


class _Arrival(threading.Event):
    """paramiko sets and clears this event as bytes come and go; poll sees that on a descriptor."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._fd >= 0:
                os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def cut_at(deadline: Deadline, sock: socket.socket) -> Iterator[None]:
    remaining_s = deadline.remaining()
    if remaining_s is None:
        yield
        return
    timer = threading.Timer(remaining_s, shut_down, [sock])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except (paramiko.SSHException, EOFError) as error:
        raise ConnectionResetError(errno.ECONNRESET, str(error) or "the SSH session ended") from error


def close_transport(transport: paramiko.Transport) -> None:
    transport.close()
    # A handshake that did not finish leaves its timer behind.
    transport.packetizer.complete_handshake()
    if transport.is_alive():
        transport.join(_JOIN_S)
