"""The services that moves are tested with: how each is started, filled, and checked from a client's side.

A Service opens its connections once, before the first move, and keeps them: each check goes through them, so that a
connection that broke fails the check.
"""

import contextlib
import hashlib
import http.client
import json
import random
import shlex
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

PROGRAMS = Path(__file__).resolve().parents[1] / "workloads"
# Where the programs appear in a container.
MOUNTED = "/workloads"
READY_TIMEOUT_S = 40.0
ANSWER_TIMEOUT_S = 20.0
# A client that quietly connects again would hide that its connection broke.
NO_RETRY = Retry(NoBackoff(), 0)


class Client(Protocol):
    """Where clients are; tests/support/lab.py has the one there is."""

    @property
    def address(self) -> str: ...

    def run(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` where the client is: sockets it makes are the client's."""
        ...


class Place(Protocol):
    """A running container."""

    @property
    def address(self) -> str: ...

    @property
    def client(self) -> Client: ...

    def connect(self, port: int) -> socket.socket:
        """A connection from the client to the container."""
        ...

    def exec(self, *argv: str) -> str:
        """Run a program in the container; its standard output."""
        ...

    def logs(self) -> list[str]: ...


class Service(Protocol):
    name: str
    options: tuple[str, ...]

    def command(self, client: Client) -> tuple[str, ...]:
        """What the container runs; called once, and may start what the container wants to talk to."""
        ...

    def open(self, place: Place) -> None:
        """Wait until it serves, fill it, and remember what must be found again."""
        ...

    def check(self) -> None:
        """Everything is still there and the service goes on; AssertionError says what is not."""
        ...

    def close(self) -> None: ...


def until_ready(connect: Callable[[], Any]) -> Any:
    """Call ``connect`` until it does not raise any more, for as long as a service may take to come up."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            return connect()
        except (OSError, redis.ConnectionError, redis.BusyLoadingError, psycopg.OperationalError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class Lines:
    """A connection that answers each line with one line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER_TIMEOUT_S)
        self._connection = connection
        self._file = connection.makefile("rb")

    def ask(self, line: str) -> bytes:
        self._connection.sendall(line.encode() + b"\n")
        answer = self._file.readline()
        assert answer.endswith(b"\n"), f"the connection ended: {answer!r}"
        return answer

    def close(self) -> None:
        self._file.close()
        self._connection.close()


class Redis:
    """Twenty thousand keys, a counter, and an append-only file on disk."""

    name = "redis"
    options: tuple[str, ...] = ("-w", "/var/lib/redis", "--memory", "256m")
    keys = 20_000

    def command(self, client: Client) -> tuple[str, ...]:
        options = "--bind 0.0.0.0 --protected-mode no --save '' --appendonly yes --appendfsync everysec"
        return ("redis-server", *shlex.split(options))

    def _connect(self, place: Place) -> None:
        def connect() -> redis.Redis:
            client = redis.Redis(
                host=place.address, socket_timeout=ANSWER_TIMEOUT_S, single_connection_client=True, retry=NO_RETRY
            )
            client.ping()  # it connects at the first command
            return client

        self._client = place.client.run(lambda: until_ready(connect))
        self._id = self._client.client_id()

    def open(self, place: Place) -> None:
        self._connect(place)
        chance = random.Random(1)
        self._content = {f"key:{n}": chance.randbytes(100) for n in range(self.keys)}
        self._client.mset(self._content)
        self._counter = 0

    def check(self) -> None:
        assert self._client.client_id() == self._id, "the connection is a new one"
        found = self._client.mget(list(self._content))
        assert found == list(self._content.values())
        self._counter += 1
        assert self._client.incr("counter") == self._counter
        assert self._client.dbsize() == self.keys + 1

    def check_after_restart(self, place: Place) -> None:
        """What it wrote to its append-only file, before, during and after moves, is enough to come back."""
        self.close()
        self._connect(place)
        self.check()

    def close(self) -> None:
        self._client.close()


class Nginx:
    """A master and two workers of another uid: static files of two sizes over kept-alive connections to both."""

    name = "nginx"
    options: tuple[str, ...] = ("-v", f"{PROGRAMS}:{MOUNTED}:ro")
    connections = 6

    def command(self, client: Client) -> tuple[str, ...]:
        return ("sh", "-c", f"mkdir -p /srv/www /var/lib/nginx; exec nginx -c {MOUNTED}/nginx.conf")

    def open(self, place: Place) -> None:
        until_ready(lambda: place.connect(8080).close())
        place.exec("sh", "-c", "head -c 3000000 /dev/urandom > /srv/www/large; echo hello > /srv/www/small")
        self._digest = place.exec("sha256sum", "/srv/www/large").split()[0]
        self._clients = [http.client.HTTPConnection(place.address, 8080) for _ in range(self.connections)]
        for client in self._clients:
            client.sock = place.connect(8080)
        self._workers = {self._get(client, "/ping")[1] for client in self._clients}
        self._place = place

    def _get(self, client: http.client.HTTPConnection, path: str) -> tuple[bytes, str]:
        client.auto_open = 0  # a second connection would hide that the first one broke
        client.request("GET", path)
        answer = client.getresponse()
        assert answer.status == 200, f"{path}: {answer.status}"
        return answer.read(), answer.headers.get("X-Worker", "")

    def check(self) -> None:
        for client in self._clients:
            body, worker = self._get(client, "/ping")
            assert (body, worker in self._workers) == (b"pong\n", True)
        assert self._get(self._clients[0], "/small")[0] == b"hello\n"
        large, _worker = self._get(self._clients[1], "/large")
        assert hashlib.sha256(large).hexdigest() == self._digest
        # A connection of today reaches a worker that was there at the start: none has died and been replaced.
        fresh = http.client.HTTPConnection(self._place.address, 8080)
        fresh.sock = self._place.connect(8080)
        self._workers_are_two(self._get(fresh, "/ping")[1])
        fresh.close()

    def _workers_are_two(self, worker: str) -> None:
        listing = self._place.exec("sh", "-c", "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo $p; done")
        workers = {line.rpartition("/")[2] for line in listing.splitlines() if "worker process" in line}
        assert len(workers) == 2, listing
        assert self._workers | {worker} <= workers

    def close(self) -> None:
        for client in self._clients:
            client.close()


class HttpServer:
    """A Python HTTP server: a counter and 2 MiB in memory, files on disk; two connections kept."""

    name = "httpd"
    options: tuple[str, ...] = ("-v", f"{PROGRAMS}:{MOUNTED}:ro", "-e", "PYTHONDONTWRITEBYTECODE=1")

    def command(self, client: Client) -> tuple[str, ...]:
        return ("python3", f"{MOUNTED}/http_server.py", "8000")

    def open(self, place: Place) -> None:
        until_ready(lambda: place.connect(8000).close())
        self._clients = [http.client.HTTPConnection(place.address, 8000) for _ in range(2)]
        for client in self._clients:
            client.sock = place.connect(8000)
            client.auto_open = 0
        self._count = 0
        self._files: dict[str, bytes] = {}
        self._digest = hashlib.sha256(self._ask(self._clients[0], "GET", "/blob")).hexdigest()

    def _ask(self, client: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> bytes:
        client.request(method, path, body)
        answer = client.getresponse()
        data = answer.read()
        assert answer.status in (200, 201), f"{method} {path}: {answer.status}"
        return data

    def check(self) -> None:
        for client in self._clients:
            self._count += 1
            assert int(self._ask(client, "GET", "/count")) == self._count
            assert hashlib.sha256(self._ask(client, "GET", "/blob")).hexdigest() == self._digest
        for name, content in self._files.items():
            assert self._ask(self._clients[0], "GET", f"/files/{name}") == content
        # One more file each time, so that every move has a root difference that the one before did not have.
        name = f"file-{len(self._files)}"
        self._files[name] = random.Random(len(self._files)).randbytes(50_000)
        self._ask(self._clients[1], "PUT", f"/files/{name}", self._files[name])

    def close(self) -> None:
        for client in self._clients:
            client.close()


POSTGRES_START = """
set -e
bin=$(ls -d /usr/lib/postgresql/*/bin | tail -n 1)
data=/var/lib/postgresql/moving
if ! [ -d $data ]; then
  $bin/initdb -D $data --auth trust --no-sync --locale C --encoding UTF8 >/dev/null
  echo 'host all all 0.0.0.0/0 trust' >>$data/pg_hba.conf
fi
exec $bin/postgres -D $data -c listen_addresses='*' -c unix_socket_directories=$data -c shared_buffers=32MB
"""


class Postgres:
    """Its own uid, shared memory, background processes; one session with a temporary table and a prepared statement."""

    name = "postgres"
    options: tuple[str, ...] = ("-u", "postgres", "-w", "/var/lib/postgresql")
    rows = 20_000

    def command(self, client: Client) -> tuple[str, ...]:
        return ("sh", "-c", POSTGRES_START)

    def open(self, place: Place) -> None:
        def connect() -> psycopg.Connection[Any]:
            return psycopg.connect(host=place.address, user="postgres", dbname="postgres", connect_timeout=5)

        self._session = place.client.run(lambda: until_ready(connect))
        self._session.autocommit = True
        self._ask(f"CREATE TABLE t AS SELECT n, md5(n::text) AS h FROM generate_series(1, {self.rows}) n")
        self._ask("CREATE INDEX ON t (h)")
        self._ask("CREATE TEMP TABLE mine (n int)")
        self._ask("PREPARE one (text) AS SELECT n FROM t WHERE h = $1")
        self._pid, self._digest = self._ask("SELECT pg_backend_pid()"), self._sum()
        self._moves = 0

    def _ask(self, statement: str) -> Any:
        cursor = self._session.execute(statement.encode())
        return cursor.fetchone()[0] if cursor.description else None

    def _sum(self) -> Any:
        return self._ask("SELECT md5(string_agg(h, '' ORDER BY n)) FROM t WHERE n > 0")

    def check(self) -> None:
        assert self._ask("SELECT pg_backend_pid()") == self._pid
        assert self._sum() == self._digest
        self._moves += 1
        self._ask(f"INSERT INTO mine VALUES ({self._moves})")
        assert self._ask("SELECT count(*) FROM mine") == self._moves
        wanted = hashlib.md5(b"4711").hexdigest()
        assert self._ask(f"EXECUTE one ('{wanted}')") == 4711
        self._ask(f"INSERT INTO t VALUES (-{self._moves}, 'x')")
        self._ask("CHECKPOINT")
        assert self._ask("SELECT count(*) FROM t") == self.rows + self._moves
        # A new session is a new process: the postmaster still forks.
        assert self._ask("SELECT count(*) FROM pg_stat_activity WHERE backend_type <> 'client backend'") >= 4

    def close(self) -> None:
        self._session.close()


class Pipeline:
    """A shell pipeline that forks all the time. Its log must hold every number once and in order."""

    name = "pipeline"
    options: tuple[str, ...] = ()

    def command(self, client: Client) -> tuple[str, ...]:
        count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"
        return ("sh", "-c", f"{count} | cat | while read n; do echo line $n; done")

    def open(self, place: Place) -> None:
        self._place = place
        self._seen = 0
        self._wait_for_more(20)

    def _wait_for_more(self, count: int) -> None:
        wanted = self._seen + count
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (found := len(self._place.logs())) < wanted:
            assert time.monotonic() < deadline, f"the pipeline stands still at {found} lines"
            time.sleep(0.1)

    def check(self) -> None:
        self._wait_for_more(5)
        lines = self._place.logs()
        assert lines == [f"line {n}" for n in range(1, len(lines) + 1)]
        self._seen = len(lines)

    def close(self) -> None:
        pass


class EchoServer:
    """A service at the client's side that sends every line back; ``connections`` counts who came."""

    def __init__(self, client: Client) -> None:
        self._listener: socket.socket = client.run(lambda: socket.create_server(("0.0.0.0", 0)))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(4096):
                connection.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for connection in self._open:
            connection.close()


class Threads:
    """Eight threads that calculate, a connection to it and a connection from it; see tests/workloads/threads.py."""

    name = "threads"
    options: tuple[str, ...] = ("-v", f"{PROGRAMS}:{MOUNTED}:ro", "-e", "PYTHONDONTWRITEBYTECODE=1", "--cpus", "0.5")

    def command(self, client: Client) -> tuple[str, ...]:
        self._echo = EchoServer(client)
        return ("python3", f"{MOUNTED}/threads.py", "7000", client.address, str(self._echo.port))

    def open(self, place: Place) -> None:
        self._lines = Lines(until_ready(lambda: place.connect(7000)))
        self._before = self._report()
        assert len(self._before["threads"]) == 8

    def _report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self._lines.ask("report"))
        return report

    def check(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._has_gone_on(now := self._report()):
            assert time.monotonic() < deadline, f"{self._before} then {now}"
            time.sleep(0.02)
        for number, (steps, value) in enumerate(now["threads"]):
            assert value == value_after(number, steps), f"thread {number} has calculated wrongly"
        assert (now["peer_error"], now["connections"], self._echo.connections) == ("", self._before["connections"], 1)
        assert now["sent"] - now["echoed"] in (0, 1)
        self._before = now

    def _has_gone_on(self, now: dict[str, Any]) -> bool:
        pairs = zip(now["threads"], self._before["threads"], strict=True)
        return now["echoed"] > self._before["echoed"] and all(new[0] > old[0] for new, old in pairs)

    def close(self) -> None:
        self._lines.close()
        self._echo.close()


def value_after(start: int, steps: int) -> int:
    """The generator's value after so many steps, in logarithmic time: a step is x -> a*x + c, and so are many."""
    factor, summand, mask = 6364136223846793005, 1442695040888963407, (1 << 64) - 1
    whole_factor, whole_summand = 1, 0
    while steps:
        if steps & 1:
            whole_factor, whole_summand = whole_factor * factor & mask, (whole_summand * factor + summand) & mask
        factor, summand = factor * factor & mask, (summand * factor + summand) & mask
        steps >>= 1
    return (start * whole_factor + whole_summand) & mask


class Memory:
    """Random memory of which a part is written to all the time; see tests/workloads/memory.py."""

    name = "memory"
    options: tuple[str, ...] = ("-v", f"{PROGRAMS}:{MOUNTED}:ro", "-e", "PYTHONDONTWRITEBYTECODE=1")

    def __init__(self, *, mib: int, hot_mib: int = 4, writes_per_s: int = 2000) -> None:
        self._sizes = (str(mib), str(hot_mib), str(writes_per_s))

    def command(self, client: Client) -> tuple[str, ...]:
        return ("python3", f"{MOUNTED}/memory.py", *self._sizes, "7000")

    def open(self, place: Place) -> None:
        self._lines = Lines(until_ready(lambda: place.connect(7000)))
        self._writes = 0

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self._lines.ask("check"))
        return report

    def check(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (found := self.report())["writes"] <= self._writes:
            assert time.monotonic() < deadline, "nothing is written any more"
            time.sleep(0.05)
        assert (found["cold"], found["hot"]) == (True, True)
        self._writes = found["writes"]

    def close(self) -> None:
        self._lines.close()


def all_services() -> list[Service]:
    """The services that the first release promises to move."""
    return [Redis(), Nginx(), HttpServer(), Postgres(), Pipeline(), Threads()]
