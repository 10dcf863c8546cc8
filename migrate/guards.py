"""What must not interrupt a blackout, and what may call a move off."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from migrate.errors import BlackoutTooLong
from migrate.interrupts import Interrupts
from runtime.errors import BadInput

CALLING_OFF = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Once the time is up the alarm comes again until it is heard: its exception may have been swallowed on its way, by a
# finalizer, say.
AGAIN_S = 0.5
# Python's own is ten times as long, which is what CRIU then waits for an answer.
SWITCH_INTERVAL_S = 0.0005


@contextlib.contextmanager
def without_pauses() -> Iterator[None]:
    """For a blackout: no garbage is collected, which takes milliseconds with a large heap; and no thread keeps the
    interpreter from another for long, which may be the one that has to answer CRIU."""
    was_on, interval_s = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
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
    """Whether a signal asked to call the move off, or its blackout took too long. The KeyboardInterrupt that either
    raised may have become another error on its way: one that hits a lock of the threading module in mid-change ends as
    "release unlocked lock". ``cause`` tells what it was.

    Raises BadInput for a limit outside the main thread, where no signal can come.
    """

    def __init__(self, max_blackout_ms: float | None = None) -> None:
        if max_blackout_ms is not None and threading.current_thread() is not threading.main_thread():
            raise BadInput(
                "a limit on the blackout is kept in the main thread only", hint="move without max_blackout_ms"
            )
        self._max_blackout_ms = max_blackout_ms
        self.asked = False
        self.too_late = False

    def cause(self, error: BaseException) -> BaseException:
        """What ended a move that ``error`` came out of."""
        if self.asked:
            return KeyboardInterrupt()
        return BlackoutTooLong(self._max_blackout_ms) if self.too_late and self._max_blackout_ms else error

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Notices signals inside; each raises KeyboardInterrupt as ever."""

        def note(number: int) -> None:
            if number == signal.SIGALRM:
                self.too_late = True
            else:
                self.asked = True

        notice = Interrupts(note).handle
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with _handled_by(notice):
            yield

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """What runs inside, within ``noticed``, is interrupted when the limit has passed; not within
        ``signals_ignored``."""
        if self._max_blackout_ms is None:
            yield
            return
        signal.setitimer(signal.ITIMER_REAL, self._max_blackout_ms / 1000, AGAIN_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (*CALLING_OFF, signal.SIGALRM)}
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
