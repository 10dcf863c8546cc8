"""What a client sees of a move: one TCP connection, one request every millisecond, every answer timed and checked.

    cmigrate probe, or python -m migrate.probe redis|http|echo|tcp|udp HOST:PORT [--duration S] [--interval-ms 1] ...

Runs as a process of its own, where the clients are. Ends after ``--duration`` or at SIGTERM or SIGINT and prints one
JSON line; SIGUSR1 prints the line of what was seen since the last one and begins a new window on the same connection.
A window closes at an answer or a failure, never in the middle of a gap, so that no gap is cut in two and made small.

    {"type": "window"|"total", "requests", "failed", "resets", "reconnects", "out_of_sequence", "longest_gap_ms",
     "downtime_ms", "slow_requests", "latency_ms": {"<1": n, ...}, "gaps_ms": {"<2": n, ...}, "duration_ms",
     "probe_late_ms", "last"}

``downtime_ms`` is ``longest_gap_ms``: the longest time between two answers that follow each other. ``probe_late_ms``
is how late the probe itself woke at worst: a gap of that size may be the probe's own and not the service's.

``tcp`` with a text to send does the same with any service: whatever comes back is an answer. ``tcp`` without one opens
a new connection each time, ``udp`` sends a datagram each time; both go on without waiting (probe_scatter.py).

The next request leaves when the last one is answered and its millisecond has come, so a lost packet costs a full
retransmission: what a patient client feels, with nothing hidden by traffic behind it.

Numbers prove that nothing is lost and nothing happens twice: ``redis`` sends INCR, ``--sequence`` takes the body of an
HTTP answer for a counter, ``echo`` wants its own number back. Each must be exactly one more than the one before; only
after a broken connection may it be two, because the request on the way may have counted without being answered.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from migrate.probe_window import NS_PER_MS, Window

# Longer than any blackout worth the name, and than TCP's retransmissions after it.
ANSWER_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
RECONNECT_PAUSE_S = 0.02
# How often a silent wait looks whether the probe was told to end, and how long an answer may still take then.
LOOK_UP_S = 0.25
LAST_ANSWER_S = 2.0
MAX_ANSWER_BYTES = 1 << 20


class Asker(Protocol):
    """How to ask one kind of service. ``answer`` takes what has arrived so far."""

    def request(self, number: int) -> bytes: ...

    def answer(self, received: bytes) -> int | None:
        """The number the service answered, None while the answer is incomplete; raises ValueError for a wrong one."""
        ...


class AskRedis:
    """INCR of one key."""

    def __init__(self, key: str) -> None:
        name = key.encode()
        self._request = b"*2\r\n$4\r\nINCR\r\n$%d\r\n%s\r\n" % (len(name), name)

    def request(self, number: int) -> bytes:
        return self._request

    def answer(self, received: bytes) -> int | None:
        if not received.endswith(b"\r\n"):
            return None
        if received[:1] != b":":
            raise ValueError(f"not a number: {received[:60]!r}")
        return int(received[1:-2])


class AskEcho:
    """A line with a number, which must come back."""

    def request(self, number: int) -> bytes:
        return b"%d\n" % number

    def answer(self, received: bytes) -> int | None:
        return int(received) if received.endswith(b"\n") else None


class AskText:
    """Any text; whatever comes back is its answer."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._number = 0

    def request(self, number: int) -> bytes:
        self._number = number
        return self._text

    def answer(self, received: bytes) -> int | None:
        return self._number if received else None


class AskHttp:
    """GET of one path on a kept-alive connection; ``sequence`` takes the body for a counter."""

    def __init__(self, host: str, path: str, *, sequence: bool) -> None:
        self._request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self._sequence = sequence
        self._number = 0

    def request(self, number: int) -> bytes:
        self._number = number
        return self._request

    def answer(self, received: bytes) -> int | None:
        head, separator, body = received.partition(b"\r\n\r\n")
        if not separator:
            return None
        status, *lines = head.split(b"\r\n")
        if status.split(b" ")[1:2] != [b"200"]:
            raise ValueError(f"not 200: {status!r}")
        headers = dict(line.lower().split(b":", 1) for line in lines)
        if b"content-length" not in headers:
            raise ValueError("an answer without Content-Length")
        if len(body) < int(headers[b"content-length"]):
            return None
        return int(body) if self._sequence else self._number


class Probe:
    """Asks until told to end. ``tell`` receives each window's and at last the total's JSON value."""

    def __init__(self, address: tuple[str, int], asker: Asker, *, interval_ms: float = 1.0) -> None:
        self._address = address
        self._asker = asker
        self._interval_ns = int(interval_ms * NS_PER_MS)
        self._socket: socket.socket | None = None
        self._last = 0  # the service's last number
        self._first = True  # whatever number the service begins with is right
        self._broken = False  # the request on the way may have counted
        self.mark = False
        self.end = False
        self.announce = False
        now_ns = time.monotonic_ns()
        self._window = Window(begin_ns=now_ns, last_answer_ns=now_ns)
        self._total = Window(begin_ns=now_ns, last_answer_ns=now_ns)

    def run(self, duration_s: float | None, tell: Callable[[dict[str, Any]], None]) -> None:
        gc.disable()
        self._connect_first()
        if self.announce:
            tell({"type": "connected"})
        now_ns = time.monotonic_ns()
        self._window = Window(begin_ns=now_ns, last_answer_ns=now_ns)
        self._total = Window(begin_ns=now_ns, last_answer_ns=now_ns)
        end_ns = None if duration_s is None else now_ns + int(duration_s * 1e9)
        due_ns = now_ns
        while not self.end and (end_ns is None or time.monotonic_ns() < end_ns):
            due_ns = self._wait_until(due_ns)
            self._ask()
            if self.mark:
                self.mark = False
                now_ns = time.monotonic_ns()
                tell(self._window.to_json("window", now_ns, self._last))
                self._window = Window(begin_ns=now_ns, last_answer_ns=self._window.last_answer_ns)
        tell(self._total.to_json("total", time.monotonic_ns(), self._last))
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _count(self, name: str, amount: int = 1) -> None:
        for window in (self._window, self._total):
            setattr(window, name, getattr(window, name) + amount)

    def _wait_until(self, due_ns: int) -> int:
        """Sleep to the moment when the next request is due; answers when the one after it is."""
        now_ns = time.monotonic_ns()
        if now_ns >= due_ns:  # an answer took longer than the interval: no bunch of requests to catch up
            return now_ns + self._interval_ns
        time.sleep((due_ns - now_ns) / 1e9)
        late_ns = time.monotonic_ns() - due_ns
        for window in (self._window, self._total):
            window.probe_late_ns = max(window.probe_late_ns, late_ns)
        return due_ns + self._interval_ns

    def _ask(self) -> None:
        if self._socket is None and not self._reconnect():
            return
        assert self._socket is not None
        asked_ns = time.monotonic_ns()
        self._count("requests")
        try:
            self._socket.sendall(self._asker.request(self._last + 1))
            number = self._read_answer(self._socket)
        except (OSError, ValueError, EOFError) as error:
            self._fail(error)
            return
        now_ns = time.monotonic_ns()
        for window in (self._window, self._total):
            window.answered(now_ns, asked_ns)
        allowed = (self._last + 1, self._last + 2) if self._broken else (self._last + 1,)
        if number not in allowed and not self._first:
            self._count("out_of_sequence")
        self._last, self._first, self._broken = number, False, False

    def _read_answer(self, connection: socket.socket) -> int:
        received = b""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while len(received) < MAX_ANSWER_BYTES:
            try:
                chunk = connection.recv(65536)
            except TimeoutError:
                deadline = min(deadline, time.monotonic() + LAST_ANSWER_S) if self.end else deadline
                if time.monotonic() > deadline:
                    raise
                continue
            if not chunk:
                raise EOFError
            received += chunk
            number = self._asker.answer(received)
            if number is not None:
                return number
        raise ValueError("an answer without end")

    def _fail(self, error: Exception) -> None:
        self._count("failed")
        # The peer ended it, by RST or FIN; a connection that timed out was not reset.
        if isinstance(error, (ConnectionResetError, BrokenPipeError, EOFError)):
            self._count("resets")
        self._broken = True
        self.close()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._address, CONNECT_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(LOOK_UP_S)
        return connection

    def _connect_first(self) -> None:
        """The service may be coming up: wait for it, or raise OSError after the time an answer may take."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while self._socket is None:
            try:
                self._socket = self._connect()
            except OSError:
                if self.end or time.monotonic() > deadline:
                    raise
                time.sleep(RECONNECT_PAUSE_S)

    def _reconnect(self) -> bool:
        try:
            self._socket = self._connect()
        except OSError:
            self._count("requests")
            self._count("failed")
            time.sleep(RECONNECT_PAUSE_S)
            return False
        self._count("reconnects")
        return True


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT or [IPV6]:PORT. Raises argparse.ArgumentTypeError."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise argparse.ArgumentTypeError(f"{text!r}: an IPv6 address stands in brackets, [::1]:80")
    return host, int(port)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, of whom, how often. ``send`` is for tcp and udp, ``interval_ms`` None for what fits the kind."""

    kind: str
    address: tuple[str, int]
    interval_ms: float | None = None
    send: bytes = b""
    key: str = "probe"
    path: str = "/"
    sequence: bool = False


class AnyProbe(Protocol):
    """A probe of either kind; ``mark`` and ``end`` are set by signal handlers."""

    mark: bool
    end: bool
    announce: bool
    """Say "connected" before anything is measured."""

    def run(self, duration_s: float | None, tell: Callable[[dict[str, Any]], None]) -> None:
        """Raises OSError when the service can not be reached at all."""
        ...


def make_probe(question: Question) -> AnyProbe:
    from migrate.probe_scatter import CONNECT_INTERVAL_MS, ConnectProbe, DatagramProbe

    interval_ms = question.interval_ms or 1.0
    if question.kind == "udp":
        return DatagramProbe(question.address, question.send or b"probe\n", interval_ms=interval_ms)
    if question.kind == "tcp" and not question.send:
        return ConnectProbe(question.address, interval_ms=question.interval_ms or CONNECT_INTERVAL_MS)
    askers: dict[str, Callable[[], Asker]] = {
        "redis": lambda: AskRedis(question.key),
        "echo": AskEcho,
        "http": lambda: AskHttp(question.address[0], question.path, sequence=question.sequence),
        "tcp": lambda: AskText(question.send),
    }
    return Probe(question.address, askers[question.kind](), interval_ms=interval_ms)


def run_until_told(probe: AnyProbe, duration_s: float | None, tell: Callable[[dict[str, Any]], None]) -> None:
    """SIGUSR1 closes a window, SIGTERM and SIGINT end. Raises OSError."""

    def on_mark(_number: int, _frame: FrameType | None) -> None:
        probe.mark = True

    def on_end(_number: int, _frame: FrameType | None) -> None:
        probe.end = True

    signal.signal(signal.SIGUSR1, on_mark)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_end)
    probe.run(duration_s, tell)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m migrate.probe", description="What a client sees of a move.")
    parser.add_argument("kind", choices=("redis", "http", "echo", "tcp", "udp"))
    parser.add_argument("address", type=parse_address, metavar="HOST:PORT")
    parser.add_argument("--duration", type=float, metavar="S", help="end after this many seconds (default: SIGTERM)")
    parser.add_argument("--interval-ms", type=float)
    parser.add_argument("--send", default="", help="tcp, udp: what to send")
    parser.add_argument("--key", default="probe", help="redis: the key to count in")
    parser.add_argument("--path", default="/", help="http: what to get")
    parser.add_argument("--sequence", action="store_true", help="http: the body is a number, one more each time")
    parser.add_argument("--announce", action="store_true", help='say {"type": "connected"} first')
    options = parser.parse_args(argv)
    question = Question(
        kind=options.kind,
        address=options.address,
        interval_ms=options.interval_ms,
        send=options.send.encode(),
        key=options.key,
        path=options.path,
        sequence=options.sequence,
    )
    try:
        probe = make_probe(question)
        probe.announce = options.announce
        run_until_told(probe, options.duration, lambda line: print(json.dumps(line), flush=True))
    except OSError as error:
        print(f"probe: {options.address[0]}:{options.address[1]}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
