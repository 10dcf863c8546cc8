"""A client of the demo's Redis: one connection, opened once and kept through all moves.

    python -m scripts.demo_client HOST MEMORY_MIB

Fills Redis with values it can calculate again, says ``{"filled": keys}``, and for every line on stdin compares them all
and answers ``{"keys", "wrong", "same_connection"}``. Ends with its stdin.
"""

import hashlib
import json
import sys
import time

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

VALUE_BYTES = 4096
AT_ONCE = 512
READY_TIMEOUT_S = 30.0


def value(number: int) -> bytes:
    """Bytes that neither compress nor repeat, different for each number."""
    return hashlib.shake_128(b"%d" % number).digest(VALUE_BYTES)


def connect(host: str) -> redis.Redis:
    # Without retries: a client that quietly connects again would hide that its connection broke.
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            return redis.Redis(
                host=host, socket_timeout=READY_TIMEOUT_S, single_connection_client=True, retry=Retry(NoBackoff(), 0)
            )
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def wrong_values(client: redis.Redis, keys: int) -> int:
    wrong = 0
    for begin in range(0, keys, AT_ONCE):
        numbers = range(begin, min(begin + AT_ONCE, keys))
        found = client.mget([f"key:{number}" for number in numbers])
        wrong += sum(found[index] != value(number) for index, number in enumerate(numbers))
    return wrong


def main() -> None:
    host, memory_mib = sys.argv[1], int(sys.argv[2])
    keys = memory_mib * (1 << 20) // VALUE_BYTES
    client = connect(host)
    identity = client.client_id()
    for begin in range(0, keys, AT_ONCE):
        client.mset({f"key:{number}": value(number) for number in range(begin, min(begin + AT_ONCE, keys))})
    print(json.dumps({"filled": keys}), flush=True)
    for _line in sys.stdin:
        answer = {
            "keys": keys,
            "wrong": wrong_values(client, keys),
            "same_connection": client.client_id() == identity,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
