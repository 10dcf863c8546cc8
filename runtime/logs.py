"""Container logs: one JSON object a line, in ``log.jsonl`` and, older, ``log.jsonl.1``. Stdlib only: monitors use it.

  {"t": "2026-01-31T12:00:00.123456789Z", "s": "stdout", "l": "text"}      "t": UTC, "s": or "stderr"
  "p": 1      the line goes on in the stream's next entry: it was long, or written in pieces
  "d": 7      before this entry so many lines are missing, because there was no room for them

Nothing is held back: what was read from a pipe is in the file when ``write`` returns, so a monitor that is killed and
a container that is moved in the middle of a line lose nothing. Bytes that are no UTF-8 are kept as surrogates
(\\udc80 to \\udcff, PEP 383); a character that was cut in two is whole again when its pieces are joined.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_FILE_BYTES = 16 << 20
# Of what is read back; a piece is at most what a pipe holds, times six for a control character's escape.
MAX_ENTRY_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
FOLLOW_POLL_S = 0.05
STREAMS = ("stdout", "stderr")


def rotated(path: Path) -> Path:
    """Where the older half of the log at ``path`` is."""
    return path.with_name(f"{path.name}.1")


class LogWriter:
    """The only writer of one log. Never raises for want of room: it drops, counts, and says so when there is room."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._fd = -1
        self._size = 0
        self.dropped_lines = 0
        """Not yet told of in the log."""
        self._open()

    def _open(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._size = os.fstat(fd).st_size
        # A crash of the machine may have torn the last entry: the next must not be torn with it.
        if self._size and os.pread(fd, 1, self._size - 1) != b"\n":
            self._append(b"\n")

    def write(self, stream: str, data: bytes) -> None:
        """Append what came from ``stream`` (stdout or stderr), cut anywhere."""
        if not data:
            return
        if self._size >= self._max_bytes:
            self._rotate()
        lines = data.split(b"\n")
        rest = lines.pop()
        at = utc_nanoseconds()
        entries: list[dict[str, str | int]] = [{"t": at, "s": stream, "l": text_of(line)} for line in lines]
        if rest:
            entries.append({"t": at, "s": stream, "l": text_of(rest), "p": 1})
        if self.dropped_lines:
            entries[0]["d"] = self.dropped_lines
        if self._append("".join(json.dumps(entry) + "\n" for entry in entries).encode()):
            self.dropped_lines = 0
        else:
            self.dropped_lines += len(lines) or 1

    def _append(self, data: bytes) -> bool:
        """All of it or nothing."""
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            return False
        self._size += len(data)
        return True

    def _rotate(self) -> None:
        with contextlib.suppress(OSError):
            os.replace(self._path, rotated(self._path))
            self._open()

    def flush(self) -> None:
        """Nothing to do: ``write`` holds nothing back."""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def utc_nanoseconds() -> str:
    """RFC 3339 with nanoseconds; of one length, so that comparing texts compares times."""
    now_ns = time.time_ns()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now_ns // 10**9))}.{now_ns % 10**9:09d}Z"


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """A whole line. ``at`` is when its first piece was written (RFC 3339, UTC); ``text`` has no line feed."""

    at: str
    stream: str
    text: str


def read_log(
    path: Path, *, since: str | None = None, tail: int | None = None, follow: Callable[[], bool] | None = None
) -> Iterator[LogLine]:
    """The log's lines, oldest first; from ``since`` (RFC 3339 in UTC) on, and of those the last ``tail``.

    With ``follow`` it goes on with what is added for as long as ``follow()`` says that more may come, and ends after
    what was written before that said no. A log that is not there is empty; what is damaged is passed over.
    """
    wanted = None if since is None else since.removesuffix("Z")
    joiner, source = _Joiner(), _Entries(path)
    try:
        written = _lines(source, joiner, wanted)
        if follow is None:
            yield from _last(tail, itertools.chain(written, _newer(joiner.rest(), wanted)))
            return
        yield from _last(tail, written)
        more = True
        while more:
            more = follow()
            yield from _lines(source, joiner, wanted)
            if more:
                time.sleep(FOLLOW_POLL_S)
        yield from _newer(joiner.rest(), wanted)
    finally:
        source.close()


def _lines(source: _Entries, joiner: _Joiner, since: str | None) -> Iterator[LogLine]:
    for entry in source:
        yield from _newer(joiner.add(entry), since)


def _newer(lines: Iterator[LogLine], since: str | None) -> Iterator[LogLine]:
    return (line for line in lines if since is None or line.at.removesuffix("Z") >= since)


def _last(count: int | None, lines: Iterator[LogLine]) -> Iterator[LogLine]:
    return lines if count is None else iter(deque(lines, maxlen=count))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    at: str
    stream: str
    text: str
    goes_on: bool
    dropped: int


class _Entries:
    """Entries of the log's files, oldest first, up to what is there now; iterating again gives what came since."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[BinaryIO] = []
        self._file: BinaryIO | None = None
        self._part = b""
        self._open_all()

    def _open_all(self) -> None:
        current = _open(self._path)
        older = _open(rotated(self._path))
        if current and older and os.path.sameopenfile(current.fileno(), older.fileno()):
            older.close()  # rotated between the two: the new file is found when this one is at its end
            older = None
        self._waiting = [file for file in (older, current) if file]

    def close(self) -> None:
        for file in (self._file, *self._waiting):
            if file:
                file.close()

    def __iter__(self) -> Iterator[_Entry]:
        while True:
            yield from self._read_on()
            if not self._waiting and (newer := self._newer_file()):
                self._waiting.append(newer)
            if not self._waiting:
                return
            yield from self._read_on()  # what came between our last look and the rotation
            if self._file:
                self._file.close()
            self._file, self._part = self._waiting.pop(0), b""

    def _read_on(self) -> Iterator[_Entry]:
        while self._file and (raw := self._file.readline(MAX_ENTRY_BYTES)):
            self._part += raw
            if raw.endswith(b"\n"):
                entry, self._part = parse_entry(self._part), b""
                if entry:
                    yield entry
            elif len(raw) == MAX_ENTRY_BYTES:
                self._part = b"too long"  # and so no entry, wherever it ends
            else:
                return  # it is being written right now

    def _newer_file(self) -> BinaryIO | None:
        file = _open(self._path)
        if file and self._file and os.path.sameopenfile(file.fileno(), self._file.fileno()):
            file.close()
            return None
        return file


def _open(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_entry(raw: bytes) -> _Entry | None:
    """None for what is no entry: torn by a crash, or sent by a peer that lies."""
    try:
        data = json.loads(raw)
        at, stream, text = data["t"], data["s"], data["l"]
        dropped = data.get("d", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(at, str) or not isinstance(text, str) or not isinstance(dropped, int) or stream not in STREAMS:
        return None
    return _Entry(at=at, stream=stream, text=text, goes_on=bool(data.get("p")), dropped=dropped)


class _Joiner:
    """Makes whole lines of pieces, each stream's for itself."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[_Entry]] = {stream: [] for stream in STREAMS}
        self._length = dict.fromkeys(STREAMS, 0)

    def add(self, entry: _Entry) -> Iterator[LogLine]:
        if entry.dropped:
            text = f"cmigrate: {entry.dropped} lines are missing here: there was no room for them"
            yield LogLine(at=entry.at, stream="stderr", text=text)
        self._pieces[entry.stream].append(entry)
        self._length[entry.stream] += len(entry.text)
        if not entry.goes_on or self._length[entry.stream] >= MAX_LINE_BYTES:
            yield self._take(entry.stream)

    def rest(self) -> Iterator[LogLine]:
        """Lines that never ended."""
        unfinished = [stream for stream in STREAMS if self._pieces[stream]]
        for stream in sorted(unfinished, key=lambda stream: self._pieces[stream][0].at):
            yield self._take(stream)

    def _take(self, stream: str) -> LogLine:
        pieces = self._pieces[stream]
        text = "".join(piece.text for piece in pieces)
        self._pieces[stream], self._length[stream] = [], 0
        with contextlib.suppress(UnicodeEncodeError):
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return LogLine(at=pieces[0].at, stream=stream, text=text)
