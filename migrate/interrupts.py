"""Ctrl-C, raised where it can be heard.

Python raises KeyboardInterrupt wherever it is. In the middle of an import, or in an event loop of a library or its
making, that becomes another error, and in a finalizer a line on stderr and nothing else. There it comes again a moment
later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

AGAIN_S = 0.02
MOST_PUT_OFF = 100
"""A program that does not get out of there in two seconds is interrupted all the same."""
_NOT_IN = ("_frozen_importlib", "importlib", "asyncio", "pyroute2")


class Interrupts:
    """The handler of one or more signals that call off what is going on; ``asked`` once one has come.

    ``note`` is called with its number whenever one comes, in a signal handler.
    """

    def __init__(self, note: Callable[[int], None] = lambda _number: None) -> None:
        self.asked = False
        self._note = note
        self._put_off = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt, or sees to it that the signal comes again."""
        self.asked = True
        self._note(number)
        if self._put_off < MOST_PUT_OFF and _can_not_be_heard_in(frame) and _send_again(number):
            self._put_off += 1
            return
        self._put_off = 0
        raise KeyboardInterrupt(signal.Signals(number).name)


@contextlib.contextmanager
def ctrl_c_is_heard() -> Iterator[Interrupts]:
    """For a whole program. One that was started with SIGINT ignored goes on ignoring it; and outside the main thread,
    or where somebody else handles it, nothing is changed."""
    interrupts = Interrupts()
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not ours or before not in (signal.SIG_DFL, signal.default_int_handler):
        yield interrupts
        return
    hook = sys.unraisablehook

    def unheard(event: sys.UnraisableHookArgs) -> None:
        if not (issubclass(event.exc_type, KeyboardInterrupt) and _send_again(signal.SIGINT)):
            hook(event)

    sys.unraisablehook = unheard
    signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook


def _can_not_be_heard_in(frame: FrameType | None) -> bool:
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        # Nor here: sending it again takes longer on a busy machine than until it comes.
        if name == __name__ or name.partition(".")[0] in _NOT_IN:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> bool:
    """Whether it will come: at the end of the interpreter there are no threads any more."""
    timer = threading.Timer(AGAIN_S, os.kill, [os.getpid(), number])
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:
        return False
    return True
