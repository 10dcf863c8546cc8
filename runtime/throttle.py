"""Slows a container down for a while, and undoes it whatever dies: this process, its terminal, or its patience.

A small process of its own holds the other end of a pipe. It writes the container's own limit back when the pipe
closes, which it does however this process ends, or when there was no sign of life for too long.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from runtime.cgroup import ContainerCgroup
from runtime.errors import MissingFeature, ProgramFailed

WATCH = Path(__file__).with_name("throttle_watch.py")
LIFT_TIMEOUT_S = 10.0
# Of v1 in the order in which they must be written, and of v2.
_FILES = ("cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.max")


class CpuThrottle:
    """A limit below the container's own. Nothing happens before the first ``slow_to``. Use it as a context manager.

    ``own_cpus`` is what the container was started with (``--cpus``), None for no limit; it has that when this is over.
    ``silence_s`` must be longer than any time between two calls of ``slow_to`` or ``still_here``.
    """

    def __init__(self, cgroup: ContainerCgroup, *, own_cpus: float | None, silence_s: float = 60.0) -> None:
        self._cgroup = cgroup
        self._own_cpus = own_cpus
        self._silence_s = silence_s
        self._watch: subprocess.Popen[bytes] | None = None
        self._since = 0.0
        self.cpus: float | None = None
        """The limit in force; None while there is none of ours."""
        self.withheld_cpu_s = 0.0
        """Own limit less ours, times how long: what it cost the container at most. Without own limit it stays 0."""

    def slow_to(self, cpus: float) -> None:
        """Limit the container to so many processors, or to its own limit where that is lower.

        Raises MissingFeature without a cpu controller, KernelCallFailed, or ProgramFailed when nobody is there to undo
        it; the container has its own limit then.
        """
        if self._watch is None:
            self._watch = self._start()
        try:
            self._sign_of_life(self._watch)
            self._cgroup.set_cpu_quota(min(cpus, self._own_cpus or math.inf))
        except BaseException:
            self.lift()
            raise
        self._account()
        self.cpus = cpus

    def still_here(self) -> None:
        """A sign of life. Raises ProgramFailed when the limit was given back meanwhile, or nobody is there to do it."""
        if self._watch is not None:
            try:
                self._sign_of_life(self._watch)
            except ProgramFailed:
                self.lift()
                raise

    def lift(self) -> None:
        """The container has its own limit again when this returns. Do it before a freeze. Idempotent."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        self._account()
        self.cpus = None
        assert watch.stdin is not None
        with contextlib.suppress(OSError):
            watch.stdin.close()
        # Not left to the other one alone: it may have been killed.
        with contextlib.suppress(Exception):
            self._cgroup.set_cpu_quota(self._own_cpus)
        try:
            watch.wait(LIFT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            watch.kill()
            watch.wait()

    def _account(self) -> None:
        now = time.monotonic()
        if self.cpus is not None and self._own_cpus is not None:
            self.withheld_cpu_s += max(0.0, self._own_cpus - self.cpus) * (now - self._since)
        self._since = now

    def _start(self) -> subprocess.Popen[bytes]:
        # Now it has its own limit, so what the files say is what has to be written back.
        self._cgroup.set_cpu_quota(self._own_cpus)
        writes: list[str] = []
        for directory in self._cgroup.paths():
            for name in _FILES:
                with contextlib.suppress(FileNotFoundError):
                    writes += [str(directory / name), (directory / name).read_text().strip()]
        if not writes:
            raise MissingFeature(
                "slowing a container down needs the cpu controller, which no cgroup hierarchy here has"
            )
        # In a session of its own: what ends this process's group must not end it.
        watch = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(WATCH), str(self._silence_s), *writes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={},
        )
        assert watch.stdout is not None
        with watch.stdout as answer:
            if answer.readline() == b"ready\n":
                return watch
        watch.kill()
        watch.wait()
        assert watch.stdin is not None
        watch.stdin.close()
        raise ProgramFailed("the watchdog of the processor limit did not start")

    def _sign_of_life(self, watch: subprocess.Popen[bytes]) -> None:
        assert watch.stdin is not None
        try:
            watch.stdin.write(b".")
            watch.stdin.flush()
        except OSError as error:
            raise ProgramFailed("the watchdog of the processor limit is gone", hint="was it killed?") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.lift()
