"""Memory that stays on the source while the container already runs on the target: what is waited for goes first.

It is read where it is, in the frozen tasks: nothing is copied here, and nothing can change it. The freezer and CRIU
hold them until the target has said ``whole``. Between the freeze and that word either host's death is the container's
end, which is why the operator had to allow it. A link that breaks after COMMIT is brought back (refill.py), and what
the target lacks by then is sent, whatever was on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from migrate import messages
from migrate.guards import signals_ignored
from migrate.memory_source import LiveMemory, send_memory
from migrate.outgoing import RUNS_PER_MESSAGE, Outgoing
from runtime.criu.lazy_images import read_lazy_spans
from runtime.memory.ranges import EMPTY, PageRanges
from runtime.memory.reader import MemoryReader, Range
from runtime.memory.segments import Segment, Segments
from transport.api import Deadline, TransportError

# Sent around a page that somebody waits for: neighbours are often next, and the page is not much later for it.
AROUND_BYTES = 64 << 10
# Sent at a time when nobody waits. What is wanted next waits until it is out.
PUSH_BYTES = 256 << 10
# Pushed next after a page that was wanted: who walks through memory finds it there.
AHEAD_BYTES = 1 << 20
# Of the target's silence while it has something to ask for, or all this has been sent.
SILENCE_TIMEOUT_S = 120.0

M = TypeVar("M", bound=messages.Message)


class KeptMemory:
    """What the target lacks of the container's private memory, from the end of the dump on. One thread."""

    def __init__(self, out: Outgoing, live: LiveMemory) -> None:
        self._out = out
        self._live = live
        self._buffer = memoryview(bytearray(PUSH_BYTES))
        self._readers: dict[int, MemoryReader] = {}
        self._remote: dict[int, PageRanges] = {}
        self._left: dict[int, Segments] = {}
        self._ahead: tuple[int, int] | None = None
        self._hot: deque[tuple[int, int, int]] = deque()
        self._whole = False
        self.pages_after = 0
        """Bytes of pages that went over the wire after the container ran on the target."""

    @property
    def left_bytes(self) -> int:
        return sum(segments.bytes for segments in self._left.values())

    def announce(self, images: Path) -> None:
        """Tell the target what stays here. ``images`` are of the complete dump: they tell what a restore needs at once,
        which is sent now. Raises OSError and RuntimeFault where the memory can not be read."""
        self._out.peer_may_speak = True
        for inside, kept in self._live.kept.items():
            if not kept:
                continue
            lazy, _rest = read_lazy_spans(images / f"mm-{inside}.img")
            remote = kept & PageRanges.from_spans(lazy)
            at_once = kept - remote
            self.keep(inside, self._live.pids[inside], remote)
            self._send(inside, at_once.spans())
            self._name(inside, "present", at_once)
            self._name(inside, "runs", remote)
            self._hot.extend((inside, start, end) for start, end in self._live.hot.get(inside, EMPTY).spans())

        # Who was told of nothing asks for nothing, and has nothing to confirm.
        self._whole = not self.left_bytes

    def keep(self, inside: int, pid: int, remote: PageRanges) -> None:
        """These pages of a task stay here, until the target has them. Raises OSError."""
        self._readers[inside] = MemoryReader(pid)
        self._remote[inside], self._left[inside] = remote, Segments(remote.spans())

    def close(self) -> None:
        while self._readers:
            self._readers.popitem()[1].close()

    def hear(self, kind: type[M], timeout_s: float) -> M:
        """The next message of the target, and until it comes, what it wants: nothing of it runs there yet, but a
        restore may touch a page."""
        deadline = Deadline.after(timeout_s)
        while True:
            try:
                message = self._next_but_wants(deadline)
            except TransportError as error:
                # Before COMMIT it is a rollback, and after DONE nothing is kept.
                if kind is not messages.Running or self._whole or not self._go_on(error):
                    raise
                deadline = Deadline.after(timeout_s)
                continue
            if message.get("type") != messages.Whole.TYPE:
                return kind.parse(message)
            self._whole = True

    def _next_but_wants(self, deadline: Deadline) -> dict[str, Any]:
        while True:
            message = self._out.channel.receive(deadline=deadline).message()
            if message.get("type") != messages.Want.TYPE:
                return message
            # A want may cross the last page; after WHOLE there is nothing here any more.
            if not self._whole:
                self._give(messages.Want.parse(message))

    def serve(self) -> None:
        """It runs there: everything goes over, what is wanted first, until the target says that it needs nothing."""
        with signals_ignored():
            self._serve()

    def _serve(self) -> None:
        before = self._out.sent_bytes["pages"]
        while not self._whole:
            self.pages_after = self._out.sent_bytes["pages"] - before
            try:
                if self._out.channel.readable(self._out.pace.take(0)) or not self._push():
                    self._obey(self._out.channel.receive(deadline=Deadline.after(SILENCE_TIMEOUT_S)).message())
            except TransportError as error:
                self._whole = not self._go_on(error)

    def _obey(self, message: dict[str, Any]) -> None:
        if message.get("type") == messages.Want.TYPE:
            self._give(messages.Want.parse(message))
        elif message.get("type") != messages.Running.TYPE:  # on another link it is said again
            messages.Whole.parse(message)
            self._whole = True

    def _go_on(self, error: TransportError) -> bool:
        """The link broke: on another one what the target lacks goes out, whatever was sent before. False when it needs
        nothing more. Raises ``error`` where that can not be, and as Outgoing.refill."""
        if self._out.refill is None:
            raise error
        missing = self._out.refill(error, self._remote)
        if missing is None:
            return False
        self._left = {inside: Segments(missing.get(inside, EMPTY).spans()) for inside in self._remote}
        return True

    def _give(self, want: messages.Want) -> None:
        """The page with its neighbours; nothing when it is on its way."""
        low = want.address & -AROUND_BYTES
        left = self._left.get(want.id)
        if left is not None and left.at(want.address) is not None:
            pieces = left.cut(low, low + AROUND_BYTES)
            self._send(want.id, ((piece.start, piece.end) for piece in pieces))
            # What comes behind is likely to be next.
            self._ahead = (want.id, low + AROUND_BYTES)

    def _push(self) -> bool:
        """Send one piece; False when everything is out."""
        found = self._next_piece()
        if found is None:
            return False
        inside, piece = found
        end = min(piece.end, piece.start + PUSH_BYTES)
        self._left[inside].cut(piece.start, end)
        self._send(inside, ((piece.start, end),))
        return True

    def _next_piece(self) -> tuple[int, Segment] | None:
        """Behind what was wanted last, hot pages, anywhere."""
        if self._ahead is not None:
            inside, start = self._ahead
            if (piece := self._left[inside].first(start, start + AHEAD_BYTES)) is not None:
                return inside, piece
            self._ahead = None
        while self._hot:
            inside, start, end = self._hot[0]
            if (piece := self._left[inside].first(start, end)) is not None:
                return inside, piece
            self._hot.popleft()
        for inside, left in self._left.items():
            if (piece := left.first()) is not None:
                return inside, piece
        return None

    def _send(self, inside: int, spans: Iterable[tuple[int, int]]) -> None:
        ranges = [(start, end - start) for start, end in spans]
        sent: list[Range] = []
        for filled, data, zeros in self._readers[inside].content(ranges, self._buffer):
            before = self._out.sent_bytes["pages"]
            send_memory(self._out, inside, filled, data, zeros)
            self._out.pace.take(self._out.sent_bytes["pages"] - before)
            sent += (*filled, *zeros)
        if sum(size for _address, size in sent) != sum(size for _address, size in ranges):
            # Guard pages: what can not be read here can not be read there, but the target waits for news of it.
            rest = _page_ranges(ranges) - _page_ranges(sent)
            send_memory(self._out, inside, [], self._buffer[:0], [(start, end - start) for start, end in rest.spans()])

    def _name(self, inside: int, key: str, ranges: PageRanges) -> None:
        flat = [number for run in ranges for number in (run.address, run.pages)]
        for first in range(0, len(flat), 2 * RUNS_PER_MESSAGE):
            message: dict[str, object] = {"type": "remote", "id": inside, "runs": [], "present": []}
            message[key] = flat[first : first + 2 * RUNS_PER_MESSAGE]
            self._out.control(message)


def _page_ranges(ranges: Iterable[Range]) -> PageRanges:
    return PageRanges.from_spans((address, address + size) for address, size in ranges)
