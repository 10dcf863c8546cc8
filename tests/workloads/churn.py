"""Memory that is read, written, given back, moved, unmapped and forked all the time; its processes know what it holds.

    python3 churn.py DIRECTORY MIB WORKERS

Each worker (the first process is one) has MIB in blocks; a page holds its own number and how often it was written, at
both ends, or zeros. Before every change a page is looked at. DIRECTORY is made where it is missing. There <number>
holds how many steps a worker did; what is wrong goes to wrong. When the word in check changes, each looks at every page
once and appends that word and its number to checked; ready holds the pids.
"""

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

PAGE = 4096
BLOCK_PAGES = 256
BLOCK = BLOCK_PAGES * PAGE
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
ANON = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def new_block(protection: int = READ_WRITE) -> int:
    address = libc.mmap(None, BLOCK, protection, ANON, -1, 0)
    assert address != ctypes.c_void_p(-1).value
    return int(address)


class Wrong(Exception):
    pass


class Churn:
    def __init__(self, mib: int) -> None:
        self.blocks = [new_block() for _ in range(mib)]
        self.versions = [[0] * BLOCK_PAGES for _ in range(mib)]
        self.random = random.Random(1)
        for block in range(mib):
            for page in range(BLOCK_PAGES):
                # Some were never touched.
                if (block * BLOCK_PAGES + page) % 7:
                    self.write(block, page)

    def write(self, block: int, page: int) -> None:
        version = self.versions[block][page] = self.versions[block][page] + 1
        word = (version << 32 | block << 16 | page).to_bytes(8, "little")
        at = self.blocks[block] + page * PAGE
        ctypes.memmove(at, word, 8)
        ctypes.memmove(at + PAGE - 8, word, 8)

    def look(self, block: int, page: int) -> None:
        version = self.versions[block][page]
        word = version << 32 | block << 16 | page if version else 0
        at = self.blocks[block] + page * PAGE
        for where in (at + PAGE - 8, at):
            found = int.from_bytes(ctypes.string_at(where, 8), "little")
            if found != word:
                raise Wrong(f"block {block} page {page} at {where:#x}: {found:#x} instead of {word:#x}")

    def look_at_all(self) -> None:
        for block in range(len(self.blocks)):
            for page in range(BLOCK_PAGES):
                self.look(block, page)

    def step(self) -> None:
        block, page = self.random.randrange(len(self.blocks)), self.random.randrange(BLOCK_PAGES)
        self.look(block, page)
        die = self.random.random()
        if die < 0.5:
            self.write(block, page)
        elif die < 0.55:
            self.give_back(block, page)
        elif die < 0.6:
            self.move(block)
        elif die < 0.61:
            self.replace(block)
        elif die < 0.63:
            self.forbid_and_allow(block, page)
        elif die < 0.68:
            self.fork()

    def give_back(self, block: int, page: int) -> None:
        pages = min(self.random.randrange(1, 16), BLOCK_PAGES - page)
        assert libc.madvise(self.blocks[block] + page * PAGE, pages * PAGE, mmap.MADV_DONTNEED) == 0
        self.versions[block][page : page + pages] = [0] * pages

    def move(self, block: int) -> None:
        to = new_block(mmap.PROT_READ)
        moved = libc.mremap(self.blocks[block], BLOCK, BLOCK, MREMAP_MAYMOVE | MREMAP_FIXED, to)
        if moved == to:
            self.blocks[block] = to
            return
        # A mapping in pieces (forbid_and_allow) can not be moved in one call while a userfaultfd watches it.
        assert ctypes.get_errno() == errno.EFAULT
        assert libc.munmap(to, BLOCK) == 0

    def replace(self, block: int) -> None:
        assert libc.munmap(self.blocks[block], BLOCK) == 0
        self.blocks[block] = new_block()
        self.versions[block] = [0] * BLOCK_PAGES

    def forbid_and_allow(self, block: int, page: int) -> None:
        """Splits the mapping in three, for good where another step does not join it again."""
        at = self.blocks[block] + page * PAGE
        assert libc.mprotect(at, PAGE, mmap.PROT_READ) == 0
        self.look(block, page)
        assert libc.mprotect(at, PAGE, READ_WRITE) == 0

    def fork(self) -> None:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                for _ in range(40):
                    block, page = self.random.randrange(len(self.blocks)), self.random.randrange(BLOCK_PAGES)
                    self.look(block, page)
                    self.write(block, page)
                    self.look(block, page)
                status = 0
            except Wrong as error:
                complain(f"forked: {error}")
            finally:
                os._exit(status)
        while True:
            try:
                _pid, status = os.waitpid(pid, 0)
                break
            except InterruptedError:
                continue
        if status:
            raise Wrong(f"a forked child ended with {status:#x}")


def read_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def complain(text: str) -> None:
    with open(DIRECTORY / "wrong", "a") as file:
        file.write(text + "\n")


def look_on(churn: Churn, area: list[int]) -> None:
    """A second thread, which reads memory that nobody changes."""
    while True:
        for address in area:
            if ctypes.string_at(address + PAGE, 8) != b"constant":
                complain(f"the thread's memory at {address:#x}")
                return
        time.sleep(0.002)


def work(number: int, churn: Churn, area: list[int]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    churn.random = random.Random(number)
    threading.Thread(target=look_on, args=(churn, area), daemon=True).start()
    steps = 0
    checked = ""
    try:
        while True:
            for _ in range(50):
                churn.step()
            steps += 50
            (DIRECTORY / str(number)).write_text(str(steps))
            asked = read_text(DIRECTORY / "check")
            if asked != checked:
                churn.look_at_all()
                with open(DIRECTORY / "checked", "a") as file:
                    file.write(f"{asked} {number}\n")
            checked = asked
            time.sleep(0.0005)
    except (Wrong, AssertionError) as error:
        complain(f"worker {number}, step {steps}: {error!r}")
        os._exit(1)


def main() -> None:
    mib, workers = int(sys.argv[2]), int(sys.argv[3])
    churn = Churn(mib)
    area = [new_block() for _ in range(8)]
    for address in area:
        ctypes.memmove(address + PAGE, b"constant", 8)
    pids = [os.getpid()]
    for number in range(1, workers):
        pid = os.fork()
        if not pid:
            work(number, churn, area)
        pids.append(pid)
    (DIRECTORY / "ready.new").write_text(json.dumps(pids))
    os.rename(DIRECTORY / "ready.new", DIRECTORY / "ready")
    work(0, churn, area)


DIRECTORY = Path(sys.argv[1])
DIRECTORY.mkdir(exist_ok=True)
if __name__ == "__main__":
    main()
