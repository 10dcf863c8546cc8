"""The target's store: received pages, each at its own address in a sparse memory file, until they are memory again.

Nothing is indexed: a later round overwrites in place, presence is what the file has (SEEK_DATA), and a page that was
consumed is punched out, so that memory is there once and not twice. tmpfs takes any offset that is an address.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from runtime.errors import CorruptData, NoRoom
from runtime.linux.files import punch_hole
from runtime.memory.digests import MemoryDigest
from runtime.memory.ranges import PageRanges
from runtime.memory.sparse import data_runs

PAGE_BYTES = 4096
# Five-level page tables have 57 bits of address; user space half of it.
MAX_ADDRESS = 1 << 56
_READ_BYTES = 1 << 20


class Store:
    """Pages of one address space, or of one segment of shared memory (then an address is an offset in it).

    Ranges are (address, size in bytes), whole pages. Not for use by several threads at once, but for ``write`` and
    ``reserve`` of ranges that do not overlap.
    """

    def __init__(self, name: str, *, fd: int | None = None) -> None:
        """``name`` shows in /proc/PID/fd and nowhere else. ``fd``: an empty memory file to use, which is closed in the
        end."""
        self._fd = os.memfd_create(f"cmigrate-store-{name}"[:200], os.MFD_CLOEXEC) if fd is None else fd
        # Several, because several streams may receive at once; taking from a list is one step to other threads.
        self._scratch: list[bytearray] = []

    def fileno(self) -> int:
        return self._fd

    def duplicate(self) -> Store:
        """The same pages, for somebody who closes it by himself."""
        other = Store.__new__(Store)
        other._fd, other._scratch = os.dup(self._fd), []
        return other

    def close(self) -> None:
        """Give up the store; its memory is freed when nobody else (the pager) holds it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Filling

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Put pages in, over what was there. Raises CorruptData for an impossible range, and NoRoom."""
        view = memoryview(data).cast("B")
        _check(address, len(view))
        with _no_room_named():
            while len(view):
                written = os.pwrite(self._fd, view, address)
                view, address = view[written:], address + written

    @contextlib.contextmanager
    def reserve(self, address: int, size_bytes: int) -> Iterator[memoryview]:
        """Memory to receive the pages of this range into; they are in the store when the block ends well.

        The memory is used again afterwards, and is not zeroed before.
        """
        _check(address, size_bytes)
        with self.scratch(size_bytes) as view:
            yield view
            self.write(address, view)

    @contextlib.contextmanager
    def scratch(self, size_bytes: int) -> Iterator[memoryview]:
        """Memory for pages of several ranges that come in one go; the caller writes them."""
        # A mapping of the file itself would save the copy, and costs more than that in page faults: 1.3 GB/s of new
        # pages against 2.6 through a buffer that stays in the cache.
        scratch = self._scratch.pop() if self._scratch else bytearray()
        if len(scratch) < size_bytes:
            scratch = bytearray(size_bytes)
        try:
            with memoryview(scratch) as whole, whole[:size_bytes] as view:
                yield view
        finally:
            self._scratch.append(scratch)

    def punch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These pages are no more: they went away on the source, became zero, or are memory again."""
        for address, size_bytes in ranges:
            _check(address, size_bytes)
            if size_bytes:
                punch_hole(self._fd, address, size_bytes)

    def keep_only(self, ranges: PageRanges) -> None:
        """Every other page is no more. To look for what is here would take 5 ms for each GiB of it."""
        start = 0
        for kept, end in [*ranges.spans(), (MAX_ADDRESS, MAX_ADDRESS)]:
            self.punch([(start, kept - start)])
            start = end

    # Reading

    @property
    def bytes(self) -> int:
        """How much the store holds."""
        return os.fstat(self._fd).st_blocks * 512

    def runs(self, start: int = 0, end: int = MAX_ADDRESS) -> Iterator[tuple[int, int]]:
        """(address, size in bytes) of every stretch of pages that are here, within these bounds, in order."""
        return data_runs(self._fd, start, end)

    def read_into(self, address: int, view: memoryview) -> None:
        """Fill ``view`` with the pages from ``address`` on; those that are not here are zeros."""
        while len(view):
            got = os.preadv(self._fd, [view], address)
            if not got:
                view[:] = bytes(len(view))
                return
            view, address = view[got:], address + got

    def digest(self, ranges: Iterable[tuple[int, int]] | None = None) -> str:
        """Of every page that is not all zeros (in these ranges; they must ascend): see MemoryDigest."""
        digest = MemoryDigest()
        buffer = memoryview(bytearray(_READ_BYTES))
        for start, size in ranges if ranges is not None else ((0, MAX_ADDRESS),):
            for address, length in self.runs(start, start + size):
                for offset in range(0, length, _READ_BYTES):
                    piece = buffer[: min(_READ_BYTES, length - offset)]
                    self.read_into(address + offset, piece)
                    digest.add(address + offset, piece)
        return digest.hexdigest()


def _check(address: int, size_bytes: int) -> None:
    if address % PAGE_BYTES or size_bytes % PAGE_BYTES or size_bytes < 0:
        raise CorruptData(f"{size_bytes} bytes at {address:#x} are not whole pages")
    if not 0 <= address <= MAX_ADDRESS - size_bytes:
        raise CorruptData(f"{size_bytes} bytes at {address:#x} are outside of any address space")


@contextlib.contextmanager
def _no_room_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        raise NoRoom("no memory left for received pages", hint="the target needs room for the container") from error
