"""Memory that processes share, and memory of unusual kinds; its processes know what it holds.

    python3 sharing.py DIRECTORY WORKERS

Shared by all: anonymous memory, a memfd, a file in /dev/shm. A worker owns each WORKERSth page of them: there it looks
for what it last wrote, and at the pages of others for a version no older than the one it saw before. Of its own, it has
forbidden pages that hold something, locked pages, huge pages between guards, and 8 threads that each write to a page.
The files in DIRECTORY are those of churn.py: ready, check, checked, wrong.
"""

import ctypes
import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

PAGE = 4096
SHARED_PAGES = 1024
THREADS = 8
LOCKED_PAGES = 8
HUGE = 2 << 20
PROT_NONE = 0
HUGE_PAGES = 2 * HUGE // PAGE
ANON = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Wrong(Exception):
    pass


def must(result: int, call: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def map_pages(pages: int, flags: int = ANON, fd: int = -1) -> int:
    address = libc.mmap(None, pages * PAGE, READ_WRITE, flags, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        must(-1, "mmap")
    return int(address)


def map_file(fd: int) -> int:
    os.ftruncate(fd, SHARED_PAGES * PAGE)
    address = map_pages(SHARED_PAGES, mmap.MAP_SHARED, fd)
    os.close(fd)
    return address


class Pages:
    """Pages whose first and last word are their version and number; the first word is written first."""

    def __init__(self, name: str, address: int, pages: int) -> None:
        self.name, self.address, self.pages = name, address, pages
        self.versions = [0] * pages

    def write(self, page: int) -> None:
        self.versions[page] += 1
        word = (self.versions[page] << 32 | page).to_bytes(8, "little")
        ctypes.memmove(self.address + page * PAGE, word, 8)
        ctypes.memmove(self.address + (page + 1) * PAGE - 8, word, 8)

    def version(self, page: int, offset: int) -> int:
        word = int.from_bytes(ctypes.string_at(self.address + page * PAGE + offset, 8), "little")
        if word and word & 0xFFFFFFFF != page:
            raise Wrong(f"{self.name} page {page} holds {word:#x}")
        return word >> 32

    def look_at_mine(self, page: int) -> None:
        for offset in (0, PAGE - 8):
            if (found := self.version(page, offset)) != self.versions[page]:
                raise Wrong(f"{self.name} page {page} at {offset}: version {found}, not {self.versions[page]}")

    def look_at_anothers(self, page: int) -> None:
        """Its owner may be writing: the last word is never newer than a first word that is read after it."""
        last, first = self.version(page, PAGE - 8), self.version(page, 0)
        if not self.versions[page] <= last <= first:
            raise Wrong(f"{self.name} page {page}: versions {first} and {last}, {self.versions[page]} was seen")
        self.versions[page] = last


class Worker:
    def __init__(self, number: int, workers: int, shared: list[Pages]) -> None:
        self.number, self.workers, self.shared = number, workers, shared
        self.random = random.Random(number)
        self.forbidden = Pages("forbidden", map_pages(16), 16)
        self.locked = Pages("locked", map_pages(LOCKED_PAGES), LOCKED_PAGES)
        self.huge = self._make_huge()
        self.threads = Pages("threads", map_pages(THREADS), THREADS)
        for page in range(16):
            self.forbidden.write(page)
        self._forbid()
        must(libc.mlock(self.locked.address, LOCKED_PAGES * PAGE), "mlock")
        self.private = [self.locked, self.huge]
        for number in range(THREADS):
            threading.Thread(target=guarded, args=(partial(self._write_on, number),), daemon=True).start()

    def _make_huge(self) -> Pages:
        """Aligned, with a page that nobody may touch before and behind."""
        area = map_pages(HUGE_PAGES + 2 * HUGE // PAGE)
        at = (area + HUGE) // HUGE * HUGE
        must(libc.madvise(at, HUGE_PAGES * PAGE, mmap.MADV_HUGEPAGE), "madvise")
        for guard in (at - PAGE, at + HUGE_PAGES * PAGE):
            must(libc.mprotect(guard, PAGE, PROT_NONE), "mprotect")
        return Pages("huge", at, HUGE_PAGES)

    def _forbid(self, protection: int = PROT_NONE) -> None:
        must(libc.mprotect(self.forbidden.address, 16 * PAGE, protection), "mprotect")

    def _write_on(self, page: int) -> None:
        while True:
            self.threads.look_at_mine(page)
            self.threads.write(page)
            time.sleep(0.005)

    def step(self) -> None:
        for pages in self.shared:
            page = self.random.randrange(pages.pages)
            self._look(pages, page)
            if page % self.workers == self.number:
                pages.write(page)
        for pages in self.private:
            page = self.random.randrange(pages.pages)
            pages.look_at_mine(page)
            pages.write(page)

    def _look(self, pages: Pages, page: int) -> None:
        if page % self.workers == self.number:
            pages.look_at_mine(page)
        else:
            pages.look_at_anothers(page)

    def look_at_all(self) -> None:
        for pages in self.shared:
            for page in range(pages.pages):
                self._look(pages, page)
        for pages in self.private:
            for page in range(pages.pages):
                pages.look_at_mine(page)
        self._forbid(READ_WRITE)
        for page in range(16):
            self.forbidden.look_at_mine(page)
        self._forbid()

    def work(self) -> None:
        checked = ""
        while True:
            for _ in range(20):
                self.step()
            asked = (DIRECTORY / "check").read_text() if (DIRECTORY / "check").exists() else ""
            if asked != checked:
                self.look_at_all()
                with open(DIRECTORY / "checked", "a") as file:
                    file.write(f"{asked.strip()} {self.number}\n")
            checked = asked
            time.sleep(0.002)


def guarded(function: Callable[[], None]) -> None:
    try:
        function()
    except BaseException as error:
        with open(DIRECTORY / "wrong", "a") as file:
            file.write(f"{os.getpid()}: {error!r}\n")
        os._exit(1)


def live(number: int, workers: int, shared: list[Pages]) -> None:
    Worker(number, workers, shared).work()


def main() -> None:
    workers = int(sys.argv[2])
    in_shm = os.open(f"/dev/shm/sharing-{os.getpid()}", os.O_RDWR | os.O_CREAT, 0o600)
    shared = [
        Pages("anonymous", map_pages(SHARED_PAGES, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), SHARED_PAGES),
        Pages("memfd", map_file(os.memfd_create("sharing")), SHARED_PAGES),
        Pages("/dev/shm", map_file(in_shm), SHARED_PAGES),
    ]
    pids = [os.getpid()]
    for number in range(1, workers):
        if not (pid := os.fork()):
            guarded(partial(live, number, workers, shared))
        pids.append(pid)
    (DIRECTORY / "ready.new").write_text(json.dumps(pids))
    os.rename(DIRECTORY / "ready.new", DIRECTORY / "ready")
    guarded(partial(live, 0, workers, shared))


DIRECTORY = Path(sys.argv[1])
DIRECTORY.mkdir(exist_ok=True)
if __name__ == "__main__":
    main()
