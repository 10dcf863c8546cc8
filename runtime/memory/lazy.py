"""When a restore may be lazy, and what the kernel has to be told for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
# One inode for the whole machine; a file of /proc is another one in each PID namespace.
DEVICE = Path("/dev/userfaultfd")
_MARKER = "userfaultfd-allowed-by-"
# A judgement: there is little to gain below, and memory that is all there needs no pager (docs/adr/0011).
EAGER_BELOW_BYTES = 32 << 20
# struct flock: type, whence, start, length, pid
_FLOCK = struct.Struct("hhqqi4x")
_CHANGING, _RAISED = 0, 1


def eager_is_better(memory_bytes: int, cow_shared_bytes: int) -> bool:
    """Whether to restore with all memory in place: little of it, or much that processes share copy-on-write.

    ``memory_bytes``: what all processes map, counted once; ``cow_shared_bytes``: what a lazy restore would have twice.
    """
    return memory_bytes < EAGER_BELOW_BYTES or cow_shared_bytes * 4 > memory_bytes


@contextlib.contextmanager
def lazy_restore_allowed(run_dir: Path) -> Iterator[None]:
    """While inside, a task in a user namespace of its own may make the userfaultfd a lazy restore needs.

    That is vm.unprivileged_userfaultfd, one switch for the machine. Counted across processes by locks on the device of
    that name (before Linux 6.1 on the switch itself), because hosts of a lab share it and nothing else; the last one
    out turns it off, if one of us had turned it on. ``run_dir`` gets a marker while it may be on because of us, for who
    is killed. Raises OSError where /proc/sys cannot be written.
    """
    if not SYSCTL.exists():
        yield  # the kernel has no such restriction
        return
    marker = run_dir / f"{_MARKER}{os.getpid()}"
    with _opened() as fd:
        with _locked(fd):
            ours = int(SYSCTL.read_text()) == 0 or _held_by_others(fd, _RAISED) or _remove_stale(run_dir)
            if ours:
                _lock(fd, fcntl.F_RDLCK, _RAISED)
                with contextlib.suppress(OSError):
                    marker.touch()
                SYSCTL.write_text("1")
        try:
            yield
        finally:
            with _locked(fd):
                _lock(fd, fcntl.F_UNLCK, _RAISED)
                if ours and not _held_by_others(fd, _RAISED):
                    SYSCTL.write_text("0")
                with contextlib.suppress(OSError):
                    marker.unlink(missing_ok=True)


def turn_off_what_is_left(run_dir: Path) -> None:
    """After a process of this host that was killed inside, unless somebody else is."""
    if not _markers(run_dir):
        return
    with contextlib.suppress(OSError), _opened() as fd, _locked(fd):
        if _remove_stale(run_dir) and not _held_by_others(fd, _RAISED):
            SYSCTL.write_text("0")


def _remove_stale(run_dir: Path) -> bool:
    """Whether there were markers of processes that have ended."""
    stale = [name for name in _markers(run_dir) if not os.path.exists(f"/proc/{name[len(_MARKER) :]}")]
    for name in stale:
        (run_dir / name).unlink(missing_ok=True)
    return bool(stale)


def _markers(run_dir: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir(run_dir) if name.startswith(_MARKER)]
    return []


@contextlib.contextmanager
def _opened() -> Iterator[int]:
    fd = os.open(DEVICE if DEVICE.exists() else SYSCTL, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_others(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    _lock(fd, fcntl.F_WRLCK, _CHANGING)
    try:
        yield
    finally:
        _lock(fd, fcntl.F_UNLCK, _CHANGING)
