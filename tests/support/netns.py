"""Sockets of another network namespace in this process: a socket stays where it was made."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from runtime.linux import calls

T = TypeVar("T")


def in_netns(pid: int, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread that is in the network namespace of process ``pid``; its exception comes out here.

    (A thread may change its network namespace alone; its sockets can then be used from everywhere.)
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with Path(f"/proc/{pid}/ns/net").open() as namespace:
                calls.setns(namespace.fileno(), calls.CLONE_NEWNET)
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="in-netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
