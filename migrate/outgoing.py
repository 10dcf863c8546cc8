"""What the source sends in bulk: root difference, image files, pages. Counts bytes by kind.

Control frames announce, data frames follow; docs/protocol.md has the grammar.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrate import messages
from migrate.errors import MigrateError, ProtocolViolation
from migrate.packing import Packer
from migrate.parts import Parts
from runtime.criu.images import image_files
from runtime.criu.pages import RunReader, SpaceId
from runtime.memory.ranges import PageRanges
from runtime.tree import Change, SentContent, read_chunks
from transport.api import Channel, Deadline, Frame, TransportError

PAGE_BYTES = 4096
# One data frame of pages. Small enough to overlap reading with sending, large enough that framing costs nothing.
PAGE_BATCH_BYTES = 4 << 20
IMAGE_CHUNK_BYTES = 4 << 20
IMAGES_PER_MESSAGE = 1024
CHANGES_PER_MESSAGE = 256
# Far enough below a control frame's limit for what msgpack adds.
CHANGES_BYTES = 512 << 10
RUNS_PER_MESSAGE = 2048


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How bulk is to be sent. ``take`` is of the bucket that the channel obeys until ``lift`` is called, and a fill
    after the switch: it counts bytes and says how long to wait."""

    packer: Packer = field(default_factory=Packer)
    take: Callable[[int], float] = lambda _bytes: 0.0
    lift: Callable[[], None] = lambda: None
    switchover_Bps: float | None = None
    """What the link takes when it is lifted, where that was measured."""


class Outgoing:
    """Bulk sender on one channel. ``deadline`` gives the deadline of each call, so that a phase can set its own."""

    def __init__(self, channel: Channel, deadline: Callable[[], Deadline], pace: Pace | None = None) -> None:
        self.channel = channel
        self.pace = pace or Pace()
        self._deadline = deadline
        self.sent_bytes: Counter[str] = Counter()
        self._log_inode = self._log_size = 0
        self.mend: Callable[[TransportError], int] | None = None
        """Brings a broken link back, and says how many parts the target has; None: a broken link is the end."""
        self.memory_again: Callable[[Mapping[str, object]], None] | None = None
        """Sends what the pages of a ``memory`` message hold now."""
        self.refill: Callable[[TransportError, Mapping[int, PageRanges]], Mapping[int, PageRanges] | None] | None = None
        """After the switch, of memory that is kept for the target: brings the link back, and says what of it is
        missing there, None: nothing any more."""
        self.parts = Parts()
        self.kept_bytes = 0
        """What the target had when the link broke for the last time, which was not sent again."""
        self.peer_may_speak = False
        """Whether the target says other things than errors while data goes out, which somebody else then receives."""

    def _deliver(self, send: Callable[[], None], again: Callable[[], None], size_bytes: int) -> None:
        """One part. When this returns it is on its way, if need be on a new link, with all that was sent before it."""
        if self.mend is None:
            send()
            return
        self.parts.add(again, size_bytes)
        try:
            send()
        except TransportError as error:
            self.send_again(error)

    def send_again(self, error: TransportError) -> None:
        """The link broke: bring it back, and send what got lost with it. Raises what ``mend`` does, CanNotResume."""
        if self.mend is None:
            raise error
        lost = self.parts.rewind(self.mend(error))
        self.kept_bytes = self.parts.total_bytes
        for again in lost:
            again()  # which is delivered in the same way, should the link break again

    def all_has_come(self, move_id: str) -> None:
        """Returns when the target has taken everything: the link is whole, and nothing in it waits to be sent when the
        container is frozen. From now on a broken link is not mended. Raises as ``send_again``, and what the target
        says instead."""
        while self.mend is not None:
            try:
                self.control(messages.Reach(move_id=move_id).to_message())
                messages.Reached.parse(self.channel.receive(deadline=self._deadline()).message())
                self.mend = None
            except TransportError as error:
                self.send_again(error)

    def control(self, message: Mapping[str, object]) -> None:
        before = self.channel.bytes_sent
        self.channel.send(Frame.control(message), deadline=self._deadline())
        self.sent_bytes["control"] += self.channel.bytes_sent - before

    def data(self, kind: str, tag: int, buffers: Sequence[memoryview | bytes]) -> None:
        """One frame of bulk. Raises what the target says instead of listening: nothing else may come from it now."""
        if not self.peer_may_speak and self.channel.readable(0):
            raise spoken_out_of_turn(self.channel.receive(deadline=self._deadline()).message())
        before = self.channel.bytes_sent
        self.channel.send_data(tag, buffers, deadline=self._deadline())
        self.sent_bytes[kind] += self.channel.bytes_sent - before

    def memory(self, message: dict[str, object], data: memoryview) -> None:
        """A ``memory`` message and its pages, if there are any, in the way that is best for them."""
        send_again = self.memory_again
        if send_again is None:
            self._memory(message, data)
            return
        again = functools.partial(send_again, message)
        self._deliver(lambda: self._memory(message, data), again, data.nbytes)

    def _memory(self, message: dict[str, object], data: memoryview) -> None:
        if not data.nbytes:
            self.control(message)
            return
        packer = self.pace.packer
        packed = packer.pack(data)
        begin = time.perf_counter()
        self.control(message | packed.fields())
        self.data("pages", 0, [packed.body])
        packer.link.sent(len(packed.body), begin, time.perf_counter())

    def tree(self, number: int, root: int, changes: Iterable[Change], sent: SentContent) -> None:
        """Changes of tree ``number`` (0 the upper layer, 1.. the tmpfs mounts), each followed by its content."""
        batch: list[Change] = []
        weight = 0
        for change in changes:
            if weight + change.weight_bytes > CHANGES_BYTES and batch:
                self._tree_part(number, root, batch, sent)
                batch, weight = [], 0
            batch.append(change)
            weight += change.weight_bytes
            if change.has_content or len(batch) >= CHANGES_PER_MESSAGE:
                self._tree_part(number, root, batch, sent)
                batch, weight = [], 0
        self._tree_part(number, root, batch, sent, end=True)

    def _tree_part(
        self, number: int, root: int, batch: Sequence[Change], sent: SentContent, *, end: bool = False
    ) -> None:
        """The first pass over a tree has no patches, so that any part of it may be applied twice."""

        def send() -> None:
            message = {"type": "tree-changes", "tree": number, "changes": [change.to_message() for change in batch]}
            self.control({**message, "end": True} if end else message)
            if batch and (change := batch[-1]).has_content:
                for offset, chunk in read_chunks(root, change, sent=sent):
                    self.data("files", offset, (chunk,))
                self.data("files", 0, (b"",))

        def again() -> None:
            self._tree_part(number, root, batch, sent, end=end)

        self._deliver(send, again, sum(change.weight_bytes + change.size for change in batch))

    def images(self, directory: Path) -> None:
        """Every image file of ``directory``; the target refuses names that are not images."""
        small: list[Path] = []
        for path in image_files(directory):
            if path.name.startswith("pages-"):
                self._image_files([path], "pages")
            else:
                small.append(path)
        for first in range(0, len(small), IMAGES_PER_MESSAGE):
            self._image_files(small[first : first + IMAGES_PER_MESSAGE], "images")

    def _image_files(self, paths: Sequence[Path], kind: str) -> None:
        """Together: a frame for each of a dozen small files would cost more than what is in them."""
        sizes = [path.stat().st_size for path in paths]
        self.control({"type": "images", "names": [path.name for path in paths], "sizes": sizes})
        waiting: list[bytes] = []
        waiting_bytes = 0
        for path in paths:
            with open(path, "rb") as file:
                while chunk := file.read(IMAGE_CHUNK_BYTES - waiting_bytes):
                    waiting.append(chunk)
                    waiting_bytes += len(chunk)
                    if waiting_bytes == IMAGE_CHUNK_BYTES:
                        self.data(kind, 0, waiting)
                        waiting, waiting_bytes = [], 0
        if waiting:
            self.data(kind, 0, waiting)

    def log(self, path: Path) -> None:
        """The container's log: all of it the first time, then what was appended since."""
        if not path.exists():
            return

        def again() -> None:
            self._log_inode = self._log_size = 0
            self.log(path)

        self._deliver(lambda: self._send_log(path), again, path.stat().st_size)

    def _send_log(self, path: Path) -> None:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            # A log that was rotated meanwhile is another file, and goes as a whole.
            offset = self._log_size if status.st_ino == self._log_inode and status.st_size >= self._log_size else 0
            self._log_inode, self._log_size = status.st_ino, status.st_size
            left = status.st_size - offset
            self.control({"type": "log", "offset": offset, "size": left})
            file.seek(offset)
            while left and (chunk := file.read(min(left, IMAGE_CHUNK_BYTES))):
                self.data("files", 0, (chunk,))
                left -= len(chunk)


def spoken_out_of_turn(message: Mapping[str, Any]) -> MigrateError:
    """The error that a message tells, or that it is one."""
    told = messages.parse(message)
    if isinstance(told, (messages.Error, messages.Refused)):
        return told.as_error()
    return ProtocolViolation(f"the peer sent {told.TYPE} while it should have listened")


class PageSender:
    """Consumer of the page server: batches runs and sends them on, in CRIU's order."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._buffer = memoryview(bytearray(PAGE_BATCH_BYTES))
        self._used = 0
        self._runs: list[tuple[int, int, int]] = []

    def open(self, space: SpaceId) -> None:
        self.flush()
        self._outgoing.control({"type": "space", "kind": space.kind, "id": space.id})

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        done = 0
        while done < pages:
            room = (PAGE_BATCH_BYTES - self._used) // PAGE_BYTES
            count = min(room, pages - done)
            size = count * PAGE_BYTES
            source.read_into(self._buffer[self._used : self._used + size])
            self._runs.append((address + done * PAGE_BYTES, count, flags))
            self._used += size
            done += count
            if self._used == PAGE_BATCH_BYTES:
                self.flush()

    def name(self, address: int, pages: int, flags: int) -> None:
        """A run whose content the target has; joined to the one before where it can be."""
        if self._runs:
            last, count, known = self._runs[-1]
            if known == flags and last + count * PAGE_BYTES == address:
                self._runs[-1] = (last, count + pages, flags)
                return
        self._runs.append((address, pages, flags))
        if len(self._runs) >= RUNS_PER_MESSAGE:
            self.flush()

    def flush(self) -> None:
        if self._runs:
            flat = [number for run in self._runs for number in run]
            self._outgoing.control({"type": "pages", "runs": flat})
        if self._used:
            self._outgoing.data("pages", 0, (self._buffer[: self._used],))
        self._runs = []
        self._used = 0
