"""One thread for all ptrace calls: the kernel lets only the thread that seized a task speak to it.

For tasks that may die with this process: those of a restore that is not committed. Others: tracer_process.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from runtime.memory.remote import Stuck

T = TypeVar("T")


class TracerThread:
    """Runs calls one after another in one thread; a new one after a tracee was stuck. For one caller at a time."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def run(self, call: Callable[[], T]) -> T:
        """The call's result or exception."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracer")
        try:
            return self._pool.submit(call).result()
        except Stuck:
            # Only the end of the thread that seized it makes the kernel let go of a task that does not stop.
            self.close()
            raise

    def close(self) -> None:
        """Ends the thread. Idempotent; ``run`` starts another."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
