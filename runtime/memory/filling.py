"""One process being filled by the pager: its faults answered, its memory filled, its events followed. Stdlib only.

The rule that keeps memory right: a page is answered with zeros only where nothing is left to fill, and neither copying
nor zeroing ever replaces a page that exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.linux import faults
from runtime.linux.faults import PAGE_BYTES, FaultMessage, NotRegistered, ProcessGone, TryAgain
from runtime.linux.files import punch_hole
from runtime.memory.segments import Segments
from runtime.memory.sparse import KnownRuns, first_pages

# What is filled at a time when nobody waits, and when somebody waited just now: the next fault waits at most this long.
FILL_BYTES = 1 << 20
FILL_BYTES_AMID_FAULTS = 128 << 10
# Filled around a page that somebody waits for; neighbours are often next, and a copy this short costs no more.
AROUND_BYTES = 64 << 10


class Buffer:
    """Memory for one copy at a time, there from the start: nothing has to be allocated when it counts."""

    def __init__(self) -> None:
        self._area = mmap.mmap(-1, FILL_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self.view = memoryview(self._area)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._area))


@dataclass(kw_only=True)
class Counters:
    """What the pager did so far; sizes are in bytes.

    ``remote_faults`` are those for pages that had not come yet. ``longest_wait_ms`` is of one fault, from its reading.
    """

    faults: int = 0
    remote_faults: int = 0
    longest_wait_ms: float = 0.0
    zero_faults: int = 0
    fault_bytes: int = 0
    filled_bytes: int = 0
    forks: int = 0
    moves: int = 0
    removals: int = 0


class StoreFile:
    """The store of an address space, and who is still filled from it: after a fork several are.

    ``wanted``: offsets of pages that somebody waits for and that have not come yet; for the caller to ask for.
    """

    def __init__(self, fd: int, vpid: int = 0) -> None:
        self.fd = fd
        self.vpid = vpid
        self.users = 0
        self.runs = KnownRuns(fd)
        """Of what is left in somebody's segments: what was consumed is in nobody's."""
        self.wanted: list[int] = []
        self._asked: set[int] = set()

    def want(self, offset: int) -> bool:
        """Noted once, whoever waits for it; whether it was new."""
        if offset in self._asked:
            return False
        self._asked.add(offset)
        self.wanted.append(offset)
        return True

    def take(self) -> None:
        self.users += 1

    def drop(self) -> None:
        self.users -= 1
        if not self.users:
            os.close(self.fd)

    def consumed(self, offset: int, length_bytes: int) -> None:
        """Free what has become memory, unless a fork may still need it."""
        if self.users == 1:
            punch_hole(self.fd, offset, length_bytes)


class Filling:
    """One address space. Methods raise ProcessGone when it is no more, and KernelCallFailed.

    ``segments`` are in the store, ``remote`` are still to come into it.
    """

    def __init__(
        self,
        descriptor: int,
        store: StoreFile,
        segments: Segments,
        remote: Segments,
        hot: Iterable[tuple[int, int]],
        buffer: Buffer,
        counters: Counters,
    ) -> None:
        os.set_blocking(descriptor, False)
        store.take()
        self.descriptor = descriptor
        self.store = store
        self._segments = segments
        self._remote = remote
        self._hot = deque(hot)
        self._buffer = buffer
        self._counters = counters
        self._waiting: deque[int] = deque()
        self._parked: list[int] = []
        self._since: dict[int, float] = {}

    @property
    def complete(self) -> bool:
        return not (self._segments or self._remote or self._waiting or self._parked)

    @property
    def remote_bytes(self) -> int:
        """What has not come yet."""
        return self._remote.bytes

    @property
    def has_work(self) -> bool:
        """Whether there is something to fill, or nothing left at all."""
        return bool(self._segments) or self.complete

    @property
    def waiting(self) -> bool:
        """Whether a fault could not be answered yet."""
        return bool(self._waiting)

    def close(self) -> None:
        os.close(self.descriptor)
        self.store.drop()

    def arrived(self, start: int, end: int) -> None:
        """What lies between these offsets of the store can be filled now."""
        for segment in self._remote.take_stored(start, end):
            self._segments.add(segment)
        self._look_again()

    def _look_again(self) -> None:
        """Who waits for a page that had not come: it may have come, moved, or be no more."""
        self._waiting.extend(self._parked)
        self._parked.clear()

    def listen(self, born: list[Filling]) -> None:
        """Read what the kernel has to say, obey, and answer who waits. Processes that came by fork go into ``born``,
        also when this raises: their parent may be gone while they live."""
        while messages := faults.read_messages(self.descriptor):
            for message in messages:
                self._obey(message, born)
        for _ in range(len(self._waiting)):
            self._answer(self._waiting.popleft())

    def _obey(self, message: FaultMessage, born: list[Filling]) -> None:
        if message.event == faults.UFFD_EVENT_PAGEFAULT:
            self._counters.faults += 1
            address = message.second & -PAGE_BYTES
            self._since.setdefault(address, time.monotonic())
            self._waiting.append(address)
        elif message.event == faults.UFFD_EVENT_FORK:
            self._counters.forks += 1
            born.append(
                Filling(
                    message.first & 0xFFFFFFFF,
                    self.store,
                    self._segments.copy(),
                    self._remote.copy(),
                    self._hot,
                    self._buffer,
                    self._counters,
                )
            )
        elif message.event == faults.UFFD_EVENT_REMAP:
            self._counters.moves += 1
            self._segments.move(message.first, message.second, message.third)
            self._remote.move(message.first, message.second, message.third)
            self._look_again()
        elif message.event in (faults.UFFD_EVENT_REMOVE, faults.UFFD_EVENT_UNMAP):
            self._counters.removals += 1
            self._segments.cut(message.first, message.second)
            self._remote.cut(message.first, message.second)
            self._look_again()

    def _answer(self, address: int) -> None:
        """Give the page somebody waits for, and its neighbours; put it back when memory is about to change."""
        segment = self._remote.at(address)
        if segment is not None:
            self._parked.append(address)
            self._counters.remote_faults += self.store.want(address - segment.start + segment.offset)
            return
        try:
            done = self._copy_around(address) or self._zero(address)
        except TryAgain:
            self._waiting.append(address)
            return
        except NotRegistered:
            done = 0  # unmapped meanwhile, or protected apart: it looks again and finds out
        if not done:
            # It exists already: filled between the fault and now.
            faults.wake(self.descriptor, address, PAGE_BYTES)
        since = self._since.pop(address, None)
        if since is not None:
            waited_ms = (time.monotonic() - since) * 1000
            self._counters.longest_wait_ms = max(self._counters.longest_wait_ms, waited_ms)

    def _copy_around(self, address: int) -> int:
        segment = self._segments.at(address)
        if segment is None:
            return 0
        shift = segment.offset - segment.start
        low = max(segment.start, address & -AROUND_BYTES)
        high = min(segment.end, (address & -AROUND_BYTES) + AROUND_BYTES)
        run = first_pages(self.store.fd, address + shift, high + shift, PAGE_BYTES)
        if run is None or run[0] != address + shift:
            return 0
        try:
            done = self._copy(address, run[0], run[1])
        except NotRegistered:
            done = self._copy(address, run[0], PAGE_BYTES)  # as in _fill_page
        before = first_pages(self.store.fd, low + shift, address + shift, PAGE_BYTES) if done else None
        if before is not None:
            with contextlib.suppress(TryAgain, NotRegistered):
                done += self._copy(before[0] - shift, *before)
        self._counters.fault_bytes += done
        return done

    def _zero(self, address: int) -> int:
        done = faults.zero(self.descriptor, address, PAGE_BYTES)
        self._counters.zero_faults += 1
        self._segments.cut(address, address + PAGE_BYTES)
        return done

    def _copy(self, address: int, offset: int, length_bytes: int) -> int:
        """Copy as far as it goes, and take it off what is left to fill; 0 when the first page exists already.

        Raises TryAgain or NotRegistered where nothing could be done.
        """
        view = self._buffer.view[:length_bytes]
        if os.preadv(self.store.fd, [view], offset) != length_bytes:
            raise OSError("the store ended within its pages")
        done = faults.copy(self.descriptor, address, self._buffer.address, length_bytes)
        settled = done or PAGE_BYTES
        self._segments.cut(address, address + settled)
        self.store.consumed(offset, settled)
        self._counters.filled_bytes += done
        return done

    def fill(self, limit_bytes: int) -> bool:
        """Fill one piece, the hottest first; False when nothing could be done now because memory is changing."""
        while self._hot:
            start, end = self._hot[0]
            if self._fill_within(start, end, limit_bytes):
                return True
            if self._segments.first(start, end) is not None:
                return False
            self._hot.popleft()
        return self._fill_within(0, 1 << 64, limit_bytes)

    def _fill_within(self, start: int, end: int, limit_bytes: int) -> bool:
        segment = self._segments.first(start, end)
        if segment is None:
            return False
        shift = segment.offset - segment.start
        run = self.store.runs.next(segment.offset, segment.end + shift)
        if run is None:
            self._segments.cut(segment.start, segment.end)
            return True
        address, length = run[0] - shift, min(run[1], limit_bytes)
        self._segments.cut(segment.start, address)
        try:
            self._copy(address, run[0], length)
        except TryAgain:
            return False
        except NotRegistered:
            return self._fill_page(address, run[0])
        return True

    def _fill_page(self, address: int, offset: int) -> bool:
        """A copy must lie within one mapping, and a program may have cut its mappings since: one page never crosses.

        The kernel may also be in the middle of moving this memory, with the event still to come. It says TryAgain then
        before it looks for the memory; so what is not there twice in a row, without an event, is not there.
        """
        try:
            self._copy(address, offset, PAGE_BYTES)
        except TryAgain:
            return False
        except NotRegistered:
            self._segments.cut(address, address + PAGE_BYTES)
        return True


__all__ = ["Buffer", "Counters", "Filling", "ProcessGone", "StoreFile"]
