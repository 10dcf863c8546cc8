"""What CRIU says to a page server, decoded without I/O.

A dump with ``opts.ps.fd`` writes each space's pages to that socket, as headers in native byte order, some followed by
pages. The facts are those of CRIU's criu/page-xfer.c; both ends are on one host, so byte order and page size agree.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from runtime.errors import CriuFailed

PAGE_BYTES = 4096

# criu/include/pagemap.h: what is known of a run of pages.
PE_PARENT = 1
PE_LAZY = 2
PE_PRESENT = 4
KNOWN_FLAGS = PE_PARENT | PE_LAZY | PE_PRESENT

# criu/page-xfer.c: PS_IOV_*. GET and what came after belongs to lazy-pages servers and is not spoken here.
_ADD, _HOLE, _OPEN, _OPEN2, _PARENT, _ADD_F = 1, 2, 3, 4, 5, 6
_CLOSE, _FORCE_CLOSE = 0x1023, 0x1024
_TYPE_TASK, _TYPE_SHMEM = 1, 2
_COMMAND_MASK, _FLAGS_SHIFT = 0xFFFF, 16
_TYPE_MASK, _ID_SHIFT = 0xFF, 8
# No address space has more: 57 bits of address with five-level page tables.
MAX_SPACE_BYTES = 1 << 57

# nr_pages grew from 32 to 64 bits in CRIU 4.2 (commit 7e0da4d97), and four bytes of padding came with it.
_WIDE_SINCE = (4, 2, 0)
_NARROW = struct.Struct("=IIQQ")
_WIDE = struct.Struct("=I4xQQQ")
_STATUS = struct.Struct("=i")


class UnknownPageCommand(CriuFailed):
    """CRIU said something that is not in the protocol; where the next header begins is unknown from here on."""


@dataclass(frozen=True, slots=True)
class SpaceId:
    """One space of pages in an image set: a task's (``id``: pid in its namespace) or shared memory's (its shmid)."""

    kind: Literal["task", "shmem"]
    id: int

    def __post_init__(self) -> None:
        if self.kind not in ("task", "shmem") or self.id < 0:
            raise ValueError(f"{self.kind!r} {self.id} is not a space")

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


class CommandKind(Enum):
    OPEN = "open"
    """A space begins. Legacy senders expect no answer."""
    RUN = "run"
    """Pages at an address; their bytes follow when PE_PRESENT is among the flags."""
    PARENT = "parent"
    """Is there an earlier dump of this space to build on?"""
    CLOSE = "close"
    """Everything has been said; CRIU waits for the verdict."""


class Command(NamedTuple):
    """A decoded header. A tuple, because memory in small pieces makes one for every page."""

    kind: CommandKind
    space: SpaceId | None
    address: int
    pages: int
    flags: int
    wants_answer: bool

    @property
    def data_bytes(self) -> int:
        """How many bytes follow the header."""
        return self.pages * PAGE_BYTES if self.flags & PE_PRESENT else 0


class PageProtocol:
    """Decoder for the CRIU of this version."""

    def __init__(self, criu_version: tuple[int, int, int]) -> None:
        self._layout = _WIDE if criu_version >= _WIDE_SINCE else _NARROW
        self.header_bytes = self._layout.size
        self._known: tuple[int, SpaceId] | None = None

    def parse(self, header: bytes | bytearray | memoryview) -> Command:
        """Decode ``header_bytes`` bytes. Raises UnknownPageCommand."""
        word, pages, address, destination = self._layout.unpack(header)
        number, flags = word & _COMMAND_MASK, word >> _FLAGS_SHIFT
        if number == _ADD_F:
            return self._run(destination, address, pages, flags)
        if number in (_OPEN2, _OPEN):
            return Command(CommandKind.OPEN, self._space(destination), 0, 0, 0, number == _OPEN2)
        if number in (_CLOSE, _FORCE_CLOSE):
            return Command(CommandKind.CLOSE, None, 0, 0, 0, True)
        if number == _PARENT:
            return Command(CommandKind.PARENT, self._space(destination), 0, 0, 0, True)
        if number in (_ADD, _HOLE):
            return self._run(destination, address, pages, PE_PRESENT if number == _ADD else PE_PARENT)
        raise UnknownPageCommand(
            f"CRIU sent the unknown page command {number:#x}", hint="is this CRIU newer than this program knows?"
        )

    def answer(self, command: Command) -> bytes:
        """What CRIU waits for after ``command`` when all is well; empty when it does not wait."""
        if not command.wants_answer:
            return b""
        if command.kind is CommandKind.OPEN:
            # "No parent". With a parent CRIU would look for signs of reused pids, and fail without finding them.
            return b"\0"
        return _STATUS.pack(0)

    def _run(self, destination: int, address: int, pages: int, flags: int) -> Command:
        if flags & ~KNOWN_FLAGS:
            raise UnknownPageCommand(f"CRIU sent pages with unknown flags {flags:#x}")
        if not pages or address % PAGE_BYTES or address + pages * PAGE_BYTES > MAX_SPACE_BYTES:
            raise UnknownPageCommand(f"CRIU sent an impossible run of {pages} pages at {address:#x}")
        return Command(CommandKind.RUN, self._space(destination), address, pages, flags, False)

    def _space(self, destination: int) -> SpaceId:
        if self._known is not None and self._known[0] == destination:
            return self._known[1]
        kind = destination & _TYPE_MASK
        if kind not in (_TYPE_TASK, _TYPE_SHMEM):
            raise UnknownPageCommand(f"CRIU sent pages of the unknown kind {kind}")
        space = SpaceId("task" if kind == _TYPE_TASK else "shmem", destination >> _ID_SHIFT)
        self._known = (destination, space)
        return space


def refusal() -> bytes:
    """The answer to CLOSE that makes CRIU give up the dump."""
    return _STATUS.pack(-1)


def zero_pages_may_be_left_out(space: SpaceId, flags: int) -> bool:
    """Whether a page full of zeros in such a run may be left out of the images: memory without it reads as zero too.

    True for private anonymous memory, which CRIU marks PE_LAZY. In a private file mapping a page left out is a page of
    the file. (CRIU does not mark a thread's stack page or locked memory either; those are few and stay.)
    """
    return space.kind == "task" and bool(flags & PE_LAZY)
