"""What must not interrupt a blackout."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Iterator

CALLING_OFF = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def garbage_collector_off() -> Iterator[None]:
    """No collection in the blackout: with a large heap one takes milliseconds."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Once COMMIT is out nobody here can call the move off any more; giving up would only leave it in doubt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
