"""Channels to programs on this host: a child on a socketpair, and the child's own end of it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from transport.api import Channel, ConnectFailed, Peer
from transport.channel import StreamChannel
from transport.streams import FdStream, SocketStream

CLOSE_GRACE_S = 5.0
"""How long a child whose channel was closed may take to end by itself."""

TAIL_BYTES = 4096
"""As much of a program's stderr is kept for error messages."""

_EXIT_NEWS_S = 0.3  # An end of stream and the exit of the program come at almost, not exactly, the same time.
_FRESH_ENVIRONMENT = ("PATH", "HOME", "LANG")


class Tail:
    """The end of a program's stderr."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._lock = threading.Lock()

    def add(self, data: bytes) -> None:
        with self._lock:
            self._bytes += data
            del self._bytes[:-TAIL_BYTES]

    def text(self) -> str:
        with self._lock:
            return self._bytes.decode(errors="replace").strip()


def describe_exit(code: int | None, tail: str) -> str:
    """One line about a program that went away; `code` is None when it has not ended or nobody knows."""
    parts = []
    if code is not None:
        parts.append(f"killed by signal {-code}" if code < 0 else f"exit code {code}")
    if tail:
        parts.append(f"its stderr ends: {tail}")
    return ", ".join(parts)


class ChildStream(SocketStream):
    """The parent's end of a child's stdin and stdout. Owns the child."""

    def __init__(self, sock: socket.socket, child: subprocess.Popen[bytes], close_grace_s: float) -> None:
        super().__init__(sock)
        self._child = child
        self._close_grace_s = close_grace_s
        self._tail = Tail()
        self._drain = threading.Thread(target=self._read_stderr, name=f"stderr-{child.pid}", daemon=True)
        self._drain.start()

    def _read_stderr(self) -> None:
        assert self._child.stderr is not None
        with contextlib.suppress(OSError, ValueError), self._child.stderr as stderr:
            while data := os.read(stderr.fileno(), 65536):
                self._tail.add(data)

    def last_words(self) -> str:
        # The end of stderr is the end of the child, unless it has children of its own.
        self._drain.join(_EXIT_NEWS_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(0 if self._drain.is_alive() else _EXIT_NEWS_S)
        return describe_exit(self._child.poll(), self._tail.text())

    def close(self) -> None:
        super().close()
        try:
            self._child.wait(self._close_grace_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        # A grandchild may hold the pipe; the thread is a daemon and ends with it.
        self._drain.join(_EXIT_NEWS_S)


def spawn(
    argv: Sequence[str],
    *,
    name: str = "local",
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    pass_fds: Sequence[int] = (),
    close_grace_s: float = CLOSE_GRACE_S,
) -> Channel:
    """Start a program that speaks the protocol on its stdin and stdout. Without `environment` it gets PATH, HOME and
    LANG of this process and nothing else. Raises ConnectFailed when it cannot be started. `close` lets it end by itself
    for `close_grace_s`, then kills it; what it wrote to stderr last is in the ChannelClosed that its end causes."""
    if environment is None:
        environment = {key: os.environ[key] for key in _FRESH_ENVIRONMENT if key in os.environ}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        child = subprocess.Popen(
            argv,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
            env=environment,
            cwd=directory,
            pass_fds=pass_fds,
        )
    except OSError as error:
        ours.close()
        raise ConnectFailed(f"cannot start {argv[0]}: {error.strerror}") from error
    finally:
        theirs.close()
    return StreamChannel(
        ChildStream(ours, child, close_grace_s),
        Peer(name=name, transport="local", detail=f"pid {child.pid}: {' '.join(argv)}"),
    )


def from_stdio(peer: Peer | None = None) -> Channel:
    """The channel to whoever started this program with its stdin and stdout as the connection. From now on descriptor 0
    is /dev/null and descriptor 1 is stderr, so that a stray print cannot damage the protocol. Call it once.

    Under OpenSSH the peer sees the end of the channel when this program ends, not at `close`: the server waits for
    stderr as well."""
    read_fd = os.dup(0)
    write_fd = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    if peer is None:
        peer = Peer(name="caller", transport="local", detail="stdin and stdout")
    return StreamChannel(FdStream(read_fd, write_fd), peer)
