"""Holds memory, writes to part of it, and knows exactly what every page must contain.

    python3 memory.py MIB HOT_MIB WRITES_PER_S PORT

The cold part is random and never changes; its SHA-256 is taken at the start. Of the hot part page i holds the number of
the last write that hit it, and writes go round: so page i must hold the largest n <= writes with n % pages == i.

One line on TCP PORT, ``check``, answers a line of JSON: {"writes", "cold", "hot", "longest_pause_ms", "pauses_ms"}.
A pause is the wall clock's step between two rounds of the writing loop where it is longer than 20 ms; also appended to
/pauses.jsonl. (The wall clock, because a restored process's monotonic clock does not count the time it was frozen.)
"""

import hashlib
import json
import mmap
import os
import socket
import struct
import sys
import threading
import time

PAGE_BYTES = 4096
MIB = 1 << 20
PAUSE_NS = 20_000_000
ROUND_S = 0.001


class Memory:
    def __init__(self, mib: int, hot_mib: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.cold = mmap.mmap(-1, (mib - hot_mib) * MIB, flags)
        self.hot = mmap.mmap(-1, hot_mib * MIB, flags)
        for area in (self.cold, self.hot):
            for offset in range(0, len(area), MIB):
                area[offset : offset + MIB] = os.urandom(MIB)
        self.cold_digest = self.digest()
        self.pages = len(self.hot) // PAGE_BYTES
        for page in range(self.pages):
            self._put(page, 0)
        self.writes = 0
        self.lock = threading.Lock()

    def digest(self) -> str:
        return hashlib.sha256(self.cold).hexdigest()

    def _put(self, page: int, number: int) -> None:
        struct.pack_into("<Q", self.hot, page * PAGE_BYTES, number)

    def write(self, count: int) -> None:
        with self.lock:
            for _ in range(count):
                self.writes += 1
                self._put(self.writes % self.pages, self.writes)

    def hot_is_right(self) -> bool:
        with self.lock:
            for page in range(self.pages):
                (found,) = struct.unpack_from("<Q", self.hot, page * PAGE_BYTES)
                last = self.writes - (self.writes - page) % self.pages
                if found != max(last, 0):
                    return False
            return True


class Pauses:
    def __init__(self) -> None:
        self.found: list[float] = []
        self.last_ns = time.time_ns()

    def look(self) -> None:
        now_ns = time.time_ns()
        if now_ns - self.last_ns > PAUSE_NS:
            pause_ms = (now_ns - self.last_ns) / 1e6
            self.found.append(pause_ms)
            with open("/pauses.jsonl", "a") as file:
                file.write(json.dumps({"pause_ms": pause_ms, "at_ns": now_ns}) + "\n")
        self.last_ns = now_ns


def serve(listener: socket.socket, memory: Memory, pauses: Pauses) -> None:
    while True:
        connection, _address = listener.accept()
        threading.Thread(target=answer, args=(connection, memory, pauses), daemon=True).start()


def answer(connection: socket.socket, memory: Memory, pauses: Pauses) -> None:
    with connection, connection.makefile("rb") as lines:
        for line in lines:
            if line.strip() != b"check":
                connection.sendall(line)  # anything else is echoed: for a probe
                continue
            seen = list(pauses.found)
            result = {
                "writes": memory.writes,
                "cold": memory.digest() == memory.cold_digest,
                "hot": memory.hot_is_right(),
                "longest_pause_ms": max(seen, default=0.0),
                "pauses_ms": seen,
            }
            connection.sendall(json.dumps(result).encode() + b"\n")


def main() -> None:
    mib, hot_mib, writes_per_s, port = (int(text) for text in sys.argv[1:5])
    memory = Memory(mib, hot_mib)
    listener = socket.create_server(("0.0.0.0", port))
    pauses = Pauses()
    threading.Thread(target=serve, args=(listener, memory, pauses), daemon=True).start()
    print("ready", flush=True)
    begin = time.time()
    while True:
        time.sleep(ROUND_S)
        pauses.look()
        # A pause is not caught up: the rate is that of a program that was not running meanwhile.
        now = time.time()
        memory.write(min(int((now - begin) * writes_per_s), 20 + int(writes_per_s * ROUND_S * 20)))
        begin = now


if __name__ == "__main__":
    main()
