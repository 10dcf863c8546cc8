"""What the target receives in bulk, and where it goes: root difference, image files, pages. The peer is not trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from migrate import messages
from migrate.errors import MoveRefused, ProtocolViolation
from migrate.memory_target import PageSink
from migrate.packing import unpacking
from migrate.shared_source import SHARED_COMPLETE
from migrate.shared_target import SharedTarget
from migrate.verify_target import ExpectedMemory
from runtime.criu.images import ImageSetWriter
from runtime.criu.page_protocol import PAGE_BYTES
from runtime.criu.pages import SpaceId
from runtime.tree import Change
from runtime.treesink import TreeSink
from transport.api import Channel, Deadline, Frame, FrameKind

MAX_CHANGES_PER_MESSAGE = 1024
MAX_RUNS_PER_MESSAGE = 4096
MAX_FILE_BYTES = 1 << 44
MAX_IMAGES_PER_MESSAGE = 4096


class Incoming:
    """Bulk receiver: feeds each frame to the right place until a control message that is not bulk comes."""

    def __init__(
        self,
        channel: Channel,
        *,
        trees: Sequence[Path],
        images: Path,
        log: Path,
        pages: PageSink,
        shared: SharedTarget | None,
        expected: ExpectedMemory | None,
        deadline: Callable[[], Deadline],
        on_frozen: Callable[[], None],
        on_reach: Callable[[], None] = lambda: None,
        on_trees: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_trees`` is called once: when the trees are complete, though other things may still come."""
        self._channel = channel
        self._deadline = deadline
        self._roots = list(trees)
        self._sinks = [TreeSink(root) for root in trees]
        self._image_files = ImageSetWriter(images)
        self._pages = pages
        self._shared = shared
        self._expected = expected
        self._space: SpaceId | None = None
        self._log = log
        self._on_frozen = on_frozen
        self._on_reach = on_reach
        self._on_trees = on_trees
        self._trees_are_complete = False
        self.received_bytes = 0
        self.taken = 0
        """Bulk messages that have come whole: what a source that lost the link need not send again."""

    def until_control(self) -> dict[str, Any]:
        """Receive and store bulk frames; returns the first control message that is none of theirs."""
        handlers: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "tree-changes": self._tree_changes,
            "images": self._images,
            "log": self._receive_log,
            messages.Reach.TYPE: lambda _message: self._on_reach(),
            messages.Frozen.TYPE: lambda _message: self._on_frozen(),
            "space": self._open_space,
            "pages": self._receive_pages,
            "memory": self._receive_memory,
            "shared": self._receive_shared,
            "remote": self._receive_remote,
            "hashes": self._receive_hashes,
        }
        while True:
            message = self._receive_control()
            handler = handlers.get(str(message.get("type")))
            if handler is None:
                return message
            handler(message)
            self.taken += message["type"] in messages.BULK_TYPES

    def begin(self) -> None:
        """Everything has arrived: CRIU may begin to restore when this returns."""
        self._complete_trees()
        self._pages.begin()

    def finish(self) -> None:
        """After ``begin``: what CRIU needs of memory is in its files when this returns. Another thread may call it."""
        self._pages.finish()

    def _complete_trees(self) -> None:
        if not self._trees_are_complete:
            for sink in self._sinks:
                sink.finish()
            self._trees_are_complete = True
            self._on_trees()

    def sync(self) -> None:
        """The container's files are on the disk when this returns. Writes much: not for a blackout."""
        self._sinks[0].sync()

    def _receive_control(self) -> dict[str, Any]:
        frame = self._channel.receive(deadline=self._deadline())
        return frame.message()

    def _receive_data(self, wanted_bytes: int, into: memoryview | None = None) -> Frame:
        def place(_tag: int, length: int) -> memoryview | None:
            if length > wanted_bytes:
                raise ProtocolViolation(f"{length} bytes came where at most {wanted_bytes} were announced")
            return into[:length] if into is not None else None

        frame = self._channel.receive(deadline=self._deadline(), into=place)
        if frame.kind is not FrameKind.DATA:
            raise ProtocolViolation("data was announced and did not come")
        self.received_bytes += len(frame.body)
        return frame

    def _tree_changes(self, message: Mapping[str, Any]) -> None:
        number, changes = message.get("tree"), message.get("changes")
        if self._trees_are_complete:
            raise ProtocolViolation("files came after images")
        if not isinstance(number, int) or not 0 <= number < len(self._sinks) or not isinstance(changes, list):
            raise ProtocolViolation("tree-changes does not fit")
        if len(changes) > MAX_CHANGES_PER_MESSAGE:
            raise ProtocolViolation(f"{len(changes)} changes in one message")
        sink = self._sinks[number]
        for item in changes:
            change = Change.from_message(item)
            sink.apply(change)
            if change.has_content:
                self._file_content(sink, change)

    def _file_content(self, sink: TreeSink, change: Change) -> None:
        """Data frames (tag: offset) up to an empty one."""
        while True:
            frame = self._receive_data(change.size)
            if not len(frame.body):
                return
            if frame.tag + len(frame.body) > change.size:
                raise ProtocolViolation("file content beyond the announced size")
            sink.write(change, frame.tag, memoryview(frame.body))

    def _images(self, message: Mapping[str, Any]) -> None:
        """Files one after the other, in pieces that end anywhere. All trees have come before the first of them."""
        self._complete_trees()
        names, sizes = (_listed(message.get(key)) for key in ("names", "sizes"))
        if len(names) != len(sizes) or not all(isinstance(name, str) for name in names):
            raise ProtocolViolation("images do not fit")
        if not all(isinstance(size, int) and 0 <= size <= MAX_FILE_BYTES for size in sizes):
            raise ProtocolViolation("an image's size does not fit")
        left, piece = sum(sizes), memoryview(b"")
        for name, size in zip(names, sizes, strict=True):
            with self._image_files.create(name) as file:
                while size:
                    if not len(piece):
                        piece = memoryview(self._receive_data(left).body)
                        if not len(piece):
                            raise ProtocolViolation("an image ended early")
                        left -= len(piece)
                    file.write(piece[:size])
                    piece, size = piece[size:], size - len(piece[:size])

    def _receive_log(self, message: Mapping[str, Any]) -> None:
        offset = message.get("offset")
        if not isinstance(offset, int) or not 0 <= offset <= MAX_FILE_BYTES:
            raise ProtocolViolation("log does not fit")
        with open(self._log, "r+b" if offset else "wb") as file:
            file.truncate(offset)
            file.seek(offset)
            self._receive_file(message.get("size"), file)

    def _receive_file(self, size: object, file: BinaryIO) -> None:
        if not isinstance(size, int) or not 0 <= size <= MAX_FILE_BYTES:
            raise ProtocolViolation("a file's size does not fit")
        left = size
        while left:
            body = self._receive_data(left).body
            if not len(body):
                raise ProtocolViolation("a file ended early")
            file.write(body)
            left -= len(body)

    def _open_space(self, message: Mapping[str, Any]) -> None:
        kind, number = message.get("kind"), message.get("id")
        if kind not in ("task", "shmem") or not isinstance(number, int) or not 0 <= number < 2**63:
            raise ProtocolViolation("space does not fit")
        self._space = SpaceId(kind, number)
        self._pages.open(self._space)

    def _receive_pages(self, message: Mapping[str, Any]) -> None:
        if self._space is None:
            raise ProtocolViolation("pages came before their address space was named")
        runs = _tuples(message.get("runs"), 3)
        self._pages.pages(self._space, [(run[0], run[1], run[2]) for run in runs], self._receive_whole)

    def _receive_memory(self, message: Mapping[str, Any]) -> None:
        """Of a running process: pages, and which pages are all zeros now."""
        pid, runs, zeros = memory_of(message, "runs", "zeros")
        size = sum(pages for _address, pages in runs) * PAGE_BYTES
        self._pages.memory(pid, runs, zeros, unpacking(message, size, self._receive_whole))

    def _receive_shared(self, message: Mapping[str, Any]) -> None:
        if self._shared is None:
            raise ProtocolViolation("shared memory came, and in this mode image files hold it")
        number = message.get("id")
        if not isinstance(number, int) or not 0 <= number < 2**32:
            raise ProtocolViolation("shared memory does not fit")
        runs, zeros = ([(run[0], run[1]) for run in _tuples(message.get(key), 2)] for key in ("runs", "zeros"))
        size = sum(pages for _offset, pages in runs) * PAGE_BYTES
        self._shared.receive(number, runs, zeros, unpacking(message, size, self._receive_whole))

    def finish_shared(self, state: messages.FrozenState, tasks: Callable[[], Mapping[int, int]]) -> None:
        """The rest of shared memory comes and is put where it is mapped; ``tasks``: pids here by those inside."""
        if self._shared is not None:
            if state.shared_follows:
                self.until_shared_complete()
            self._shared.finish(state.shared, tasks())

    def until_shared_complete(self) -> None:
        """What changed of shared memory last, which follows the frozen state."""
        message = self.until_control()
        if message.get("type") == messages.Discard.TYPE:
            raise MoveRefused(f"called off by the source: {messages.Discard.parse(message).why}")
        if message.get("type") != SHARED_COMPLETE:
            raise ProtocolViolation(f"the end of shared memory was due, and {str(message.get('type'))[:40]!r} came")

    def _receive_remote(self, message: Mapping[str, Any]) -> None:
        """Pages that stay on the source until they are wanted, and pages that came as memory and are not lazy."""
        self._pages.remote(*memory_of(message, "runs", "present"))

    def _receive_hashes(self, message: Mapping[str, Any]) -> None:
        if self._expected is None:
            raise ProtocolViolation("hashes came, and the offer spoke of none")
        self._expected.expect(*memory_of(message, "runs", "mapped"), self._receive_whole)

    def _receive_whole(self, view: memoryview) -> None:
        frame = self._receive_data(len(view), view)
        if len(frame.body) != len(view):
            raise ProtocolViolation(f"{len(frame.body)} bytes of pages came instead of {len(view)}")

    def close(self) -> None:
        self._pages.close()
        if self._shared is not None:
            self._shared.close()
        for sink in self._sinks:
            with contextlib.suppress(OSError):
                sink.close()


def memory_of(
    message: Mapping[str, Any], first: str, second: str
) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
    """A task's pid inside and two lists of (address, pages). Raises ProtocolViolation."""
    pid = message.get("id")
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        raise ProtocolViolation("memory does not fit")
    one, other = ([(run[0], run[1]) for run in _tuples(message.get(key), 2)] for key in (first, second))
    return pid, one, other


def _listed(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_IMAGES_PER_MESSAGE:
        raise ProtocolViolation("images do not fit")
    return value


def _tuples(flat: object, width: int) -> list[tuple[int, ...]]:
    """A flat list of numbers as tuples of so many."""
    if not isinstance(flat, list) or len(flat) % width or len(flat) > width * MAX_RUNS_PER_MESSAGE:
        raise ProtocolViolation("pages do not fit")
    if not all(isinstance(number, int) and 0 <= number < 2**57 for number in flat):
        raise ProtocolViolation("pages do not fit")
    return [tuple(flat[index : index + width]) for index in range(0, len(flat), width)]
