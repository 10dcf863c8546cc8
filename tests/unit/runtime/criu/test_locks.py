import contextlib
import fcntl
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pycriu.images import file_lock_pb2

from runtime.criu.locks import parse_held, read_posix_locks, take_lost_locks
from runtime.errors import CorruptData, CriuFailed
from runtime.memory.place import NotInjected
from runtime.memory.remote import RecordLock, take_locks
from runtime.memory.tracer_thread import TracerThread

LOCKS = """1: POSIX  ADVISORY  WRITE 14109 00:3e:15507724 120 120
2: POSIX  ADVISORY  READ 14109 00:3e:15507724 128 EOF
3: POSIX  ADVISORY  READ 14197 00:3e:15508837 1073741826 1073742335
4: FLOCK  ADVISORY  WRITE 10056 fe:00:2149853 0 EOF
4: -> POSIX  ADVISORY  WRITE 11522 fe:00:2149853 0 EOF
5: OFDLCK ADVISORY  WRITE -1 fe:00:2149853 0 EOF
"""
PROGRAM = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
print(file.fileno(), flush=True)
sys.stdin.read()
"""
POSIX, FLOCK = 1, 2


@pytest.fixture
def child(tmp_path: Path) -> Iterator[tuple[int, int, Path]]:
    """The pid of a process that waits, a descriptor of its, and the file that this is of."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline()), path
        process.stdin.close()
    assert process.returncode == 0, "it noticed something"


def image(*entries: tuple[int, int, int, int, int, int]) -> bytes:
    """(flag, type, pid, fd, start, length) of each lock."""
    content = struct.pack("<II", 0x54564319, 0x54323616)
    for flag, kind, pid, fd, start, length in entries:
        record = file_lock_pb2.file_lock_entry(flag=flag, type=kind, pid=pid, fd=fd, start=start, len=length)
        content += struct.pack("<I", record.ByteSize()) + record.SerializeToString()
    return content


def can_lock(path: Path, start: int, length: int) -> bool:
    with open(path, "r+b") as file:
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            return True
        return False


def test_locks_that_are_held_are_read_by_process() -> None:
    assert parse_held(LOCKS) == {
        14109: Counter({(fcntl.F_WRLCK, 120, 1): 1, (fcntl.F_RDLCK, 128, 0): 1}),
        14197: Counter({(fcntl.F_RDLCK, 1073741826, 510): 1}),
    }


def test_only_posix_locks_are_read_from_the_image(tmp_path: Path) -> None:
    (tmp_path / "filelocks.img").write_bytes(image((POSIX, 1, 7, 3, 10, 5), (FLOCK, 1, 7, 4, 0, 0)))
    lock = RecordLock(descriptor=3, type=1, start=10, length=5)
    assert read_posix_locks(tmp_path / "filelocks.img") == {7: [lock]}
    assert read_posix_locks(tmp_path / "none.img") == {}


def test_an_image_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "filelocks.img").write_bytes(b"x" * 50)
    with pytest.raises(CorruptData):
        read_posix_locks(tmp_path / "filelocks.img")


def test_a_process_takes_again_what_it_lost_and_notices_nothing(tmp_path: Path, child: tuple[int, int, Path]) -> None:
    pid, descriptor, path = child
    (tmp_path / "filelocks.img").write_bytes(
        image((POSIX, fcntl.F_WRLCK, 7, descriptor, 10, 5), (POSIX, fcntl.F_RDLCK, 7, descriptor, 50, 0))
    )
    assert take_lost_locks(tmp_path, {7: pid}) == 1
    assert [can_lock(path, start, 1) for start in (9, 10, 14, 15, 50, 90)] == [True, False, False, True, False, False]
    assert take_lost_locks(tmp_path, {7: pid}) == 0


def test_a_lock_that_can_not_be_taken_is_told(tmp_path: Path, child: tuple[int, int, Path]) -> None:
    pid, descriptor, path = child
    (tmp_path / "filelocks.img").write_bytes(image((POSIX, fcntl.F_WRLCK, 7, descriptor, 0, 0)))
    with open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        with pytest.raises(CriuFailed, match=f"descriptor {descriptor} can not be locked: "):
            take_lost_locks(tmp_path, {7: pid})


def test_a_process_that_has_gone_takes_no_locks() -> None:
    with subprocess.Popen(["/bin/true"]) as process:
        pass
    tracer = TracerThread()
    try:
        with pytest.raises(NotInjected):
            tracer.run(lambda: take_locks(process.pid, [RecordLock(descriptor=0, type=0, start=0, length=0)]))
    finally:
        tracer.close()
