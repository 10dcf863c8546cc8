"""The parts of a checkpoint file (runtime/archive.py): manifest, footer, and how a member is read.

Nothing here opens a file, and what it is given is not trusted.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import xxhash
import zstandard

from runtime import tar
from runtime.errors import CorruptData

FORMAT, VERSION = "cmigrate checkpoint", 1
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 << 20
COPY_BYTES = 1 << 20
MAX_WINDOW_BYTES = 1 << 27
"""Memory that a frame may make a decompressor take."""

NAME = re.compile(r"(?!manifest\.json$)[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}")
# RFC 8878 3.1.2: magic numbers 0x184D2A50 to 5F begin a frame to be skipped. Then our own magic, place and length of
# the manifest's frame and its checksum, and the checksum of these.
_SKIPPABLE_MAGIC = 0x184D2A5C
_FOOTER_MAGIC = b"CMIGRATE"
_FOOTER = struct.Struct("<II8sQQ16s8s")
FOOTER_BYTES = _FOOTER.size

Kind = Literal["json", "file", "tree"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One member: a frame at ``offset``, ``frame_bytes`` long, that holds ``tar_bytes`` of tar entries."""

    name: str
    kind: Kind
    offset: int
    frame_bytes: int
    tar_bytes: int
    xxh3: str


def pack_footer(manifest: Member) -> bytes:
    """The skippable frame at the end of the file."""
    payload = _FOOTER_MAGIC + struct.pack("<QQ16s", manifest.offset, manifest.frame_bytes, bytes.fromhex(manifest.xxh3))
    return struct.pack("<II", _SKIPPABLE_MAGIC, FOOTER_BYTES - 8) + payload + xxhash.xxh3_64_digest(payload)


def parse_footer(footer: bytes) -> Member | None:
    """Where the manifest is; None for anything that ``pack_footer`` did not write, to the last bit."""
    if len(footer) != FOOTER_BYTES:
        return None
    offset, length, checksum = _FOOTER.unpack(footer)[3:6]
    found = Member(
        name=MANIFEST, kind="json", offset=offset, frame_bytes=length, tar_bytes=MAX_JSON_BYTES, xxh3=checksum.hex()
    )
    return found if pack_footer(found) == footer else None


def parse_manifest(content: bytes, end: int) -> dict[str, Member]:
    """``end`` is where the members' frames end: they follow each other without a gap."""
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise CorruptData("the file is no checkpoint")
        if manifest["version"] != VERSION:
            raise CorruptData(
                f"the checkpoint has format version {manifest['version']!r}, this version knows {VERSION}",
                hint="use the version of cmigrate that wrote it, or a later one",
            )
        members = [Member(**member) for member in manifest["members"]]
        position = 0
        for member in members:
            fits = NAME.fullmatch(member.name) and member.kind in ("json", "file", "tree")
            numbers = (member.offset, member.frame_bytes, member.tar_bytes)
            if (
                not fits
                or any(type(number) is not int or number < 0 for number in numbers)
                or member.offset != position
            ):
                raise ValueError(member)
            position += member.frame_bytes
        if position != end or len({member.name for member in members}) != len(members):
            raise ValueError(position)
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptData(f"the checkpoint's {MANIFEST} does not fit: {error!r}") from error
    return {member.name: member for member in members}


class MemberReader:
    """The tar entries of one member, decompressed as they are asked for: memory does not grow with any size."""

    def __init__(self, member: Member, raw: Iterator[bytes]) -> None:
        self._member = member
        self._left = member.tar_bytes
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._stream = decompressor.stream_reader(_Pieces(raw))  # type: ignore[arg-type]

    @property
    def at_end(self) -> bool:
        return self._left == 0

    def read(self, size: int) -> bytes:
        """Exactly so many bytes."""
        pieces = []
        if size > self._left:
            raise CorruptData("it ends early")
        self._left -= size
        while size:
            piece = self._stream.read(size)
            if not piece:
                raise CorruptData("it ends early")
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def next_entry(self) -> tuple[tar.TarEntry, int]:
        """The next entry and how many bytes follow it, which must be read with their padding before the next."""
        parser = tar.TarParser()
        while True:
            found = parser.feed(self.read(parser.wanted))
            if found is not None:
                return found

    def file_pieces(self, most_bytes: int | None = None) -> Iterator[bytes]:
        """The content of the one regular file that the member is."""
        entry, size = self.next_entry()
        if entry.name != self._member.name.encode() or entry.kind != tar.FILE or entry.data is not None:
            raise CorruptData(f"it holds {entry.name!r}")
        if most_bytes is not None and size > most_bytes:
            raise CorruptData(f"it is {size} bytes long, and {most_bytes} are allowed")
        for start in range(0, size, COPY_BYTES):
            yield self.read(min(COPY_BYTES, size - start))
        self.read(len(tar.padding(size)))

    def end_of_tar(self) -> None:
        """What follows the last member: the end of the tar file, and nothing else."""
        if self.read(len(tar.END)) != tar.END:
            raise CorruptData("it does not end where it should")
        self._left = 0

    def finish(self) -> None:
        """Raises CorruptData when there is more than was announced."""
        if self._left or self._stream.read(1):
            raise CorruptData("there is more in it than there should be")


class _Pieces:
    """An iterator of bytes as the file that zstandard reads from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._pieces, b"")
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece
