"""Sleeps in one system call until a child of it ends the sleep, and says what the call returned.

    python3 blocked.py CALL SECONDS

The call is made by ctypes: Python itself would hide an EINTR. Answers one line of JSON: {"result", "errno", "took_s"}.
"""

import array
import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
LONG_S = 60
FUTEX_WAIT, FUTEX_WAKE = 0, 1
FUTEX = {"x86_64": 202, "aarch64": 98}[os.uname().machine]

End = Callable[[], object]
Begin = Callable[[], int]


def timespec(seconds: float) -> ctypes.Array:
    return (ctypes.c_long * 2)(int(seconds), int(seconds % 1 * 1e9))


def pipe_call(make: Callable[[int], Begin]) -> tuple[Begin, End]:
    reader, writer = os.pipe()
    return make(reader), lambda: os.write(writer, b"x")


def by_read(reader: int) -> Begin:
    return lambda: libc.read(reader, ctypes.create_string_buffer(1), 1)


def by_poll(reader: int, timeout_ms: int) -> Begin:
    wanted = ctypes.create_string_buffer(struct.pack("ihh", reader, select.POLLIN, 0))
    return lambda: libc.poll(wanted, 1, timeout_ms)


def by_select(reader: int) -> Begin:
    wanted = (ctypes.c_ulong * 16)()
    wanted[reader // 64] = 1 << reader % 64
    return lambda: libc.select(reader + 1, wanted, None, None, None)


def by_epoll(reader: int, timeout_ms: int, mask: bytes = b"") -> Begin:
    poller = select.epoll()
    poller.register(reader, select.EPOLLIN)
    events = ctypes.create_string_buffer(64)
    KEEP.append(poller)
    if mask:
        return lambda: libc.epoll_pwait(poller.fileno(), events, 4, timeout_ms, ctypes.c_char_p(mask))
    return lambda: libc.epoll_wait(poller.fileno(), events, 4, timeout_ms)


def by_accept(timeout_s: int) -> tuple[Begin, End]:
    listener = socket.create_server(("127.0.0.1", 0))
    set_timeout(listener, timeout_s)
    KEEP.append(listener)
    fd = listener.fileno()
    return lambda: min(libc.accept(fd, None, None), 1), lambda: socket.create_connection(listener.getsockname())


def by_receive(timeout_s: int) -> tuple[Begin, End]:
    ours, theirs = socket.socketpair()
    set_timeout(ours, timeout_s)
    KEEP.append(ours)
    fd = ours.fileno()
    return lambda: libc.recv(fd, ctypes.create_string_buffer(1), 1, 0), lambda: theirs.send(b"x")


def set_timeout(sock: socket.socket, timeout_s: int) -> None:
    if timeout_s:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", timeout_s, 0))


def by_futex() -> tuple[Begin, End]:
    shared = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    word = ctypes.c_void_p(address)
    wait = lambda: libc.syscall(FUTEX, word, FUTEX_WAIT, 0, timespec(LONG_S), None, 0)  # noqa: E731
    KEEP.append(shared)
    return wait, lambda: libc.syscall(FUTEX, word, FUTEX_WAKE, 1, None, None, 0)


def by_semaphore() -> tuple[Begin, End]:
    number = libc.semget(0, 1, 0o600 | 0o1000)
    down, up = struct.pack("hhh", 0, -1, 0), struct.pack("hhh", 0, 1, 0)

    def wait() -> int:
        result = libc.semop(number, ctypes.c_char_p(down), 1)
        libc.semctl(number, 0, 0)  # IPC_RMID
        return int(result)

    return wait, lambda: libc.semop(number, ctypes.c_char_p(up), 1)


def by_message() -> tuple[Begin, End]:
    number = libc.msgget(0, 0o600 | 0o1000)

    def wait() -> int:
        result = libc.msgrcv(number, ctypes.create_string_buffer(64), 8, 0, 0)
        libc.msgctl(number, 0, None)  # IPC_RMID
        return int(result)

    return wait, lambda: libc.msgsnd(number, ctypes.c_char_p(struct.pack("lq", 1, 5)), 8, 0)


def by_lock(whole_file: bool) -> tuple[Begin, End]:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115
    KEEP.append(file)
    begin, end = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        own = os.open(file.name, os.O_RDWR)
        (fcntl.flock if whole_file else fcntl.lockf)(own, fcntl.LOCK_EX)
        os.write(begin[1], b"x")
        os.read(end[0], 1)
        os._exit(0)
    os.read(begin[0], 1)
    request = struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0)
    fd = file.fileno()
    if whole_file:
        return lambda: libc.flock(fd, fcntl.LOCK_EX), lambda: os.write(end[1], b"x")
    return lambda: libc.fcntl(fd, fcntl.F_SETLKW, ctypes.c_char_p(request)), lambda: os.write(end[1], b"x")


def by_child() -> tuple[Begin, End]:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(reader, 1)
        os._exit(0)
    return lambda: min(libc.waitpid(pid, None, 0), 1), lambda: os.write(writer, b"x")


def by_signal_wait() -> tuple[Begin, End]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    wanted = (ctypes.c_ulong * 16)(1 << signal.SIGUSR1 - 1)
    parent = os.getpid()
    return lambda: libc.sigtimedwait(wanted, None, timespec(LONG_S)), lambda: os.kill(parent, signal.SIGUSR1)


def by_pause() -> tuple[Begin, End]:
    signal.signal(signal.SIGUSR1, lambda *_: None)
    parent = os.getpid()
    return libc.pause, lambda: os.kill(parent, signal.SIGUSR1)


def by_sleep(seconds: float) -> tuple[Begin, End]:
    return lambda: libc.nanosleep(timespec(seconds), None), lambda: None


def by_clock_sleep(seconds: float) -> tuple[Begin, End]:
    return lambda: libc.clock_nanosleep(time.CLOCK_MONOTONIC, 0, timespec(seconds), None), lambda: None


def by_timer(seconds: float) -> tuple[Begin, End]:
    timer = libc.timerfd_create(time.CLOCK_MONOTONIC, 0)
    libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(0, 0, int(seconds), int(seconds % 1 * 1e9)), None)
    return by_buffer_read(timer), lambda: None


def by_buffer_read(fd: int) -> Begin:
    buffer = array.array("Q", [0])
    return lambda: libc.read(fd, ctypes.c_void_p(buffer.buffer_info()[0]), 8)


KEEP: list[object] = []


def prepare(name: str, seconds: float) -> tuple[Begin, End]:
    calls: dict[str, Callable[[], tuple[Begin, End]]] = {
        "read": lambda: pipe_call(by_read),
        "poll": lambda: pipe_call(lambda fd: by_poll(fd, -1)),
        "poll with timeout": lambda: pipe_call(lambda fd: by_poll(fd, LONG_S * 1000)),
        "select": lambda: pipe_call(by_select),
        "epoll_wait": lambda: pipe_call(lambda fd: by_epoll(fd, -1)),
        "epoll_wait with timeout": lambda: pipe_call(lambda fd: by_epoll(fd, LONG_S * 1000)),
        "epoll_pwait": lambda: pipe_call(lambda fd: by_epoll(fd, -1, bytes(8))),
        "accept": lambda: by_accept(0),
        "accept with timeout": lambda: by_accept(LONG_S),
        "recv": lambda: by_receive(0),
        "recv with timeout": lambda: by_receive(LONG_S),
        "futex": by_futex,
        "semop": by_semaphore,
        "msgrcv": by_message,
        "flock": lambda: by_lock(True),
        "fcntl lock": lambda: by_lock(False),
        "waitpid": by_child,
        "sigtimedwait": by_signal_wait,
        "pause": by_pause,
        "nanosleep": lambda: by_sleep(seconds),
        "clock_nanosleep": lambda: by_clock_sleep(seconds),
        "timerfd": lambda: by_timer(seconds),
    }
    return calls[name]()


def main() -> None:
    seconds = float(sys.argv[2])
    begin, end = prepare(sys.argv[1], seconds)
    child = os.fork()
    if not child:
        time.sleep(seconds)
        end()
        time.sleep(1)
        os._exit(0)
    print("ready", flush=True)
    started = time.monotonic()
    result = begin()
    error = ctypes.get_errno() if result < 0 else 0
    took_s = time.monotonic() - started
    print(json.dumps({"result": result, "errno": error, "took_s": took_s}), flush=True)
    os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
