"""Shared memory of every kind, in two processes that write to it in every way, and know what it holds.

    python3 segments.py DIRECTORY WORKERS

Anonymous, also with a hole that wanders; memory files with and without a descriptor, written to by it too, that end
within a page, that grow, that are mapped in part, read-only, or privately beside; sealed ones; one that is nearly all
hole; System V segments, attached and not; huge ones, and files of /dev/shm. Worker N of WORKERS owns every page whose
number is N modulo WORKERS. The files in DIRECTORY are those of churn.py: ready, check, checked, wrong.
"""

import ctypes
import fcntl
import json
import mmap
import os
import random
import sys
import time
from pathlib import Path

PAGE = 4096
PAGES = 512
RW = mmap.PROT_READ | mmap.PROT_WRITE
IPC_CREAT, IPC_PRIVATE = 0o1000, 0
SEAL_SHRINK, SEAL_GROW, SEAL_WRITE = 2, 4, 8

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
libc.shmdt.argtypes = (ctypes.c_void_p,)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def must(result: int, call: str) -> int:
    if result in (-1, None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")
    return result


def map_at(fd: int, pages: int = PAGES, protection: int = RW, flags: int = mmap.MAP_SHARED, first: int = 0) -> int:
    return must(libc.mmap(None, pages * PAGE, protection, flags, fd, first * PAGE), "mmap")


class Kind:
    """``address`` is where it can be written to by an instruction, None where only a descriptor can, or nobody.

    A page holds its version in its first and last eight bytes; a worker knows those of its own pages.
    """

    def __init__(self, name: str, address: int | None, fd: int = -1, pages: int = PAGES, first: int = 0) -> None:
        self.name, self.address, self.fd, self.pages, self.first = name, address, fd, pages, first
        self.looks: list[int] = [] if address is None else [address]
        self.versions = [0] * pages
        self.fixed = False

    def write(self, page: int, by_descriptor: bool) -> None:
        self.versions[page] += 1
        word = (self.versions[page] << 32 | page).to_bytes(8, "little")
        if self.fd >= 0 and (by_descriptor or self.address is None):
            for offset in (0, PAGE - 8):
                os.pwrite(self.fd, word, (self.first + page) * PAGE + offset)
        elif self.address is not None:
            for offset in (0, PAGE - 8):
                ctypes.memmove(self.address + page * PAGE + offset, word, 8)

    def forget(self, page: int) -> None:
        assert self.address is not None
        must(libc.madvise(self.address + page * PAGE, PAGE, 9), "madvise")  # MADV_REMOVE
        self.versions[page] = 0

    def look(self, page: int) -> None:
        wanted = (self.versions[page] << 32 | page) if self.versions[page] else 0
        for offset in (0, PAGE - 8):
            found = [ctypes.string_at(address + page * PAGE + offset, 8) for address in self.looks]
            if self.fd >= 0:
                found.append(os.pread(self.fd, 8, (self.first + page) * PAGE + offset))
            for word in found:
                if int.from_bytes(word, "little") != wanted:
                    raise AssertionError(f"{self.name} page {page} at {offset}: {word.hex()}, not {wanted:#x}")


def memfd(name: str, pages: int = PAGES, more: int = 0, flags: int = 0) -> int:
    fd = os.memfd_create(name, flags | os.MFD_CLOEXEC)
    os.ftruncate(fd, pages * PAGE + more)
    return fd


def make() -> list[Kind]:
    kinds = [Kind("anonymous", map_at(-1, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))]
    kinds += [Kind("anonymous with holes", map_at(-1, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))]
    fd = memfd("closed")
    kinds += [Kind("closed", map_at(fd))]
    os.close(fd)
    fd = memfd("open, ends within a page", more=100)
    os.lseek(fd, 12345, os.SEEK_SET)
    kinds += [Kind("open", map_at(fd), fd)]
    fd = memfd("in part")
    kinds += [Kind("in part", map_at(fd, 64, first=128), fd, pages=64, first=128)]
    fd = memfd("by descriptor")
    kinds += [Kind("by descriptor", None, fd)]
    kinds[-1].looks = [map_at(fd, protection=mmap.PROT_READ)]
    fd = memfd("private beside")
    kinds += [Kind("private beside", map_at(fd), fd)]
    map_at(fd, flags=mmap.MAP_PRIVATE)
    fd = memfd("grows")
    kinds += [Kind("grows", map_at(fd), fd)]
    fd = memfd("sparse", pages=1 << 20)
    kinds += [Kind("sparse", map_at(fd, first=1 << 19), fd, first=1 << 19)]
    fd = memfd("unmapped")
    kinds += [Kind("unmapped", None, fd)]
    fd = memfd("size sealed", flags=os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW)
    kinds += [Kind("size sealed", map_at(fd), fd)]
    return [*kinds, sealed(), *system_v()]


def sealed() -> Kind:
    fd = memfd("sealed", flags=os.MFD_ALLOW_SEALING)
    kind = Kind("sealed", None, fd)
    for page in range(PAGES):
        kind.write(page, by_descriptor=True)
    kind.fixed = True
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEAL_WRITE | SEAL_SHRINK | SEAL_GROW)
    # Mapped shared, CRIU can not seal it again.
    kind.looks = [map_at(fd, protection=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)]
    return kind


def system_v() -> list[Kind]:
    found = []
    for name in ("System V", "another of System V", "System V, not attached"):
        number = must(libc.shmget(IPC_PRIVATE, PAGES * PAGE, IPC_CREAT | 0o600), "shmget")
        found.append(Kind(name, must(libc.shmat(number, None, 0), "shmat")))
        if name.endswith("not attached"):
            detached(found.pop(), number)
    return found


def detached(kind: Kind, number: int) -> None:
    """Only looked at now and then, by the first worker."""
    for page in range(PAGES):
        kind.write(page, by_descriptor=False)
    must(libc.shmdt(kind.address), "shmdt")
    DETACHED.append((kind, number))


def look_at_detached() -> None:
    for kind, number in DETACHED:
        kind.looks = [must(libc.shmat(number, None, 0), "shmat")]
        for page in range(PAGES):
            kind.look(page)
        must(libc.shmdt(kind.looks[0]), "shmdt")


class Worker:
    def __init__(self, number: int, workers: int, kinds: list[Kind]) -> None:
        self.number, self.kinds = number, kinds
        self.mine = {kind.name: [page for page in range(kind.pages) if page % workers == number] for kind in kinds}
        self.random = random.Random(number)
        self.grown = PAGES

    def step(self) -> None:
        for kind in self.kinds:
            page = self.random.choice(self.mine[kind.name])
            kind.look(page)
            if kind.fixed:
                continue
            if kind.name == "anonymous with holes" and self.random.random() < 0.3:
                kind.forget(page)
            else:
                kind.write(page, self.random.random() < 0.3)
            if kind.name == "grows" and self.number == 0 and self.grown < 4 * PAGES:
                self.grown += 1
                os.ftruncate(kind.fd, self.grown * PAGE)

    def look_at_all(self) -> None:
        for kind in self.kinds:
            for page in self.mine[kind.name]:
                kind.look(page)
            if kind.name == "open" and (at := os.lseek(kind.fd, 0, os.SEEK_CUR)) != 12345:
                raise AssertionError(f"the descriptor stands at {at}")
            if kind.name == "open" and (size := os.fstat(kind.fd).st_size) != PAGES * PAGE + 100:
                raise AssertionError(f"{kind.name} has {size} bytes")
            if kind.name == "grows" and self.number == 0 and os.fstat(kind.fd).st_size != self.grown * PAGE:
                raise AssertionError("it did not keep its size")
        if self.number == 0:
            look_at_detached()

    def work(self) -> None:
        checked = ""
        while True:
            for _ in range(5):
                self.step()
            asked = (DIRECTORY / "check").read_text() if (DIRECTORY / "check").exists() else ""
            if asked != checked:
                self.look_at_all()
                with open(DIRECTORY / "checked", "a") as file:
                    file.write(f"{asked.strip()} {self.number}\n")
            checked = asked
            time.sleep(0.004)


def guarded(number: int, workers: int, kinds: list[Kind]) -> None:
    try:
        Worker(number, workers, kinds).work()
    except BaseException as error:
        with open(DIRECTORY / "wrong", "a") as file:
            file.write(f"{os.getpid()}: {error!r}\n")
        os._exit(1)


def main() -> None:
    workers = int(sys.argv[2])
    kinds = make()
    pids = [os.getpid()]
    for number in range(1, workers):
        if not (pid := os.fork()):
            guarded(number, workers, kinds)
        pids.append(pid)
    (DIRECTORY / "ready.new").write_text(json.dumps(pids))
    os.rename(DIRECTORY / "ready.new", DIRECTORY / "ready")
    guarded(0, workers, kinds)


DETACHED: list[tuple[Kind, int]] = []
DIRECTORY = Path(sys.argv[1])
DIRECTORY.mkdir(exist_ok=True)
if __name__ == "__main__":
    main()
