"""File locks of a restored container that CRIU took and lost again.

A process loses its POSIX locks on a file when it closes any descriptor of that file (fcntl(2)). CRIU's restore takes
the locks of a task first, and closes the descriptors by which it maps the task's files afterwards: of a file that is
both mapped and locked (the index of a SQLite database, LMDB's lock file) nothing is locked any more. So after the
restore, before anything runs, each process takes again what is missing. (Seen with 4.2.1.)
"""

from __future__ import annotations

import fcntl
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pycriu.images import file_lock_pb2

from runtime.criu.images import _decode, _records
from runtime.errors import CriuFailed
from runtime.memory.place import NotInjected
from runtime.memory.remote import RecordLock, take_locks
from runtime.memory.tracer_thread import TracerThread

# criu/include/magic.h
_FILE_LOCKS = 0x54323616
# linux/fs.h: FL_POSIX
_POSIX = 1
_TYPES = {"READ": fcntl.F_RDLCK, "WRITE": fcntl.F_WRLCK}
_LINE = re.compile(r"^\d+: POSIX +\S+ +(READ|WRITE) (\d+) \S+ (\d+) (\d+|EOF)$", re.MULTILINE)


def read_posix_locks(path: Path) -> dict[int, list[RecordLock]]:
    """Of a filelocks.img, by pid in the images; empty when there is no such file. Raises CorruptData."""
    found: dict[int, list[RecordLock]] = {}
    for record in _records(path, _FILE_LOCKS) if path.exists() else ():
        lock = _decode(file_lock_pb2.file_lock_entry, record, path)
        if lock.flag & _POSIX:
            found.setdefault(lock.pid, []).append(
                RecordLock(descriptor=lock.fd, type=lock.type, start=lock.start, length=lock.len)
            )
    return found


def parse_held(text: str) -> dict[int, Counter[tuple[int, int, int]]]:
    """Of /proc/locks, by pid: how often each (type, start, length) is held; a length of 0 reaches to the file's end."""
    found: dict[int, Counter[tuple[int, int, int]]] = {}
    for kind, pid, start, end in _LINE.findall(text):
        length = 0 if end == "EOF" else int(end) - int(start) + 1
        found.setdefault(int(pid), Counter())[_TYPES[kind], int(start), length] += 1
    return found


def wanted(locks: Iterable[RecordLock]) -> Counter[tuple[int, int, int]]:
    return Counter((lock.type, lock.start, lock.length) for lock in locks)


def take_lost_locks(images: Path, tasks: Mapping[int, int]) -> int:
    """Of restored processes in which nothing has run: ``tasks`` has pids here by those in the images. How many of them
    lacked locks. Raises CriuFailed where one does not get them back."""
    expected = {tasks[inside]: locks for inside, locks in read_posix_locks(images / "filelocks.img").items()}
    if not expected:
        return 0
    held = parse_held(Path("/proc/locks").read_text())
    lacking = {pid: locks for pid, locks in expected.items() if wanted(locks) - held.get(pid, Counter())}
    if not lacking:
        return 0
    tracer = TracerThread()
    try:
        for pid, locks in lacking.items():
            # What it holds already it may take again.
            tracer.run(lambda pid=pid, locks=locks: take_locks(pid, locks))  # type: ignore[misc]
    except NotInjected as error:
        raise CriuFailed(f"a process does not get its file locks back: {error}") from error
    finally:
        tracer.close()
    return len(lacking)
