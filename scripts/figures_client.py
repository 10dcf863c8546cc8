"""Asks a Redis each millisecond over one connection, and tells how long each answer took.

    python -m scripts.figures_client HOST VALUES VALUE_BYTES

Fills Redis with random values, says ``{"filled": VALUES}``, and asks until its stdin is closed; then it says
``{"asked": [[when, seconds until the answer], ...]}``, when by the wall clock. A process of its own: in a program that
does anything else, its answers would wait for that.
"""

import gc
import json
import os
import select
import sys
import time

from scripts.demo_client import connect

PAUSE_S = 0.001


def main() -> None:
    host, values, value_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    client = connect(host)
    for number in range(values):
        client.set(f"value:{number}", os.urandom(value_bytes))
    print(json.dumps({"filled": values}), flush=True)
    asked: list[tuple[float, float]] = []
    gc.disable()
    left_s = PAUSE_S
    while not select.select([sys.stdin], [], [], left_s)[0]:
        at = time.time()
        client.incr("counter")
        took = time.time() - at
        asked.append((at, took))
        left_s = max(0.0, PAUSE_S - took)
    print(json.dumps({"asked": asked}), flush=True)


if __name__ == "__main__":
    main()
