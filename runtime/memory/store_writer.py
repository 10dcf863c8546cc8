"""Pages on their way into stores, written by a thread of its own while the next ones are received.

Taking new memory from the kernel is most of what receiving costs, and waits for nobody's network.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.memory.store import Store

BUFFERS = 3
"""One being received into, one being written, one waiting."""

Span = tuple[int, int]
"""(address, size in bytes), whole pages."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    store: Store
    spans: Sequence[Span]
    zeros: Sequence[Span]
    buffer: bytearray


class StoreWriter:
    """Writes in the order in which it was asked, so that newer pages overwrite older ones. One thread asks.

    What goes wrong with a write (NoRoom, CorruptData) is raised by the next call of anything, and nothing is written
    after it.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(bytearray())
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def receiving(self, store: Store, spans: Sequence[Span], zeros: Sequence[Span]) -> Iterator[memoryview]:
        """Memory to receive the pages of ``spans`` into, one after the other.

        When the block ends well they go into the store, and ``zeros`` go out of it.
        """
        buffer = self._free.get()
        try:
            self._complain()
            size_bytes = sum(size for _address, size in spans)
            if len(buffer) < size_bytes:
                buffer = bytearray(size_bytes)
            with memoryview(buffer) as whole, whole[:size_bytes] as view:
                yield view
        except BaseException:
            self._free.put(buffer)
            raise
        self._start()
        self._jobs.put(_Job(store=store, spans=spans, zeros=zeros, buffer=buffer))

    def finish(self) -> None:
        """All is written when this returns. Nothing can be received afterwards."""
        self.close()
        self._complain()

    def close(self) -> None:
        """As ``finish``, whatever went wrong. Before the stores are closed; safe to repeat."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _complain(self) -> None:
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    _write(job)
                except BaseException as error:
                    self._error = error
            self._free.put(job.buffer)


def _write(job: _Job) -> None:
    position = 0
    with memoryview(job.buffer) as view:
        for address, size in job.spans:
            job.store.write(address, view[position : position + size])
            position += size
    job.store.punch(job.zeros)
