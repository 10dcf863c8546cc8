"""The build id of a program or library: what CRIU compares on the target. Reads bytes, starts nothing.

Layout: elf(5); the note is a NT_GNU_BUILD_ID in a PT_NOTE segment.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PT_NOTE = 4
NT_GNU_BUILD_ID = 3
# A hostile file must not make us read much: real programs have about a dozen segments and notes below 1 KiB.
MAX_SEGMENTS = 128
MAX_NOTES_BYTES = 16 << 10
MAX_BUILD_ID_BYTES = 64

ReadAt = Callable[[int, int], bytes]
"""(length, offset) -> bytes, shorter at the end of the file: os.pread with the descriptor bound."""


@dataclass(frozen=True, kw_only=True)
class Elf:
    """``bits`` is 32 or 64; ``build_id`` is empty where the file has none."""

    bits: int
    build_id: bytes


def read_elf(read_at: ReadAt) -> Elf | None:
    """None when the file is not ELF, or is damaged."""
    head = read_at(64, 0)
    if len(head) < 52 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    bits = 32 if head[4] == 1 else 64
    order = "<" if head[5] == 1 else ">"
    try:
        build_id = next((note for part in _notes(head, bits, order, read_at) for note in _ids(part, order)), b"")
    except struct.error:
        return None
    return Elf(bits=bits, build_id=build_id)


def _notes(head: bytes, bits: int, order: str, read_at: ReadAt) -> Iterator[bytes]:
    """The content of every PT_NOTE segment."""
    if bits == 64:
        (table,) = struct.unpack_from(order + "Q", head, 32)
        size, count = struct.unpack_from(order + "HH", head, 54)
    else:
        (table,) = struct.unpack_from(order + "I", head, 28)
        size, count = struct.unpack_from(order + "HH", head, 42)
    if size < (56 if bits == 64 else 32) or count > MAX_SEGMENTS or table >= 1 << 62:
        return
    entries = read_at(size * count, table)
    for start in range(0, len(entries) - size + 1, size):
        (kind,) = struct.unpack_from(order + "I", entries, start)
        if kind != PT_NOTE:
            continue
        if bits == 64:
            (offset,) = struct.unpack_from(order + "Q", entries, start + 8)
            (length,) = struct.unpack_from(order + "Q", entries, start + 32)
        else:
            (offset,) = struct.unpack_from(order + "I", entries, start + 4)
            (length,) = struct.unpack_from(order + "I", entries, start + 16)
        if offset < 1 << 62:
            yield read_at(min(length, MAX_NOTES_BYTES), offset)


def _ids(notes: bytes, order: str) -> Iterator[bytes]:
    position = 0
    while position + 12 <= len(notes):
        name_size, value_size, kind = struct.unpack_from(order + "III", notes, position)
        name_at = position + 12
        value_at = name_at + (name_size + 3 & ~3)
        name = notes[name_at : name_at + name_size]
        if kind == NT_GNU_BUILD_ID and name == b"GNU\0" and value_size <= MAX_BUILD_ID_BYTES:
            value = notes[value_at : value_at + value_size]
            if len(value) == value_size:
                yield value
        position = value_at + (value_size + 3 & ~3)
