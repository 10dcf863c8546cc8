"""Memory that comes after the switch: from the channel into the stores, and what is waited for asked from the source.

One thread receives and another asks, because the pager waits for nobody. The move's own conversation goes on through
``RemoteFeed``, which is the channel for it: it gets every message but memory, in their order.

From COMMIT on, as long as something is missing, a link that breaks is waited for: who faults stands still, the rest of
the container runs. The source that comes back is told what is missing; what was on its way is not, so it comes again.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from migrate import messages
from migrate.errors import ProtocolViolation
from migrate.incoming import memory_of
from migrate.messages_kept import Keeping
from migrate.missing import MissingMemory, Span
from migrate.packing import unpacking
from migrate.verify_target import ExpectedMemory
from migrate.waiting import WaitingRoom
from runtime.memory.pager import Pager, PagerDied
from runtime.memory.ranges import PAGE_BYTES, PageRanges
from runtime.memory.store import Store
from transport.api import Channel, Deadline, DeadlineExpired, Frame, FrameKind, TransportError

# The source sends without a pause from RUNNING on, and answers before it what is asked.
SILENCE_TIMEOUT_S = 60.0
FILL_TIMEOUT_S = 3600.0
# In the container's directory: as long as it is there, memory is missing that only the source has.
MISSING_MARK = "memory-missing"
# In the container's directory: the pager died, and the container with it.
DEATH_RECORD = "pager-died.json"
LAST_WORDS = (messages.Done.TYPE, Keeping.TYPE, messages.Discard.TYPE)


class RemoteFeed:
    """Brings what is ``missing`` (by pid inside) to ``pager``. It owns the stores, and closes them at its end.

    When the source or the link dies while something is missing, and nobody comes back into ``room`` in time, the pager
    is told to give up, which is the container's end; PagerDied then comes out of ``receive`` and ``wait_filled``.
    """

    def __init__(
        self,
        channel: Channel,
        move_id: str,
        room: WaitingRoom,
        pager: Pager,
        stores: Mapping[int, Store],
        missing: Mapping[int, PageRanges],
        mark: Path,
        expected: ExpectedMemory | None = None,
    ) -> None:
        """``expected``: what comes is compared with it."""
        self._channel = channel
        self._move_id = move_id
        self._room = room
        self._pager = pager
        self._stores = stores
        self._missing = MissingMemory(missing)
        self.received_bytes = 0
        self._mark = mark
        self._expected = expected
        self._given_up = False
        self._speaking = threading.RLock()
        """Held by who says something, and while a source that came back is told how things stand."""
        self._wanted: dict[tuple[int, int], None] = {}
        self._said: list[Frame] = []
        """After COMMIT, by the move's own conversation: whether the source has heard it is not known."""
        self._committed = False
        self._whole_said = False
        self._frames: queue.SimpleQueue[Frame | BaseException] = queue.SimpleQueue()
        self._death: BaseException | None = None
        self._broken: BaseException | None = None
        self._bringing = threading.Thread(target=self._bring, name="remote-pages", daemon=True)
        self._asking = threading.Thread(target=self._ask, name="remote-wants", daemon=True)

    def start(self) -> None:
        """After the pager listens and before the restore, which may wait for a page."""
        self._mark.touch()
        self._bringing.start()
        self._asking.start()

    def give_up(self) -> None:
        """The move is undone: what the pager says from now on is no news, but that the channel broke is."""
        self._given_up = True
        if self._broken is not None:
            self._frames.put(self._broken)

    # The channel of the move's own conversation

    def send(self, frame: Frame, *, deadline: Deadline) -> None:
        with self._speaking:
            if self._committed:
                self._said.append(frame)
            self._channel.send(frame, deadline=deadline)

    def receive(self, *, deadline: Deadline) -> Frame:
        """Raises TransportError, ProtocolViolation or PagerDied, then for good; DeadlineExpired."""
        try:
            item = self._frames.get(timeout=deadline.remaining())
        except queue.Empty:
            raise DeadlineExpired("the source said nothing in time") from None
        if isinstance(item, BaseException):
            self._frames.put(item)
            raise item
        return item

    def wait_filled(self) -> None:
        """Until all memory is in place. Raises PagerDied."""
        self._asking.join()
        if self._death is not None:
            raise self._death

    def let_source_come_back(self) -> None:
        """COMMIT has come: from here on the source may come back on another link, while something is missing."""
        # Nothing of what a full disk or directory does to a door is worth the container.
        with self._speaking, contextlib.suppress(OSError):
            if not self._whole_said and self._death is None:
                self._room.open()

    # From the source

    def _bring(self) -> None:
        try:
            self._room.hold(self._receive, self._welcome, self._speaking)
        except BaseException as error:
            self._broken = error
            if self._missing.bytes and not (self._given_up or self._whole_said):
                self._pager.lose(f"{self._channel.peer.name} can not send it any more: {error}")
            else:
                self._frames.put(error)
        finally:
            for store in self._stores.values():
                store.close()

    def _receive(self) -> None:
        """Up to the source's last word."""
        try:
            while self._pass_on(self._channel.receive(deadline=Deadline.after(SILENCE_TIMEOUT_S))):
                pass
        except TransportError:
            # The release may be under way still.
            if self._committed:
                self.let_source_come_back()
            raise

    def _welcome(self) -> Iterator[dict[str, Any]]:
        """To a source that has come back: what is missing, what of it is waited for, and what it may not have heard."""
        whole = self._whole_said
        missing_bytes = 0 if whole else self._missing.bytes
        yield messages.Resumed(move_id=self._move_id, taken=0, missing_bytes=missing_bytes).to_message()
        if not whole:
            yield from self._missing.messages()
            self._wanted = {want: None for want in self._wanted if self._missing.lacks(*want)}
            yield from (messages.Want(id=pid, address=address).to_message() for pid, address in self._wanted)
        yield from (frame.message() for frame in self._said)
        if whole:
            yield messages.Whole(move_id=self._move_id).to_message()

    def _pass_on(self, frame: Frame) -> bool:
        """Whether more may come."""
        if frame.kind is not FrameKind.CONTROL:
            raise ProtocolViolation("data came that was not announced")
        message = frame.message()
        if message.get("type") == "memory":
            self._store(message)
            return True
        self._committed = self._committed or message.get("type") == messages.Commit.TYPE
        self._frames.put(frame)
        return message.get("type") not in LAST_WORDS

    def _store(self, message: Mapping[str, Any]) -> None:
        """Nothing has come before all of it has: a link may break in the middle."""
        pid, runs, zeros = memory_of(message, "runs", "zeros")
        spans = [(address, address + pages * PAGE_BYTES) for address, pages in (*runs, *zeros)]
        self._missing.must_be_expected(pid, spans)
        size = sum(pages for _address, pages in runs) * PAGE_BYTES
        store = self._stores[pid]
        with store.scratch(size) as view:
            if size:
                unpacking(message, size, self._receive_into)(view)
            fresh = self._take_in(pid, runs, view) if size else []
        for address, pages in zeros:
            pieces = self._missing.come(pid, address, address + pages * PAGE_BYTES)
            if self._expected is not None:
                self._expected.arrived_zeros(pid, _runs(pieces))
            fresh += pieces
        self.received_bytes += size
        with contextlib.suppress(PagerDied):  # the other thread hears of it
            self._pager.arrived(pid, [(start, end - start) for start, end in fresh])
        if not self._missing.bytes:
            self._say_whole()

    def _take_in(self, pid: int, runs: Sequence[tuple[int, int]], view: memoryview) -> list[Span]:
        """What was there already, and may have been filled, must not be overwritten in the store."""
        fresh: list[Span] = []
        position = 0
        for address, pages in runs:
            for start, end in self._missing.come(pid, address, address + pages * PAGE_BYTES):
                content = view[position + start - address : position + end - address]
                if self._expected is not None:
                    self._expected.arrived(pid, _runs([(start, end)]), content)
                self._stores[pid].write(start, content)
                fresh.append((start, end))
            position += pages * PAGE_BYTES
        return fresh

    def _receive_into(self, view: memoryview) -> None:
        def place(_tag: int, length: int) -> memoryview:
            if length != len(view):
                raise ProtocolViolation(f"{length} bytes of pages came instead of {len(view)}")
            return view

        frame = self._channel.receive(deadline=Deadline.after(SILENCE_TIMEOUT_S), into=place)
        if frame.kind is not FrameKind.DATA:
            raise ProtocolViolation("data was announced and did not come")

    # To the source

    def _ask(self) -> None:
        try:
            while (want := self._pager.next_want(FILL_TIMEOUT_S)) is not None:
                with self._speaking:
                    self._wanted[want] = None
                    self._tell(messages.Want(id=want[0], address=want[1]))
            # Also when tasks have ended whose memory nobody needs now.
            self._say_whole()
        except BaseException as error:
            self._death = error
            self._room.close()
            if not self._given_up:
                self._frames.put(error)

    def _say_whole(self) -> None:
        with self._speaking:
            if not self._whole_said:
                self._whole_said = True
                # Before the source may throw its copy away: who asks later must not be told that it is lost.
                self._mark.unlink(missing_ok=True)
                self._tell(messages.Whole(move_id=self._move_id))
                # A source that has not heard it asks, and is told that it runs here.
                self._room.close()

    def _tell(self, message: messages.Message) -> None:
        # Where the link is broken the receiving thread knows what that means, and says it again on another one.
        with contextlib.suppress(TransportError):
            self._channel.send(Frame.control(message.to_message()), deadline=Deadline.after(SILENCE_TIMEOUT_S))


def _runs(spans: Iterable[Span]) -> list[tuple[int, int]]:
    return [(start, (end - start) // PAGE_BYTES) for start, end in spans]
