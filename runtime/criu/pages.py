"""A page server: takes the pages of a dump from CRIU over a socketpair and hands them to a consumer.

CRIU gets one end as ``opts.ps.fd`` and then writes no pages-*.img and no pagemap-*.img. The other end is served by a
thread while the caller answers CRIU's notifications.

Whatever fails on our side makes the dump fail: the stream is cut, CRIU finds it broken or reads a refusal where it asks
for the verdict, and lets its tasks run on. (It ignores SIGPIPE: seen with 4.1.1 and 4.2.1, cut in mid-dump.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy

from runtime.criu.page_protocol import (
    PAGE_BYTES,
    PE_PARENT,
    PE_PRESENT,
    Command,
    CommandKind,
    PageProtocol,
    SpaceId,
    refusal,
    zero_pages_may_be_left_out,
)
from runtime.errors import CriuFailed

__all__ = [
    "PageConsumer",
    "PageServer",
    "PageStreamEnded",
    "PageTotals",
    "RunReader",
    "SpaceId",
    "nonzero_runs",
    "page_socketpair",
    "zero_pages_may_be_left_out",
]

SOCKET_BUFFER_BYTES = 4 << 20
# fs.pipe-max-size without CAP_SYS_RESOURCE, unless an administrator changed it.
PIPE_BYTES = 1 << 20
# asm-generic/socket.h: beyond net.core.wmem_max, for CAP_NET_ADMIN.
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33


class PageStreamEnded(CriuFailed):
    """CRIU closed the stream before it was complete. Why, CRIU's own response and log say."""


@dataclass(frozen=True, kw_only=True)
class PageTotals:
    """What one dump sent."""

    spaces: int = 0
    runs: int = 0
    pages: int = 0

    @property
    def bytes(self) -> int:
        return self.pages * PAGE_BYTES


class PageConsumer(Protocol):
    """Where pages go. An exception of either method makes CRIU's dump fail, and comes out of ``serve``."""

    def open(self, space: SpaceId) -> None:
        """The runs that follow belong to ``space``."""
        ...

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        """``pages`` pages from ``address`` on (for shared memory: from that offset on), in ascending order in a space.

        Their bytes are in ``source``; what is not taken out of it before this returns is thrown away.
        """
        ...


class RunReader:
    """The bytes of one run, in order. Nothing of it may be used after the consumer's ``run`` has returned."""

    __slots__ = ("_stream", "remaining_bytes")

    def __init__(self, stream: _Stream, size_bytes: int) -> None:
        self._stream = stream
        self.remaining_bytes = size_bytes

    def read_into(self, view: memoryview) -> None:
        """Fill ``view``, which must not be longer than what remains."""
        self._stream.read_into(view[: self._take(view.nbytes)])

    def splice_to(self, fd: int, size_bytes: int | None = None) -> None:
        """Move bytes (all that remain) to a file or pipe without a copy through this process."""
        self._stream.splice_to(fd, self._take(size_bytes))

    def discard(self, size_bytes: int | None = None) -> None:
        """Throw bytes (all that remain) away without reading them."""
        self._stream.discard(self._take(size_bytes))

    def _take(self, size_bytes: int | None) -> int:
        size = self.remaining_bytes if size_bytes is None else size_bytes
        if not 0 <= size <= self.remaining_bytes:
            raise ValueError(f"{size} bytes asked for, {self.remaining_bytes} left in this run")
        self.remaining_bytes -= size
        return size


class PageServer:
    """Serves one dump on ``sock``, our end of ``page_socketpair``. It does not close it."""

    def __init__(self, sock: socket.socket, criu_version: tuple[int, int, int], consumer: PageConsumer) -> None:
        self._sock = sock
        self._protocol = PageProtocol(criu_version)
        self._consumer = consumer
        self._cancelled = False
        self._space: SpaceId | None = None
        self._spaces = self._runs = self._pages = 0

    def cancel(self) -> None:
        """From any thread, at any time: make CRIU fail the dump, and ``serve`` raise CriuFailed."""
        self._cancelled = True
        self._cut()

    def serve(self, *, idle_timeout_s: float | None = None) -> PageTotals:
        """Until CRIU has sent everything and was told that all is well. Whether its dump succeeded, its response tells.

        Raises what the consumer raised, CriuFailed, PageStreamEnded or UnknownPageCommand; CRIU's dump has failed
        then, or fails now, and its tasks run on. ``idle_timeout_s`` bounds each silence of CRIU.
        """
        try:
            with _Stream(self._sock, idle_timeout_s) as stream:
                self._obey_until_close(stream)
        except BaseException as error:
            self._refuse()
            if self._cancelled and isinstance(error, PageStreamEnded):
                raise CriuFailed("the dump was called off") from None
            raise
        return PageTotals(spaces=self._spaces, runs=self._runs, pages=self._pages)

    def _obey_until_close(self, stream: _Stream) -> None:
        header = memoryview(bytearray(self._protocol.header_bytes))
        while True:
            stream.read_into(header)
            command = self._protocol.parse(header)
            if command.kind is CommandKind.RUN:
                self._run(command, stream)
                continue
            if command.kind is CommandKind.OPEN and command.space is not None:
                self._open(command.space)
            stream.send(self._protocol.answer(command))
            if command.kind is CommandKind.CLOSE:
                return

    def _open(self, space: SpaceId) -> None:
        self._space = space
        self._spaces += 1
        self._consumer.open(space)

    def _run(self, command: Command, stream: _Stream) -> None:
        _kind, space, address, pages, flags, _wants_answer = command
        assert space is not None
        if space != self._space:
            self._open(space)
        if flags & PE_PARENT or not flags & PE_PRESENT:
            raise CriuFailed(
                f"CRIU sent {pages} pages at {address:#x} of {space} without their content",
                hint="the dump must ask for neither lazy pages nor a parent image",
            )
        reader = RunReader(stream, command.data_bytes)
        self._consumer.run(space, address, pages, flags, reader)
        if reader.remaining_bytes:
            reader.discard()
        self._runs += 1
        self._pages += pages

    def _refuse(self) -> None:
        with contextlib.suppress(OSError):
            # Never waits: CRIU may be in the middle of a write, and then does not read.
            self._sock.send(refusal(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        self._cut()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class _Stream:
    """Exact reads from a blocking socket, and splices through a pipe of its own. Of no use after a failure."""

    def __init__(self, sock: socket.socket, idle_timeout_s: float | None) -> None:
        self._sock = sock
        self._idle_timeout_s = idle_timeout_s
        self._pipe: tuple[int, int] | None = None
        self._null = -1
        sock.setblocking(True)
        # Not settimeout(): that makes the socket non-blocking, and each long read many short ones. 0 is for ever.
        timeout_us = int((idle_timeout_s or 0.0) * 1e6)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", *divmod(timeout_us, 1_000_000)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (*(self._pipe or ()), self._null):
            if fd >= 0:
                os.close(fd)

    def send(self, data: bytes) -> None:
        if data:
            try:
                self._sock.sendall(data, socket.MSG_NOSIGNAL)
            except OSError as error:
                raise self._broken(error) from error

    def read_into(self, view: memoryview) -> None:
        while len(view):
            try:
                got = self._sock.recv_into(view, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise self._broken(error) from error
            if not got:
                raise self._broken()
            view = view[got:]

    def splice_to(self, fd: int, size_bytes: int) -> None:
        """Through our pipe, because a splice needs one at one end. An OSError is that of ``fd``."""
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_CLOEXEC)
            # Smaller is slower, nothing else.
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        reader, writer = self._pipe
        while size_bytes:
            try:
                moved = os.splice(self._sock.fileno(), writer, min(size_bytes, PIPE_BYTES))
            except OSError as error:
                raise self._broken(error) from error
            if not moved:
                raise self._broken()
            size_bytes -= moved
            while moved:
                moved -= os.splice(reader, fd, moved)

    def discard(self, size_bytes: int) -> None:
        if self._null < 0:
            self._null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        self.splice_to(self._null, size_bytes)

    def _broken(self, error: OSError | None = None) -> PageStreamEnded:
        if error is None or isinstance(error, (BrokenPipeError, ConnectionResetError)):
            what = "CRIU closed the page stream before its end"
        elif isinstance(error, BlockingIOError):
            what = f"CRIU sent no pages for {self._idle_timeout_s:g} s"
        else:
            what = f"lost the page stream of CRIU: {error.strerror}"
        return PageStreamEnded(what, hint="CRIU's log says why")


def page_socketpair() -> tuple[socket.socket, socket.socket]:
    """(ours, CRIU's): a stream socketpair with buffers as large as permitted, so that CRIU seldom waits for us."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for sock in (ours, theirs):
        for forced, polite in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER_BYTES)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, polite, SOCKET_BUFFER_BYTES)
    return ours, theirs


def nonzero_runs(buffer: bytes | bytearray | memoryview) -> list[tuple[int, int]]:
    """(first page, pages) of every stretch of pages that are not all zero. ``buffer`` is whole pages.

    Only for runs of which ``zero_pages_may_be_left_out`` is true.
    """
    words = numpy.frombuffer(buffer, dtype=numpy.uint64).reshape(-1, PAGE_BYTES // 8)
    # Pages seldom begin with zeros, so the first words settle most of them; the rest is looked at whole.
    filled = words[:, 0] != 0
    doubtful = numpy.flatnonzero(~filled)
    if len(doubtful):
        filled[doubtful] = words[doubtful].any(axis=1)
    edges = numpy.flatnonzero(numpy.diff(filled.astype(numpy.int8), prepend=0, append=0))
    return [(int(first), int(end - first)) for first, end in edges.reshape(-1, 2)]
