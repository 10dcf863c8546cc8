"""Where the command begins, also as ``python -m migrate``.

Until a command has begun there is nothing to undo: Ctrl-C ends the process, as it does with a program that is no
Python's, instead of telling in which import it was. ``migrate.cli.main`` takes over.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys


def main() -> int:
    from migrate.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
