"""Entries of a tar file in the pax format (POSIX.1-2001), as far as archives of ours need them. No I/O.

Written here and not by the standard library's tarfile, which loses nanoseconds, holes and names that are no text, and
which reads whatever a header announces into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from runtime.errors import CorruptData

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
"""What ends a tar file."""
MAX_RECORDS_BYTES = 16 << 20
"""Of one entry: twice over its attributes, which are 64 of 64 KiB at most."""
MAX_RANGES = 8192
"""Of data in a file with holes: what its map may list, besides the end."""

FILE, LINK, SYMLINK, CHAR, BLOCK, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_RECORDS = b"x"
_SPARSE = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}
_OCTAL_7, _OCTAL_11 = 8**7 - 1, 8**11 - 1

Range = tuple[int, int]
"""Start and end of a part of a file."""


@dataclass(frozen=True, kw_only=True)
class TarEntry:
    """One entry. ``size`` is that of its data in the tar file; ``data`` says where they belong in a file with holes of
    ``real_size`` bytes, None for one without. ``comment`` is kept with it and means nothing to other programs."""

    name: bytes
    kind: bytes = FILE
    size: int = 0
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    comment: bytes = b""
    data: tuple[Range, ...] | None = None
    real_size: int = 0


def padding(size: int) -> bytes:
    """What follows ``size`` bytes of data, so that the next entry begins with a block."""
    return bytes(-size % BLOCK_BYTES)


def encode(entry: TarEntry) -> bytes:
    """The entry's headers and map of data. ``size`` bytes of data follow, and their ``padding``."""
    records: list[tuple[bytes, bytes]] = []
    lead = b""
    if entry.data is not None:
        # Nothing at the very end: how GNU tar learns that the file ends with a hole.
        lead = _encode_map((*entry.data, (entry.real_size, entry.real_size)))
        records += [*_SPARSE.items(), (b"GNU.sparse.name", entry.name)]
        records.append((b"GNU.sparse.realsize", b"%d" % entry.real_size))
    size = entry.size + len(lead)
    if len(entry.name) > 100:
        records.append((b"path", entry.name))
    if len(entry.target) > 100:
        records.append((b"linkpath", entry.target))
    for key, number, most in ((b"size", size, _OCTAL_11), (b"uid", entry.uid, _OCTAL_7), (b"gid", entry.gid, _OCTAL_7)):
        if number > most:
            records.append((key, b"%d" % number))
    if entry.mtime_ns % 10**9 or not 0 <= entry.mtime_ns // 10**9 <= _OCTAL_11:
        records.append((b"mtime", _seconds(entry.mtime_ns)))
    records += [(b"SCHILY.xattr." + name, value) for name, value in entry.xattrs if b"=" not in name]
    if entry.comment:
        records.append((b"comment", entry.comment))
    header = _header(entry, size)
    if not records:
        return header + lead
    body = b"".join(_record(key, value) for key, value in records)
    announced = TarEntry(name=b"pax/" + entry.name[-90:], kind=_RECORDS)
    return _header(announced, len(body)) + body + padding(len(body)) + header + lead


def _seconds(time_ns: int) -> bytes:
    seconds, rest_ns = divmod(abs(time_ns), 10**9)
    return b"%s%d.%09d" % (b"-" if time_ns < 0 else b"", seconds, rest_ns)


def _record(key: bytes, value: bytes) -> bytes:
    """``LENGTH KEY=VALUE`` and a newline; the length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _octal(number: int, width: int) -> bytes:
    """Zero where it does not fit: a record has it then."""
    return b"%0*o\0" % (width - 1, number if 0 <= number < 8 ** (width - 1) else 0)


def _header(entry: TarEntry, size: int) -> bytes:
    numbers = ((entry.mode & 0o7777, 8), (entry.uid, 8), (entry.gid, 8), (size, 12), (entry.mtime_ns // 10**9, 12))
    before = entry.name[:100].ljust(100, b"\0") + b"".join(_octal(number, width) for number, width in numbers)
    after = entry.kind + entry.target[:100].ljust(100, b"\0") + b"ustar\x0000" + bytes(64)
    after += _octal(entry.device[0], 8) + _octal(entry.device[1], 8) + bytes(167)
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after


def _encode_map(data: tuple[Range, ...]) -> bytes:
    """Format 1.0 of GNU tar: decimal numbers, a line each, before the data."""
    text = b"%d\n" % len(data) + b"".join(b"%d\n%d\n" % (start, end - start) for start, end in data)
    return text + padding(len(text))


class TarParser:
    """Reads entries that ``encode`` wrote. Fed by the caller: ask ``wanted`` for how many bytes to give to ``feed``."""

    def __init__(self) -> None:
        self._records: dict[bytes, bytes] = {}
        self._awaits_records = 0
        self.wanted = BLOCK_BYTES

    def feed(self, block: bytes) -> tuple[TarEntry, int] | None:
        """Takes exactly ``wanted`` bytes; returns an entry and how many bytes follow it, its map and data without
        padding, once its headers are complete. Raises CorruptData."""
        if self._awaits_records:
            self._records = _parse_records(block[: self._awaits_records])
            self._awaits_records, self.wanted = 0, BLOCK_BYTES
            return None
        kind, size = _parse_header(block)
        if kind == _RECORDS:
            if self._records or not 0 < size <= MAX_RECORDS_BYTES:
                raise CorruptData(f"a tar entry has {size} bytes of records")
            self._awaits_records, self.wanted = size, size + len(padding(size))
            return None
        records, self._records = self._records, {}
        size = _number(records[b"size"]) if b"size" in records else size
        sparse = b"GNU.sparse.major" in records
        if sparse and any(records.get(key) != value for key, value in _SPARSE.items()):
            raise CorruptData("a tar entry has holes in a format that is not known")
        entry = TarEntry(
            name=records.get(b"GNU.sparse.name", records.get(b"path", _text(block[:100]))),
            kind=kind,
            comment=records.get(b"comment", b""),
            data=() if sparse else None,
            real_size=_number(records.get(b"GNU.sparse.realsize", b"0")) if sparse else size,
        )
        return entry, size


def _parse_header(block: bytes) -> tuple[bytes, int]:
    """Kind and size."""
    checksum = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
    if len(block) != BLOCK_BYTES or block[257:263] != b"ustar\0" or _parse_octal(block[148:154]) != checksum:
        raise CorruptData("a tar header does not check out")
    return block[156:157], _parse_octal(block[124:135])


def _parse_octal(field: bytes) -> int:
    if not field or any(byte not in b"01234567" for byte in field):
        raise CorruptData("a tar header has no number where there should be one")
    return int(field, 8)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _parse_records(body: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + 20)
        length = _number(body[position:space]) if space > 0 else 0
        record = body[space + 1 : position + length]
        key, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n") or position + length > len(body) or key in found:
            raise CorruptData("a tar entry's records do not fit")
        found[key] = value[:-1]
        position += length
    return found


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise CorruptData("a tar entry has no number where there should be one")
    return int(text)


class MapParser:
    """Reads the map of data of an entry with holes, block by block: ``feed`` returns it when it is complete."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._lines = 0

    def feed(self, block: bytes) -> tuple[Range, ...] | None:
        self._blocks.append(block)
        self._lines += block.count(b"\n")
        count = _number(self._blocks[0].partition(b"\n")[0])
        if count > MAX_RANGES + 1 or len(self._blocks) * BLOCK_BYTES > MAX_RANGES * 48:
            raise CorruptData("a tar entry's map of data is too long")
        if self._lines < 2 * count + 1:
            return None
        *lines, rest = b"".join(self._blocks).split(b"\n")
        numbers = [_number(line) for line in lines[1:]]
        ranges = tuple((start, start + size) for start, size in zip(numbers[::2], numbers[1::2], strict=False))
        flat = list(chain.from_iterable(ranges))
        if rest.strip(b"\0") or len(numbers) != 2 * count or flat != sorted(flat):
            raise CorruptData("a tar entry's map of data does not fit")
        return ranges
