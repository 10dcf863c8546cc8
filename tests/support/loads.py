"""Real services under real load, which judge by themselves whether anything was lost or torn."""

import shlex
import subprocess
from typing import Any

import psycopg
import redis

from tests.support.services import (
    NO_RETRY,
    POSTGRES_START,
    PROGRAMS,
    Client,
    Place,
    until_ready,
)

FILL = """
for n = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  redis.call('SET', 'key:' .. n, redis.sha1hex(n) .. redis.sha1hex(-n))
end
"""
# A digest of digests, of 1000 values each.
DIGEST = """
local parts = {}
for first = 1, tonumber(ARGV[1]), 1000 do
  local values = {}
  for n = first, math.min(first + 999, tonumber(ARGV[1])) do values[#values + 1] = redis.call('GET', 'key:' .. n) end
  parts[#parts + 1] = redis.sha1hex(table.concat(values, ' '))
end
return redis.sha1hex(table.concat(parts, ' '))
"""
FILL_AT_ONCE = 100_000
PATIENCE_S = 120.0


class Load:
    """A program of the client's that must go on until it is ended."""

    def __init__(self, client: Client, argv: tuple[str, ...]) -> None:
        def start() -> subprocess.Popen[str]:
            return subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )

        self._process = client.run(start)

    def check(self) -> None:
        if self._process.poll() is not None:
            assert self._process.stderr is not None
            raise AssertionError(f"the load has ended: {self._process.stderr.read()}")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(20)
        assert self._process.stderr is not None
        self._process.stderr.close()


class LoadedRedis:
    """So many keys, whose digest must stay, and redis-benchmark that writes to another database all the time."""

    name = "redis"
    options: tuple[str, ...] = ("-w", "/var/lib/redis")

    def __init__(self, keys: int = 1_000_000) -> None:
        self._keys = keys

    def command(self, client: Client) -> tuple[str, ...]:
        words = "--bind 0.0.0.0 --protected-mode no --save '' --appendonly no --lua-time-limit 0"
        return ("redis-server", *shlex.split(words))

    def open(self, place: Place) -> None:
        def connect() -> redis.Redis:
            client = redis.Redis(
                host=place.address, socket_timeout=PATIENCE_S, single_connection_client=True, retry=NO_RETRY
            )
            client.ping()
            return client

        self._client = place.client.run(lambda: until_ready(connect))
        self._id = self._client.client_id()
        for first in range(1, self._keys + 1, FILL_AT_ONCE):
            self._client.eval(FILL, 0, first, min(first + FILL_AT_ONCE - 1, self._keys))
        self._digest = self._client.eval(DIGEST, 0, self._keys)
        self._counter = 0
        what = "redis-benchmark -c 8 -n 1000000000 -r 100000 -d 200 --dbnum 1 -t set,get,lpush,lpop -q"
        self._load = Load(place.client, (*shlex.split(what), "-h", place.address))

    def check(self) -> None:
        self._load.check()
        assert self._client.client_id() == self._id, "the connection is a new one"
        assert self._client.eval(DIGEST, 0, self._keys) == self._digest
        self._counter += 1
        assert self._client.incr("counter") == self._counter
        assert self._client.dbsize() == self._keys + 1

    def close(self) -> None:
        self._load.close()
        self._client.close()


class LoadedPostgres:
    """pgbench with four clients, whose transactions move money: all sums must agree in every snapshot."""

    name = "postgres"
    options: tuple[str, ...] = ("-u", "postgres", "-w", "/var/lib/postgresql")
    sums = """
        SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
               (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
    """

    def __init__(self, scale: int = 5, shared_buffers: str = "128MB") -> None:
        self._scale = scale
        self._start = POSTGRES_START.replace("shared_buffers=32MB", f"shared_buffers={shared_buffers}")

    def command(self, client: Client) -> tuple[str, ...]:
        return ("sh", "-c", self._start)

    def open(self, place: Place) -> None:
        def connect() -> psycopg.Connection[Any]:
            return psycopg.connect(host=place.address, user="postgres", dbname="postgres", connect_timeout=5)

        self._session = place.client.run(lambda: until_ready(connect))
        self._session.autocommit = True
        pgbench = ("pgbench", "-h", place.address, "-U", "postgres", "postgres")
        fill = (*pgbench, "-i", "-q", "-s", str(self._scale))
        place.client.run(
            lambda: subprocess.run(fill, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S)
        )
        self._load = Load(place.client, (*pgbench, "-n", "-c", "4", "-T", "86400"))
        self._transactions = 0

    def check(self) -> None:
        self._load.check()
        accounts, tellers, branches, history = self._one(self.sums)
        assert accounts == tellers == branches == history
        (transactions,) = self._one("SELECT count(*) FROM pgbench_history")
        assert transactions >= self._transactions
        self._transactions = transactions
        self._session.execute("CHECKPOINT")

    def _one(self, statement: str) -> Any:
        return self._session.execute(statement.encode()).fetchone()

    def close(self) -> None:
        self._load.close()
        self._session.close()


class SqliteWal:
    """A writer in WAL mode, whose index is a file that two processes map; a third looks for damage."""

    name = "sqlite"
    options: tuple[str, ...] = ()
    look = "import sqlite3; d = sqlite3.connect('/work/db', timeout=60); print(d.execute({0!r}).fetchone()[0])"

    def command(self, client: Client) -> tuple[str, ...]:
        program = (PROGRAMS / "sqlite_writer.py").read_text()
        return ("python3", "-I", "-S", "-B", "-c", program, "/work")

    def open(self, place: Place) -> None:
        self._place = place
        until_ready(self._is_writing)
        self._transfers = 0

    def _is_writing(self) -> None:
        if "ready" not in self._place.exec("ls", "/work").split():
            raise ConnectionError

    def _ask(self, statement: str) -> str:
        return self._place.exec("python3", "-I", "-S", "-B", "-c", self.look.format(statement)).strip()

    def check(self) -> None:
        assert self._ask("PRAGMA integrity_check") == "ok"
        assert self._ask("SELECT sum(balance) FROM account") == "0"
        assert self._ask("SELECT (SELECT count(*) FROM transfer) - (SELECT max(n) FROM transfer)") == "0"
        before = self._transfers

        def has_gone_on() -> None:
            self._transfers = int(self._ask("SELECT count(*) FROM transfer"))
            if self._transfers <= before:
                raise ConnectionError

        until_ready(has_gone_on)

    def close(self) -> None:
        pass
