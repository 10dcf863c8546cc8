"""What a move has decided, on disk before anyone is told: one file of JSON lines for each move and side.

A record is durable when ``append`` returns. A crash can tear only the last line, which was never announced to anyone
and is ignored; any other damage is named, not skipped.

The file is made with room for every record of a move, filled with spaces: a record then overwrites blocks that are
there, which halves the time of a sync and can not fail for want of room between freeze and resume.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from migrate.errors import ProtocolViolation, full_disk_is_no_room
from runtime.errors import CorruptData, RuntimeFault

Side = Literal["source", "target"]
_FILE_NAME = re.compile(r"(?P<move_id>[a-zA-Z0-9_-]{1,64})\.(?P<side>source|target)\.jsonl")
ROOM_BYTES = 8192
"""A move writes about ten records of some 200 bytes."""
MAX_FILE_BYTES = 1 << 20
"""A larger file is no journal of ours."""
RELEASING = "RELEASING"
"""A note of the target between COMMIT_LOGGED and RESUMED, and no phase: from here on the container may have run."""
COMPLETE = "COMPLETE"
"""A note of the target after RESUMED: its agent needs nothing more, and does nothing more for this move."""
NOTES = (RELEASING, COMPLETE)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line: ``phase`` is a name of machine.Phase or target_machine.Phase, ``at`` RFC 3339 in UTC."""

    move_id: str
    epoch: int
    side: Side
    phase: str
    at: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "move_id": self.move_id,
            "epoch": self.epoch,
            "side": self.side,
            "phase": self.phase,
            "at": self.at,
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Raises CorruptData."""
        try:
            record = cls(**{name: data[name] for name in cls.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise CorruptData(f"journal record does not fit: {error!r}") from error
        texts = (record.move_id, record.phase, record.at)
        fits = all(isinstance(value, str) for value in texts) and isinstance(record.details, dict)
        if not fits or record.side not in get_args(Side) or type(record.epoch) is not int:
            raise CorruptData("journal record does not fit")
        return record


@dataclass(frozen=True, kw_only=True)
class MoveJournal:
    """All records of one move on one side, oldest first. ``damage`` says what could not be read, empty when all."""

    move_id: str
    side: Side
    records: tuple[Record, ...]
    damage: str = ""

    @property
    def phase(self) -> str:
        """The last phase that is on disk; empty when none is."""
        return next((record.phase for record in reversed(self.records) if record.phase not in NOTES), "")

    def reached(self, phase: str) -> bool:
        return any(record.phase == phase for record in self.records)

    def details_of(self, phase: str) -> Mapping[str, Any]:
        """Of the last such record; empty when there is none."""
        return next((record.details for record in reversed(self.records) if record.phase == phase), {})


class Journal:
    """Appends to one move's journal. The file is made by the first ``append`` and stays open until ``close``."""

    def __init__(self, directory: Path, move_id: str, *, side: Side, epoch: int = 1) -> None:
        self.path = directory / _file_name(move_id, side)
        self._move_id = move_id
        self._side: Side = side
        self._epoch = epoch
        self._fd = -1
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def open(self) -> None:
        """Make or open the file now, so that an ``append`` in the blackout costs one write and one sync."""
        if self._fd >= 0:
            return
        directory = self.path.parent
        with full_disk_is_no_room(self.path):
            if not directory.exists():
                directory.mkdir(parents=True, mode=0o700)
                _sync_directory(directory.parent)
            new = not self.path.exists()
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._end = _make_room(fd)
                if new:
                    _sync_directory(directory)
            except BaseException:
                os.close(fd)
                raise
        self._fd = fd

    def append(self, phase: str, details: Mapping[str, Any] | None = None, *, epoch: int | None = None) -> Record:
        """Write one record; it is on disk when this returns. Raises NoRoom, and OSError; then nothing is decided."""
        return self._append(phase, details, epoch=epoch, durable=True)

    def try_append(self, phase: str) -> str:
        """``append`` where nothing may wait for it; why it could not be written, empty when it is on the disk."""
        try:
            self.append(phase)
        except (RuntimeFault, OSError) as error:
            return f"{phase} of move {self._move_id} is not on the disk: {error}"
        return ""

    def note(self, what: str, details: Mapping[str, Any] | None = None) -> Record:
        """Write a record that outlives this process, and not a crash of the host: no sync in the blackout for it."""
        return self._append(what, details, epoch=None, durable=False)

    def _append(self, phase: str, details: Mapping[str, Any] | None, *, epoch: int | None, durable: bool) -> Record:
        self.open()
        record = Record(
            move_id=self._move_id,
            epoch=self._epoch if epoch is None else epoch,
            side=self._side,
            phase=str(phase),
            at=utc_now(),
            details=dict(details or {}),
        )
        line = json.dumps(record.to_json(), separators=(",", ":")).encode() + b"\n"
        with full_disk_is_no_room(self.path):
            try:
                if os.pwrite(self._fd, line, self._end) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                # The size is part of what fdatasync makes durable; times are not, and nobody reads them.
                if durable:
                    os.fdatasync(self._fd)
            except BaseException:
                # A record that failed must not be found by the next reader as if it had been written. On a disk that
                # has failed that fails as well.
                with contextlib.suppress(OSError):
                    os.pwrite(self._fd, b" " * len(line), self._end)
                    os.fsync(self._fd)
                raise
        self._end += len(line)
        return record

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_all(directory: Path) -> list[MoveJournal]:
    """Every journal in ``directory``, by name. One that is damaged comes with what could be read and ``damage``."""
    if not directory.exists():
        return []
    found = []
    for path in sorted(directory.iterdir()):
        match = _FILE_NAME.fullmatch(path.name)
        if match and path.is_file():
            side: Side = "source" if match["side"] == "source" else "target"
            found.append(_read(path, match["move_id"], side))
    return found


def read_one(directory: Path, move_id: str, side: Side) -> MoveJournal | None:
    """The journal of one move, None when there is none. Raises ProtocolViolation for what can be no move id."""
    path = directory / _file_name(move_id, side)
    return _read(path, move_id, side) if path.is_file() else None


def _file_name(move_id: str, side: Side) -> str:
    name = f"{move_id}.{side}.jsonl"
    if not _FILE_NAME.fullmatch(name):
        raise ProtocolViolation(f"{move_id!r} is no move id")
    return name


def _read(path: Path, move_id: str, side: Side) -> MoveJournal:
    with open(path, "rb") as file:
        text = file.read(MAX_FILE_BYTES + 1)
    if len(text) > MAX_FILE_BYTES:
        return MoveJournal(move_id=move_id, side=side, records=(), damage=f"{path}: longer than {MAX_FILE_BYTES} bytes")
    records: list[Record] = []
    for number, line in enumerate(text.split(b"\n")[:-1], 1):  # what follows the last newline is torn, or free room
        try:
            record = Record.from_json(json.loads(line))
            if (record.move_id, record.side) != (move_id, side):
                raise CorruptData("a record of another move")
        except (ValueError, RecursionError, CorruptData) as error:
            # Whoever acts on a journal with a hole in it acts on a guess.
            return MoveJournal(move_id=move_id, side=side, records=tuple(records), damage=f"{path}:{number}: {error}")
        records.append(record)
    return MoveJournal(move_id=move_id, side=side, records=tuple(records))


def _make_room(fd: int) -> int:
    """Fill what is free with spaces, over a torn last line too; returns where the next record goes."""
    text = os.pread(fd, MAX_FILE_BYTES, 0)
    end = text.rfind(b"\n") + 1
    wanted = max(ROOM_BYTES, len(text))
    if wanted > len(text) or text[end:].strip(b" "):
        if os.pwrite(fd, b" " * (wanted - end), end) != wanted - end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    return end


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def utc_now() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def boot_id() -> str:
    """Of this boot of the host: what is not synced, and who lives, is told from before a crash by it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def close_journal(directory: Path, journal: MoveJournal, phase: str) -> None:
    """Write the end of a move whose own process did not."""
    with Journal(directory, journal.move_id, side=journal.side, epoch=journal.records[-1].epoch) as file:
        file.append(phase, {"why": "recovered", "by": os.getpid()})
