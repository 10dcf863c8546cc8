"""A reservation outlives its link: the session that holds it waits for the source to come back on another one.

What a target has of a move before the freeze (stores, upper layer, a sandbox, CRIU) lives in the session's process. So
that process stays, and a new one, which the source's new connection started, hands the connection over to it, on a
unix socket in the run directory. From the freeze on nobody listens there, but for post-copy after the switch, as long
as memory is missing (postcopy_target.py).
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from migrate.errors import MoveRefused
from migrate.messages import Resumed
from transport.api import Channel, ChannelClosed, Deadline, Frame, ProtocolError, TransportError
from transport.handing import receive_note, send_note, standing_of, taken_over
from transport.renewable import RenewableChannel

T = TypeVar("T")

# Each side notices a dead link in its own time, and the source begins to count later than this side may.
NOTICE_S = 30.0
MOST_HOLD_S = 3600.0
VISIT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """Another process at the door, with the source's new connection."""

    door: socket.socket
    note: Mapping[str, Any]
    descriptors: Sequence[int] = field(default_factory=tuple)

    def close(self) -> None:
        self.door.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


class WaitingRoom:
    """Of one move into this host. ``open`` before the source is told of it, ``close`` when it freezes, or at the end.

    ``peer`` is who may come back: the name that the first connection was known by.
    """

    def __init__(
        self,
        run_dir: Path,
        move_id: str,
        channel: Channel,
        *,
        reconnect_s: float,
        output: Sequence[int] = (1, 2),
        notice_s: float = NOTICE_S,
    ) -> None:
        """``output``: descriptors that become what a later connection brings as its stderr."""
        self._path = door_of(run_dir, move_id)
        self._move_id = move_id
        self._channel = channel if isinstance(channel, RenewableChannel) else RenewableChannel(channel)
        self.resumes = isinstance(channel, RenewableChannel) and reconnect_s > 0
        """Whether there is such a room at all: the source has asked for it."""
        self._peer = channel.peer.name
        self._output = output
        self._hold_s = min(reconnect_s, MOST_HOLD_S) + notice_s
        self._listener: socket.socket | None = None
        self._visits: queue.SimpleQueue[_Visit] = queue.SimpleQueue()
        self._told_to_leave = ""
        self._waits = False
        self._at_door = threading.Lock()

    def open(self) -> None:
        """Again after ``close``, too; nothing happens when it is open. Raises OSError."""
        with self._at_door:
            if self.resumes and self._listener is None:
                self._open()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with _short(self._path) as path:
                listener.bind(path)
            listener.listen(8)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        threading.Thread(target=self._listen, args=(listener,), name="waiting-room", daemon=True).start()

    def close(self) -> None:
        """Nobody can come back any more, and who waits for that stops. Takes no time, and may be called again."""
        with self._at_door:
            listener, self._listener = self._listener, None
            if listener is None:
                return
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(queue.Empty):
            while True:
                self._visits.get_nowait().close()

    def through(self, work: Callable[[], T], taken: Callable[[], int]) -> T:
        """What ``work`` returns, which is begun again on each new link once the source has been told what is here.

        Raises what ``work`` does; of a broken link only when nobody has come back in time, or somebody said that nobody
        will: then MoveRefused.
        """
        return self.hold(work, lambda: [Resumed(move_id=self._move_id, taken=taken()).to_message()])

    def hold(
        self,
        work: Callable[[], T],
        welcome: Callable[[], Iterable[Mapping[str, Any]]],
        speaking: contextlib.AbstractContextManager[Any] | None = None,
    ) -> T:
        """The same, where ``welcome`` is all that the source is told first on a new link. Whoever else sends on the
        channel does so within ``speaking``, which is held until it has been said."""
        while True:
            try:
                return work()
            except TransportError as error:
                if self._listener is None or isinstance(error, ProtocolError):
                    raise
                self._channel.cut()  # nobody is to say anything into a link on which nobody listens
                self._wait(error, welcome, speaking or contextlib.nullcontext())

    def _wait(
        self,
        error: TransportError,
        welcome: Callable[[], Iterable[Mapping[str, Any]]],
        speaking: contextlib.AbstractContextManager[Any],
    ) -> None:
        deadline = Deadline.after(self._hold_s)
        self._waits = True
        try:
            while self._listener is not None and not self._channel.ended and not deadline.expired():
                if self._told_to_leave:
                    raise MoveRefused(self._told_to_leave)
                try:
                    visit = self._visits.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                with contextlib.suppress(TransportError, OSError), speaking:
                    self._take(visit)
                    until = Deadline.after(ANSWER_TIMEOUT_S)
                    for message in welcome():
                        self._channel.send(Frame.control(message), deadline=until)
                    return
            raise error
        finally:
            self._waits = False

    def _take(self, visit: _Visit) -> None:
        *descriptors, errors = visit.descriptors
        # Those of the first connection went with its SSH session.
        for own in self._output:
            os.dup2(errors, own)
        os.close(errors)
        # Who brought it waits, where it must, until this process is done with it.
        self._channel.renew(taken_over(visit.note, descriptors), visit.door.close)
        send_note(visit.door, {"taken": True})

    # The door, in a thread of its own

    def _listen(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                door, _address = listener.accept()
            except OSError:
                return
            door.settimeout(VISIT_TIMEOUT_S)
            try:
                self._answer(door)
            except (TransportError, OSError, KeyError, TypeError) as error:
                door.close()
                with contextlib.suppress(OSError):
                    print(f"cmigrate: a visit to a waiting move failed: {error}", file=sys.stderr)

    def _answer(self, door: socket.socket) -> None:
        note, descriptors = receive_note(door)
        want = note.get("want")
        if want == "resume" and len(descriptors) > 1 and note["peer"]["name"] == self._peer:
            self._visits.put(_Visit(door=door, note=note, descriptors=descriptors))
            self._channel.cut()  # it may not know yet that its link is dead
            return
        for descriptor in descriptors:
            os.close(descriptor)
        leaving = want == "leave" and (self._waits or not note.get("if_waiting"))
        if leaving:
            self._told_to_leave = str(note.get("why"))
            self._channel.cut()
        send_note(door, {"leaving": leaving})
        door.close()


class HandedOver(Exception):
    """The connection of this session belongs to another process now. ``wait`` until that one is done with it."""

    def __init__(self, door: socket.socket) -> None:
        super().__init__("handed over")
        self._door = door

    def close(self) -> None:
        self._door.close()

    def wait(self) -> None:
        self._door.settimeout(None)
        with contextlib.suppress(OSError), self._door:
            while self._door.recv(4096):
                pass


def hand_over(run_dir: Path, move_id: str, channel: Channel) -> HandedOver | None:
    """Give this session's connection to the process that holds the move; None when there is none, or it can not be.

    Raises ChannelClosed, with the connection cut, when it is not known who has it now.
    """
    standing = standing_of(channel.inner if isinstance(channel, RenewableChannel) else channel)
    if standing is None:
        return None
    note, descriptors = standing
    try:
        door = _knock(run_dir, move_id)
    except OSError:
        return None
    try:
        send_note(door, {"want": "resume", **note}, [*descriptors, 2])
        if not receive_note(door)[0].get("taken"):
            raise ProtocolError("it is another host's")
    except (OSError, TransportError) as error:
        door.close()
        # Two processes that use one cipher would use a nonce twice.
        channel.abort()
        raise ChannelClosed(f"the session that holds move {move_id} did not take the connection: {error}") from error
    return HandedOver(door)


def dismiss(run_dir: Path, move_id: str, why: str, *, if_waiting: bool, wait_s: float = VISIT_TIMEOUT_S) -> bool:
    """Tell a session that holds a move that nobody will come back; whether it has gone, or never was."""
    path = door_of(run_dir, move_id)
    if not path.exists():
        return True
    try:
        with _knock(run_dir, move_id) as door:
            send_note(door, {"want": "leave", "why": why, "if_waiting": if_waiting})
            if not receive_note(door)[0].get("leaving"):
                return False
    except (OSError, TransportError):
        return True  # it has died, or is about to end: whoever looks at its journal finds that out
    deadline = time.monotonic() + wait_s
    while path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def door_of(run_dir: Path, move_id: str) -> Path:
    """A name that no container's directory has."""
    return run_dir / f"move-{move_id}.sock"


def _knock(run_dir: Path, move_id: str) -> socket.socket:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    door.settimeout(VISIT_TIMEOUT_S)
    try:
        with _short(door_of(run_dir, move_id)) as path:
            door.connect(path)
    except BaseException:
        door.close()
        raise
    return door


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """An address holds 107 bytes, and a directory's name may be longer."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
