"""Does to its memory what it is told: maps, unmaps, moves, advises, protects, writes, forks, runs itself again.

One line of JSON on stdin is one order, {"op": ..., "to": 0, ...}; one line of JSON on stdout answers it: {"ok": bool}.
"to" is the process: 0 is this one, others are its forks, by number. Between orders a process sleeps in read(2) and
changes nothing. Orders that make no sense for what is mapped are answered with false.
"""

import ctypes
import json
import mmap
import os
import socket
import sys
import tempfile
import threading

PAGE = 4096
HUGE = 2 << 20
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED = 1, 2, 0x20, 0x4000, 0x10
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
FAILED = ctypes.c_void_p(-1).value
ADVICE = {
    "dontneed": 4,
    "free": 8,
    "remove": 9,
    "hugepage": 14,
    "nohugepage": 15,
    "collapse": 25,
    "guard": 102,
    "unguard": 103,
}

libc = ctypes.CDLL(None, use_errno=True)
pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.mmap.argtypes, libc.mmap.restype = (pointer, size, number, number, number, ctypes.c_long), pointer
libc.mremap.argtypes, libc.mremap.restype = (pointer, size, size, number, pointer), pointer
libc.munmap.argtypes = (pointer, size)
libc.madvise.argtypes = (pointer, size, number)
libc.mprotect.argtypes = (pointer, size, number)
libc.shmat.argtypes, libc.shmat.restype = (number, pointer, number), pointer
libc.read.argtypes = (number, pointer, size)
libc.sbrk.argtypes, libc.sbrk.restype = (ctypes.c_long,), pointer


class Area:
    """``pages``: for each page its protection, None where it is unmapped."""

    def __init__(self, address: int, pages: int, protection: int, *, of_file: bool = False) -> None:
        self.address = address
        self.of_file = of_file
        self.pages: list[int | None] = [protection] * pages
        self.guarded: set[int] = set()

    def at(self, page: int) -> int:
        return self.address + page * PAGE

    def usable(self, page: int, wanted: int) -> bool:
        if not 0 <= page < len(self.pages) or page in self.guarded:
            return False
        protection = self.pages[page]
        return protection is not None and protection & wanted == wanted


class Mapper:
    def __init__(self) -> None:
        self.areas: dict[int, Area] = {}
        self.memfds: dict[int, int] = {}
        self.children: dict[int, tuple[int, socket.socket]] = {}

    def obey(self, order: dict) -> bool:
        return bool(getattr(self, "op_" + order.pop("op"))(**order))

    def op_map(self, area: int, pages: int, kind: str) -> bool:
        if area in self.areas:
            return False
        flags, protection, descriptor = MAP_PRIVATE | MAP_ANONYMOUS, PROT_READ | PROT_WRITE, -1
        if kind == "file":
            with tempfile.TemporaryFile() as file:
                file.write(b"".join(bytes([page % 251 + 1]) * PAGE for page in range(pages)))
                file.flush()
                address = libc.mmap(None, pages * PAGE, protection, MAP_PRIVATE, file.fileno(), 0)
        else:
            if kind == "reserved":
                flags, protection = flags | MAP_NORESERVE, PROT_NONE
            length = pages * PAGE + 2 * HUGE
            start = libc.mmap(None, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            aligned = (start + HUGE - 1) // HUGE * HUGE if kind == "huge" else start + PAGE
            libc.munmap(start, length)
            address = libc.mmap(aligned, pages * PAGE, protection, flags | MAP_FIXED, descriptor, 0)
            if kind == "huge":
                libc.madvise(address, pages * PAGE, ADVICE["hugepage"])
        self.areas[area] = Area(address, pages, protection, of_file=kind == "file")
        return address != FAILED

    def op_unmap(self, area: int, page: int, count: int) -> bool:
        found = self.areas.get(area)
        if found is None or page >= len(found.pages):
            return False
        last = min(page + count, len(found.pages))
        libc.munmap(found.at(page), (last - page) * PAGE)
        found.pages[page:last] = [None] * (last - page)
        found.guarded -= set(range(page, last))
        if not any(protection is not None for protection in found.pages):
            del self.areas[area]
        return True

    def op_remap_there(self, area: int, page: int, count: int) -> bool:
        """Unmap and map anew at the same place: to an onlooker the same mapping, in truth another one."""
        found = self.areas.get(area)
        if found is None or page >= len(found.pages):
            return False
        last = min(page + count, len(found.pages))
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
        libc.mmap(found.at(page), (last - page) * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0)
        found.pages[page:last] = [PROT_READ | PROT_WRITE] * (last - page)
        found.guarded -= set(range(page, last))
        return True

    def op_write(self, area: int, page: int, count: int, value: int, how: str) -> bool:
        found = self.areas.get(area)
        if found is None:
            return False
        pages = [each for each in range(page, page + count) if found.usable(each, PROT_READ | PROT_WRITE)]
        if how == "thread":
            thread = threading.Thread(target=self._write, args=(found, pages, value, "instruction"))
            thread.start()
            thread.join()
        else:
            self._write(found, pages, value, how)
        return bool(pages)

    def _write(self, area: Area, pages: list[int], value: int, how: str) -> None:
        data = bytes([value]) * 64
        for page in pages:
            target = area.at(page) + value * 8 % (PAGE - 64)
            if how == "read":
                reader, writer = os.pipe()
                os.write(writer, data)
                libc.read(reader, target, len(data))
                os.close(reader)
                os.close(writer)
            else:
                ctypes.memmove(target, data, len(data))

    def op_look(self, area: int, page: int, count: int) -> bool:
        found = self.areas.get(area)
        if found is None:
            return False
        for each in range(page, page + count):
            if found.usable(each, PROT_READ):
                ctypes.string_at(found.at(each), 1)
        return True

    def op_resize(self, area: int, pages: int, how: str) -> bool:
        """mremap: grow or shrink, in place or anywhere (maymove), to another place for sure (move), leaving the old
        place mapped and empty (dontunmap)."""
        found = self.areas.get(area)
        if found is None or None in found.pages or len(set(found.pages)) != 1 or found.guarded:
            return False
        old, protection = len(found.pages), found.pages[0] or 0
        if how == "place":
            moved = libc.mremap(found.address, old * PAGE, pages * PAGE, 0, None)
        elif how == "maymove":
            moved = libc.mremap(found.address, old * PAGE, pages * PAGE, MREMAP_MAYMOVE, None)
        else:
            pages = old if how == "dontunmap" else pages
            flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if how == "dontunmap" else 0)
            length = max(pages, old) * PAGE + 2 * HUGE
            start = libc.mmap(None, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            libc.munmap(start, length)
            offset = found.address % HUGE
            place = (start + HUGE - 1) // HUGE * HUGE + offset
            moved = libc.mremap(found.address, old * PAGE, pages * PAGE, flags, place)
        if moved == FAILED:
            return False
        self.areas[area] = Area(moved, pages, protection, of_file=found.of_file)
        if how == "dontunmap":
            self.areas[max(self.areas) + 100] = Area(found.address, old, protection, of_file=found.of_file)
        return True

    def op_advise(self, area: int, page: int, count: int, advice: str) -> bool:
        found = self.areas.get(area)
        if found is None or any(found.pages[each] is None for each in range(page, min(page + count, len(found.pages)))):
            return False
        last = min(page + count, len(found.pages))
        # Guards over a mapped file make the kernel (6.18) turn in a circle for as long as somebody watches (ADR 10).
        if last <= page or (advice == "guard" and found.of_file):
            return False
        done = libc.madvise(found.at(page), (last - page) * PAGE, ADVICE[advice]) == 0
        if done and advice == "guard":
            found.guarded |= set(range(page, last))
        if done and advice == "unguard":
            found.guarded -= set(range(page, last))
        return done

    def op_protect(self, area: int, page: int, count: int, protection: int) -> bool:
        found = self.areas.get(area)
        if found is None:
            return False
        last = min(page + count, len(found.pages))
        if last <= page or None in found.pages[page:last]:
            return False
        libc.mprotect(found.at(page), (last - page) * PAGE, protection)
        found.pages[page:last] = [protection] * (last - page)
        return True

    def op_grow_heap(self, pages: int, value: int) -> bool:
        start = libc.sbrk(pages * PAGE)
        ctypes.memset(start, value, pages * PAGE)
        return True

    def op_share(self, area: int, pages: int, kind: str) -> bool:
        """Shared memory that its forks share too: shared anonymous, memfd, System V."""
        if area in self.areas:
            return False
        if kind == "sysv":
            number = libc.shmget(0, pages * PAGE, 0o600 | 0o1000)
            address = libc.shmat(number, None, 0)
            libc.shmctl(number, 0, None)  # IPC_RMID
        else:
            fd = os.memfd_create("shared") if kind == "memfd" else -1
            if fd >= 0:
                os.ftruncate(fd, pages * PAGE)
                self.memfds[area] = fd
            flags = MAP_SHARED | (MAP_ANONYMOUS if fd < 0 else 0)
            address = libc.mmap(None, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0)
        self.areas[area] = Area(address, pages, PROT_READ | PROT_WRITE)
        return address != FAILED

    def op_write_file(self, area: int, page: int, value: int) -> bool:
        """Write to a memfd by its descriptor."""
        if area not in self.memfds:
            return False
        return os.pwrite(self.memfds[area], bytes([value]) * 64, page * PAGE) == 64

    def op_punch(self, area: int, page: int, count: int) -> bool:
        found = self.areas.get(area)
        return found is not None and libc.madvise(found.at(page), count * PAGE, ADVICE["remove"]) == 0

    def op_write_by_short_lived_child(self, area: int, page: int, value: int) -> bool:
        pid = os.fork()
        if not pid:
            try:
                self._write(self.areas[area], [page], value, "instruction")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        return True

    def op_fork(self) -> bool:
        if len(self.children) >= 3:
            return False
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            try:
                for _pid, other in self.children.values():
                    other.close()
                ours.close()
                self.children = {}
                os.dup2(theirs.fileno(), 0)
                os.dup2(theirs.fileno(), 1)
                theirs.close()
                self.serve()
            finally:
                os._exit(0)
        theirs.close()
        self.children[max(self.children, default=0) + 1] = (child, ours)
        return True

    def op_exit(self, child: int) -> bool:
        if child not in self.children:
            return False
        pid, channel = self.children.pop(child)
        channel.close()
        os.waitpid(pid, 0)
        return True

    def op_exec(self) -> bool:
        """Answered by the new program."""
        if not self.children:
            os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__)])
        return False

    def serve(self) -> None:
        while line := read_line():
            order = json.loads(line)
            to = order.pop("to", 0)
            if to == 0:
                answer = json.dumps({"ok": self.obey(order), "pids": self.pids()}).encode() + b"\n"
            elif to in self.children:
                channel = self.children[to][1]
                channel.sendall(json.dumps(order).encode() + b"\n")
                ok = json.loads(channel.makefile("rb").readline())["ok"]
                answer = json.dumps({"ok": ok, "pids": self.pids()}).encode() + b"\n"
            else:
                answer = json.dumps({"ok": False, "pids": self.pids()}).encode() + b"\n"
            os.write(1, answer)

    def pids(self) -> list[int]:
        return [os.getpid(), *(pid for pid, _channel in self.children.values())]


def read_line() -> bytes:
    """Byte by byte: what is behind the line belongs to the program that an order may put in this one's place."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


if __name__ == "__main__":
    assert mmap.PAGESIZE == PAGE
    mapper = Mapper()
    os.write(1, json.dumps({"ok": True, "pids": [os.getpid()]}).encode() + b"\n")
    mapper.serve()
