"""Works as fast as it can, and notes how fast: how much of its speed does a move take?

    python3 rate.py MIB HOT_MIB

Random memory of MIB, of which HOT_MIB are written all the time: each step sums a page and writes to it. Every 20 ms a
line of /rates.jsonl says how many steps were done since the one before: {"at": wall clock in seconds, "steps"}.
"""

import mmap
import os
import sys
import time
import zlib

PAGE_BYTES = 4096
MIB = 1 << 20
LINE_S = 0.02


def main() -> None:
    mib, hot_mib = (int(text) for text in sys.argv[1:3])
    memory = mmap.mmap(-1, mib * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, len(memory), MIB):
        memory[offset : offset + MIB] = os.urandom(MIB)
    pages = hot_mib * MIB // PAGE_BYTES
    print("ready", flush=True)
    page = steps = 0
    with open("/rates.jsonl", "w", buffering=1) as lines:
        due = time.time() + LINE_S
        while True:
            for _ in range(20):
                start = page * PAGE_BYTES
                total = zlib.crc32(memory[start : start + PAGE_BYTES])
                memory[start] = total & 0xFF
                page = (page + 1) % pages
            steps += 20
            now = time.time()
            if now >= due:
                lines.write(f'{{"at": {now:.4f}, "steps": {steps}}}\n')
                steps, due = 0, now + LINE_S


if __name__ == "__main__":
    main()
