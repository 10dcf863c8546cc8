"""Client of ``criu swrk``: one process, one request, notifications in between.

pycriu's own RPC class can not handle notifications, so only its generated messages are used.
The socket is SOCK_SEQPACKET: one datagram, one message (criu/cr-service.c, documented in CRIU's rpc.proto).
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from pycriu import rpc_pb2 as rpc

from runtime.criu.binary import CriuBinary
from runtime.errors import CriuFailed
from runtime.linux.seqpacket import receive

MAX_MESSAGE_BYTES = 1 << 20
# Every function is looked up when CRIU starts, and not in the blackout when it is called first.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LD_BIND_NOW": "1"}


class CriuSession:
    """A conversation with one ``criu swrk``. ``notify`` answers come from the caller, in their own time.

    Use ``run`` with a handler, or ``send``/``next_event``/``acknowledge`` to hold a notification.
    """

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self._sock = sock
        self._process = process
        self.timeline: list[tuple[str, float]] = []
        """(name of notification, time.monotonic() when it came)"""

    @classmethod
    def spawn(
        cls,
        binary: CriuBinary,
        *,
        pass_fds: Sequence[int] = (),
        environment: dict[str, str] | None = None,
        output: int = subprocess.DEVNULL,
    ) -> CriuSession:
        """Start ``criu swrk`` as a child; ``pass_fds`` keep their numbers in it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process = subprocess.Popen(
                [*binary.argv, "swrk", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(), *pass_fds),
                env={**ENVIRONMENT, **(environment or {})},
                start_new_session=True,
                cwd="/",
            )
        finally:
            theirs.close()
        return cls(ours, process)

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def send(self, request: Any) -> None:
        self._sock.send(request.SerializeToString())

    def next_event(self, timeout_s: float | None = None) -> Any:
        """The next response or notification. Raises CriuFailed when CRIU is gone or silent for too long."""
        self._sock.settimeout(timeout_s)
        try:
            data, _descriptors = receive(self._sock, MAX_MESSAGE_BYTES)
        except TimeoutError:
            raise CriuFailed(f"CRIU did not answer within {timeout_s:.0f} s") from None
        except OSError as error:
            raise CriuFailed(f"lost the connection to CRIU: {error.strerror}") from error
        if not data:
            raise CriuFailed("CRIU ended without an answer", hint="was it killed? see dmesg for out-of-memory kills")
        response = rpc.criu_resp()
        response.ParseFromString(data)
        if response.type == rpc.NOTIFY:
            self.timeline.append((response.notify.script, time.monotonic()))
        return response

    def acknowledge(self, success: bool = True) -> None:
        """Answer the pending notification; False makes CRIU fail the operation there. CriuFailed: it is gone."""
        request = rpc.criu_req(type=rpc.NOTIFY, notify_success=success)
        try:
            self._sock.send(request.SerializeToString())
        except OSError as error:
            raise CriuFailed(f"lost the connection to CRIU: {error.strerror}") from error

    def run(self, request: Any, handlers: dict[str, Callable[[int], None]], timeout_s: float | None = None) -> Any:
        """Send ``request`` and answer notifications (``handlers[name](pid)``, then success) until the response.

        An exception in a handler refuses the notification and is raised again after CRIU's response.
        """
        self.send(request)
        failure: BaseException | None = None
        while True:
            event = self.next_event(timeout_s)
            if event.type != rpc.NOTIFY:
                if failure is not None:
                    raise failure
                return event
            try:
                if failure is None and event.notify.script in handlers:
                    handlers[event.notify.script](event.notify.pid)
            except BaseException as error:
                failure = error
            self.acknowledge(failure is None)

    def close(self) -> None:
        self._sock.close()
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.kill(self._process.pid, 9)
                self._process.wait()

    def __enter__(self) -> CriuSession:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
