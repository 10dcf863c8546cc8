"""The container's memory as it arrives, on its way into stores that a pager serves from.

Pages come at any address, again and again; at the end CRIU's order says which of them exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from migrate.errors import ProtocolViolation
from migrate.messages import HELD_FLAG
from runtime.criu.images import PageImageWriter
from runtime.criu.lazy_images import write_lazy_images
from runtime.criu.page_protocol import PAGE_BYTES, PE_LAZY, PE_PRESENT, SpaceId
from runtime.memory.lazy import eager_is_better
from runtime.memory.pager import Pager
from runtime.memory.ranges import EMPTY, PageRanges
from runtime.memory.store import Store
from runtime.memory.store_writer import StoreWriter
from transport.api import MAX_BODY_BYTES

Run = tuple[int, int, int]
"""(address, pages, flags)"""
Receive = Callable[[memoryview], None]
"""Fills the memory with what comes next on the channel."""
MAX_SPACES = 1 << 16
COPY_PAGES = 1024
# Filled before everything else: what changed last, and mappings no larger than this (stacks, the data of libraries).
SMALL_MAPPING_BYTES = 256 << 10
MAX_HOT_RANGES = 4096


class PageSink(Protocol):
    """Where pages go. Everything is from the peer and checked."""

    def open(self, space: SpaceId) -> None: ...

    def pages(self, space: SpaceId, runs: Sequence[Run], receive: Receive) -> None:
        """Runs in CRIU's order, and the bytes of those that have any."""
        ...

    def memory(
        self, pid: int, runs: Sequence[tuple[int, int]], zeros: Sequence[tuple[int, int]], receive: Receive
    ) -> None:
        """Pages of a running process: (address, pages) with bytes, and those that are all zeros now."""
        ...

    def remote(self, pid: int, runs: Sequence[tuple[int, int]], present: Sequence[tuple[int, int]]) -> None:
        """(address, pages) of a task that stay on the source for now, and that came as memory and must be there."""
        ...

    def begin(self) -> None:
        """All has come: CRIU may begin to restore, and to make namespaces, when this returns. Those can hold shared
        memory."""
        ...

    def finish(self) -> None:
        """After ``begin``: CRIU may look at memory when this returns. Another thread may call it."""
        ...

    def close(self) -> None: ...


class NoPages:
    """Where image files hold them."""

    def open(self, space: SpaceId) -> None:
        raise ProtocolViolation("pages came, and in this mode image files hold them")

    def pages(self, space: SpaceId, runs: Sequence[Run], receive: Receive) -> None:
        self.open(space)

    def memory(
        self, pid: int, runs: Sequence[tuple[int, int]], zeros: Sequence[tuple[int, int]], receive: Receive
    ) -> None:
        self.open(SpaceId("task", pid))

    def remote(self, pid: int, runs: Sequence[tuple[int, int]], present: Sequence[tuple[int, int]]) -> None:
        raise ProtocolViolation("memory was kept back, and the mode has no post-copy")

    def begin(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class StorePages:
    """Pages wait at their own addresses until the last of them has come.

    ``pager`` is one that was started before; it is used unless an eager restore is better, which ``lazy`` tells after
    ``begin``.
    """

    def __init__(
        self, images: Path, criu_version: tuple[int, int, int], pager: Pager, *, keep_stores: bool = False
    ) -> None:
        """``keep_stores``: ``kept`` has the stores after ``finish``, too, as far as memory is still in them."""
        # Before the blackout; CRIU comes to it only where it is to be used.
        pager.listen(images)
        self._images = images
        self._criu_version = criu_version
        self._pager = pager
        self._keep_stores = keep_stores
        self.kept: dict[int, Store] = {}
        self._stores: dict[SpaceId, Store] = {}
        self._writer = StoreWriter()
        self._runs: dict[SpaceId, list[Run]] = {}
        self._last: dict[SpaceId, list[tuple[int, int]]] = {}
        """Address spaces' pages that came after the freeze: who changed them was at work with them."""
        self._remote: dict[SpaceId, list[tuple[int, int]]] = {}
        self.lazy = False
        self._finished = False
        self.missing: dict[int, PageRanges] = {}
        """By pid inside, after ``finish``: what the pager has to be brought; the stores are still open then."""

    def open(self, space: SpaceId) -> None:
        if space in self._runs or len(self._runs) >= MAX_SPACES:
            raise ProtocolViolation(f"{space} came twice")
        self._runs[space] = []
        self._store(space)

    def _store(self, space: SpaceId) -> Store:
        if space not in self._stores:
            if len(self._stores) >= MAX_SPACES:
                raise ProtocolViolation("too many address spaces")
            self._stores[space] = Store(str(space))
        return self._stores[space]

    def memory(
        self, pid: int, runs: Sequence[tuple[int, int]], zeros: Sequence[tuple[int, int]], receive: Receive
    ) -> None:
        self._write(self._store(SpaceId("task", pid)), runs, zeros, receive)

    def pages(self, space: SpaceId, runs: Sequence[Run], receive: Receive) -> None:
        known = self._runs.get(space)
        if known is None:
            raise ProtocolViolation(f"pages of {space} came before it was named")
        known.extend((address, pages, flags & ~HELD_FLAG) for address, pages, flags in runs)
        sent = [(address, pages) for address, pages, flags in runs if not flags & HELD_FLAG]
        self._last.setdefault(space, []).extend(sent)
        self._write(self._stores[space], sent, (), receive)

    def remote(self, pid: int, runs: Sequence[tuple[int, int]], present: Sequence[tuple[int, int]]) -> None:
        space = SpaceId("task", pid)
        known = self._runs.get(space)
        if known is None:
            raise ProtocolViolation(f"memory of {space} was kept back before it was named")
        known.extend((address, pages, PE_PRESENT) for address, pages in present)
        spans = ((address, address + pages * PAGE_BYTES) for address, pages in runs)
        self._remote.setdefault(space, []).extend(spans)

    def take_stores(self) -> dict[int, Store]:
        """By pid inside; from now on they are the caller's to fill and to close."""
        stores = {space.id: store for space, store in self._stores.items() if space.kind == "task"}
        self._stores = {space: store for space, store in self._stores.items() if space.kind != "task"}
        self._close_stores()
        return stores

    def _write(
        self, store: Store, runs: Sequence[tuple[int, int]], zeros: Sequence[tuple[int, int]], receive: Receive
    ) -> None:
        spans, holes = ([(address, pages * PAGE_BYTES) for address, pages in part] for part in (runs, zeros))
        size = sum(size for _address, size in spans)
        if size > MAX_BODY_BYTES:
            raise ProtocolViolation(f"{size} bytes of pages were announced at once")
        if spans or holes:
            with self._writer.receiving(store, spans, holes) as view:
                if spans:
                    receive(view)

    def begin(self) -> None:
        wanted = sum(pages for runs in self._runs.values() for _address, pages, _flags in runs) * PAGE_BYTES
        self.lazy = bool(self._remote) or not eager_is_better(wanted, 0)
        if any(space.kind == "shmem" for space in self._runs):
            self.finish()

    def finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        self._writer.finish()
        if self.lazy:
            self._finish_lazy()
        else:
            self._finish_eager()

    def _finish_eager(self) -> None:
        """Everything moves from the stores to image files, in CRIU's order."""
        writer = PageImageWriter(self._images, self._criu_version)
        for space, runs in self._runs.items():
            writer.open(space)
            store = self._stores[space]
            # What the source kept from CRIU is named first, whatever its addresses.
            for batch in _batches(sorted(runs)):
                with writer.reserve(space, batch) as view:
                    position = 0
                    for address, pages, _flags in batch:
                        end = position + pages * PAGE_BYTES
                        store.read_into(address, view[position:end])
                        position = end
                store.punch((address, pages * PAGE_BYTES) for address, pages, _flags in batch)
        writer.finish()
        self._pager.abandon()
        self._close_stores()

    def _finish_lazy(self) -> None:
        eager, present = {}, {}
        for space, runs in self._runs.items():
            spans = [(address, address + pages * PAGE_BYTES, flags) for address, pages, flags in runs]
            present[space] = PageRanges.from_spans((start, end) for start, end, _flags in spans)
            # What was copied and is no more would otherwise be served as if it were.
            self._stores[space].keep_only(present[space])
            eager[space] = [(start, end) for start, end, flags in spans if not flags & PE_LAZY]
        remote = {space: PageRanges.from_spans(spans) for space, spans in self._remote.items()}
        named = {space: store for space, store in self._stores.items() if space in self._runs}
        for lazy in write_lazy_images(self._images, self._criu_version, named, present=present, eager=eager):
            space = SpaceId("task", lazy.vpid)
            hot = _hot(self._last.get(space, ()), lazy.spans)
            missing = remote.pop(space, EMPTY)
            if missing - PageRanges.from_spans(lazy.spans):
                raise ProtocolViolation(f"memory of {space} was kept back that a restore can not do without")
            self._pager.add_space(lazy.vpid, named[space], lazy.spans, hot, missing.spans())
            self.missing[lazy.vpid] = missing
        if remote:
            raise ProtocolViolation("memory was kept back of tasks that are not there")
        self._pager.wait_until_told()
        if self._keep_stores:
            self.kept = {space.id: store.duplicate() for space, store in named.items() if space.kind == "task"}
        if not any(self.missing.values()):
            self._close_stores()

    def _close_stores(self) -> None:
        """The pager has descriptors of its own by now."""
        for store in self._stores.values():
            store.close()
        self._stores = {}

    def close_kept(self) -> None:
        while self.kept:
            self.kept.popitem()[1].close()

    def close(self) -> None:
        self._writer.close()
        self.close_kept()
        self._close_stores()


def _hot(last: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) of what a program will touch first when it runs again: a fault costs it more than a copy."""
    changed = [(address, address + pages * PAGE_BYTES) for address, pages in last]
    small = [(start, end) for start, end in spans if end - start <= SMALL_MAPPING_BYTES]
    return [*changed, *small][:MAX_HOT_RANGES]


def _batches(runs: Sequence[Run]) -> list[list[Run]]:
    """In pieces that fit a buffer; a long run is cut."""
    result: list[list[Run]] = [[]]
    used = 0
    for address, pages, flags in runs:
        while pages:
            if used == COPY_PAGES:
                result.append([])
                used = 0
            count = min(pages, COPY_PAGES - used)
            result[-1].append((address, count, flags))
            address, pages, used = address + count * PAGE_BYTES, pages - count, used + count
    return [batch for batch in result if batch]
