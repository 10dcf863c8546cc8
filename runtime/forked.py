"""A process that goes on from where this one is, with everything imported: a new one takes half a second for that.

Only for a program with one thread: what another thread held, a lock say, nobody would give back in the child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

_POLL_S = 0.01
_RESET = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


class Forked:
    """A child of ours, used as subprocess.Popen is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        limit_s = None if timeout_s is None else time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if limit_s is not None and time.monotonic() >= limit_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout_s or 0.0)
            time.sleep(_POLL_S)
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        # Not reaped yet, so the pid is still its own.
        if self.poll() is None:
            os.kill(self.pid, number)


def fork(call: Callable[[], int], *, keep: Collection[int], comm: str) -> Forked:
    """Run ``call`` in a child, whose exit code is what it returns. Raises OSError where there can be no child.

    The child leads a session of its own, reads nothing on descriptor 0, has no others but 1, 2 and ``keep``, default
    behaviour for SIGTERM, SIGINT and SIGCHLD, and ``comm`` as its name (15 bytes at most). It never returns to the
    caller, and nothing that the caller's frames hold is closed or cleaned up by it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal between the fork and the reset of its behaviour would be taken for the parent's, and be lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _RESET)
    try:
        pid = os.fork()
        if not pid:
            _run(call, keep, comm, before)
        return Forked(pid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(call: Callable[[], int], keep: Collection[int], comm: str, mask: set[Any]) -> NoReturn:
    code = 1
    try:
        _become(keep, comm)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = call()
    except KeyboardInterrupt:
        pass
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(keep: Collection[int], comm: str) -> None:
    signal.set_wakeup_fd(-1)
    for number in _RESET:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = max(first, fd + 1)
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(comm)
