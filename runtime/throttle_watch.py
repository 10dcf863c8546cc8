"""Stand-alone, standard library only: gives a cgroup its processor limit back when its throttler is gone or silent.

    python3 -I -S -B throttle_watch.py SILENCE_S FILE VALUE [FILE VALUE ...] < PIPE

Each byte from the pipe is a sign of life. At its end, or after SILENCE_S without one, the values are written. It says
"ready" first, and ignores what a terminal or a shutdown sends to everybody.
"""

import contextlib
import os
import select
import signal
import sys


def main(silence_s: float, writes: list[tuple[str, str]]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.write(1, b"ready\n")
    while select.select([0], [], [], silence_s)[0] and os.read(0, 4096):
        pass
    failed = 0
    for file, value in writes:
        try:
            with open(file, "w") as opened:
                opened.write(value)
        except FileNotFoundError:
            pass  # the container has gone, and its limit with it
        except OSError:
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), list(zip(sys.argv[2::2], sys.argv[3::2], strict=True))))
