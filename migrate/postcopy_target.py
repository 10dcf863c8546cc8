"""Memory that comes after the switch: from the channel into the stores, and what is waited for asked from the source.

One thread receives and another asks, because the pager waits for nobody. The move's own conversation goes on through
``RemoteFeed``, which is the channel for it: it gets every message but memory, in their order.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from migrate import messages
from migrate.errors import ProtocolViolation
from migrate.incoming import memory_of
from migrate.messages_kept import Keeping
from migrate.packing import unpacking
from migrate.verify_target import ExpectedMemory
from runtime.memory.pager import Pager, PagerDied
from runtime.memory.ranges import PAGE_BYTES, PageRanges
from runtime.memory.segments import Segments
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

    When the source or the link dies while something is missing, the pager is told to give up, which is the container's
    end; PagerDied then comes out of ``receive`` and ``wait_filled``.
    """

    def __init__(
        self,
        channel: Channel,
        move_id: str,
        pager: Pager,
        stores: Mapping[int, Store],
        missing: Mapping[int, PageRanges],
        mark: Path,
        expected: ExpectedMemory | None = None,
    ) -> None:
        """``expected``: what comes is compared with it."""
        self._channel = channel
        self._move_id = move_id
        self._pager = pager
        self._stores = stores
        self._missing = {pid: Segments(ranges.spans()) for pid, ranges in missing.items() if ranges}
        self._missing_bytes = sum(ranges.bytes for ranges in missing.values())
        self.received_bytes = 0
        self._mark = mark
        self._expected = expected
        self._given_up = False
        self._whole_lock = threading.Lock()
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

    # From the source

    def _bring(self) -> None:
        try:
            while self._pass_on(self._channel.receive(deadline=Deadline.after(SILENCE_TIMEOUT_S))):
                pass
        except BaseException as error:
            self._broken = error
            if self._given_up:
                self._frames.put(error)
            elif self._missing_bytes:
                self._pager.lose(f"{self._channel.peer.name} can not send it any more: {error}")
            else:
                self._frames.put(error)
        finally:
            for store in self._stores.values():
                store.close()

    def _pass_on(self, frame: Frame) -> bool:
        """Whether more may come."""
        if frame.kind is not FrameKind.CONTROL:
            raise ProtocolViolation("data came that was not announced")
        message = frame.message()
        if message.get("type") == "memory":
            self._store(message)
            return True
        self._frames.put(frame)
        return message.get("type") not in LAST_WORDS

    def _store(self, message: Mapping[str, Any]) -> None:
        pid, runs, zeros = memory_of(message, "runs", "zeros")
        spans = [(address, pages * PAGE_BYTES) for address, pages in (*runs, *zeros)]
        arrived = self._take_off(pid, spans)
        size = sum(pages for _address, pages in runs) * PAGE_BYTES
        if size:
            store = self._stores[pid]
            receive = unpacking(message, size, self._receive_into)
            with store.scratch(size) as view:
                receive(view)
                if self._expected is not None:
                    self._expected.arrived(pid, runs, view)
                position = 0
                for address, pages in runs:
                    end = position + pages * PAGE_BYTES
                    store.write(address, view[position:end])
                    position = end
        if self._expected is not None:
            self._expected.arrived_zeros(pid, zeros)
        self.received_bytes += size
        with contextlib.suppress(PagerDied):  # the other thread hears of it
            self._pager.arrived(pid, spans)
        self._missing_bytes -= arrived
        if not self._missing_bytes:
            self._say_whole()

    def _take_off(self, pid: int, spans: list[tuple[int, int]]) -> int:
        """What was filled already must not be overwritten in the store: only what is missing may come."""
        missing = self._missing.get(pid)
        if missing is None:
            raise ProtocolViolation(f"memory of task {pid} came, which was not kept back")
        wanted = sum(size for _address, size in spans)
        pieces = [piece for address, size in spans for piece in missing.cut(address, address + size)]
        if sum(piece.end - piece.start for piece in pieces) != wanted:
            raise ProtocolViolation(f"memory of task {pid} came twice, or was not kept back")
        return wanted

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
                self._tell(messages.Want(id=want[0], address=want[1]))
            # Also when tasks have ended whose memory nobody needs now.
            self._say_whole()
        except BaseException as error:
            self._death = error
            if not self._given_up:
                self._frames.put(error)

    def _say_whole(self) -> None:
        with self._whole_lock:
            if not self._whole_said:
                self._whole_said = True
                # Before the source may throw its copy away: who asks later must not be told that it is lost.
                self._mark.unlink(missing_ok=True)
                self._tell(messages.Whole(move_id=self._move_id))

    def _tell(self, message: messages.Message) -> None:
        # Where the link is broken the receiving thread knows what that means.
        with contextlib.suppress(TransportError):
            self._channel.send(Frame.control(message.to_message()), deadline=Deadline.after(SILENCE_TIMEOUT_S))
