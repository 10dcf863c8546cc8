"""What must not interrupt a blackout, and what may call a move off."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

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
    """For what must go to its end: after COMMIT giving up would only leave the move in doubt, and so would half a
    rollback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled_by(signal.SIG_IGN):
        yield


class CallOff:
    """Whether a signal asked to call the move off. The KeyboardInterrupt it raised may have become another error on its
    way: one that hits a lock of the threading module in mid-change ends as "release unlocked lock"."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Notices signals inside; each raises KeyboardInterrupt as ever."""

        def notice(number: int, _frame: FrameType | None) -> None:
            self.asked = True
            raise KeyboardInterrupt(signal.Signals(number).name)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with _handled_by(notice):
            yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in CALLING_OFF}
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
