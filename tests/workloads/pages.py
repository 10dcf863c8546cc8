"""Memory of every kind that a dump treats in a way of its own, and what it holds, said on demand.

    python3 pages.py DIRECTORY RANDOM_MIB

A parent and two children. Each answers SIGUSR1 with a line of JSON appended to DIRECTORY/<its pid>: the digest of every
kind of memory. SIGUSR2 makes it count up a number in memory that all three share. DIRECTORY/ready holds the three pids.
"""

import ctypes
import hashlib
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

PAGE_BYTES = 4096
MIB = 1 << 20
FILE_PAGES = 64
SIGNALS = {signal.SIGUSR1, signal.SIGUSR2}
PROT_NONE = 0
PRIVATE_ANON = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def fill(area: mmap.mmap) -> mmap.mmap:
    for offset in range(0, len(area), MIB):
        size = min(MIB, len(area) - offset)
        area[offset : offset + size] = os.urandom(size)
    return area


def address_of(area: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def digest(area: mmap.mmap) -> str:
    return hashlib.sha256(area).hexdigest()


def anonymous(mib: int) -> mmap.mmap:
    """Random, with some pages written full of zeros, some never touched, and some given back."""
    area = fill(mmap.mmap(-1, mib * MIB, PRIVATE_ANON))
    for page in range(0, len(area) // PAGE_BYTES, 97):
        area[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes(PAGE_BYTES)
    area.madvise(mmap.MADV_DONTNEED, MIB, MIB // 2)
    return area


def scattered() -> mmap.mmap:
    """Every second page touched."""
    area = mmap.mmap(-1, 4 * MIB, PRIVATE_ANON)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(0, len(area) // PAGE_BYTES, 2):
        area[page * PAGE_BYTES] = page % 255 + 1
    return area


def private_file(directory: Path) -> mmap.mmap:
    """A file's pages, some of them written here only; one of those with zeros."""
    path = directory / "mapped"
    path.write_bytes(os.urandom(FILE_PAGES * PAGE_BYTES))
    with open(path, "r+b") as file:
        area = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    for page in (3, 4, 5, 20, 63):
        area[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = os.urandom(PAGE_BYTES)
    area[40 * PAGE_BYTES : 41 * PAGE_BYTES] = bytes(PAGE_BYTES)
    return area


def memory_file() -> mmap.mmap:
    fd = os.memfd_create("pages")
    os.ftruncate(fd, 2 * MIB)
    area = mmap.mmap(fd, 2 * MIB, mmap.MAP_SHARED)
    area[MIB : MIB + MIB // 2] = os.urandom(MIB // 2)
    return area


def locked() -> mmap.mmap:
    area = fill(mmap.mmap(-1, MIB // 4, PRIVATE_ANON))
    libc.mlock(address_of(area), len(area))
    return area


def forbidden() -> Callable[[], str]:
    """Memory that not even its owner may read at the moment of the dump."""
    area = fill(mmap.mmap(-1, MIB // 4, PRIVATE_ANON))
    address = address_of(area)
    libc.mprotect(address, len(area), PROT_NONE)

    def look() -> str:
        libc.mprotect(address, len(area), mmap.PROT_READ)
        try:
            return digest(area)
        finally:
            libc.mprotect(address, len(area), PROT_NONE)

    return look


def main() -> None:
    directory, mib = Path(sys.argv[1]), int(sys.argv[2])
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    shared = mmap.mmap(-1, MIB)  # mmap's default is shared and anonymous
    shared[PAGE_BYTES:] = os.urandom(MIB - PAGE_BYTES)
    areas = {
        "anonymous": anonymous(mib),
        "scattered": scattered(),
        "private_file": private_file(directory),
        "memory_file": memory_file(),
        "locked": locked(),
        "untouched": mmap.mmap(-1, 16 * MIB, PRIVATE_ANON),
    }
    look_at_forbidden = forbidden()

    children: list[int] = []
    for number in (1, 2):
        pid = os.fork()
        if not pid:
            # Copied on write: a page of the child's own, a page gone, and the rest still the parent's.
            areas["anonymous"][:PAGE_BYTES] = bytes([number]) * PAGE_BYTES
            areas["anonymous"].madvise(mmap.MADV_DONTNEED, 8 * PAGE_BYTES, PAGE_BYTES)
            break
        children.append(pid)
    else:
        (directory / "ready.new").write_text(json.dumps([os.getpid(), *children]))
        os.rename(directory / "ready.new", directory / "ready")

    while True:
        if signal.sigwaitinfo(SIGNALS).si_signo == signal.SIGUSR2:
            shared[0] += 1
            continue
        found: dict[str, object] = {name: digest(area) for name, area in areas.items()}
        found |= {"forbidden": look_at_forbidden(), "shared": digest(shared), "count": shared[0]}
        with open(directory / str(os.getpid()), "a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
