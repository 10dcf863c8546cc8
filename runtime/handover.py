"""A mark in a container's directory: another host may run it, so nothing starts it here.

A container whose right to run is being handed over is frozen, and stays so whoever dies. But its processes may be ended
by the kernel in want of memory, or with the host, and what follows an end here (a restart policy, a person) must not
make a second copy. The mark is there from just before the freeze until it is known that no other host has it.
"""

from __future__ import annotations

from pathlib import Path

from runtime.api import Container, Status
from runtime.errors import WrongState
from runtime.store import write_durably

MARK = "handover"


def begin_handover(directory: Path, move_id: str) -> None:
    """``directory`` is the container's. On the disk when this returns. Raises NoRoom or OSError."""
    write_durably(directory / MARK, move_id.encode())


def handed_over_by(directory: Path) -> str:
    """The move that the mark is of; empty without one."""
    try:
        return (directory / MARK).read_text()
    except FileNotFoundError:
        return ""


def end_handover(directory: Path) -> None:
    """Only this host has it. Idempotent."""
    (directory / MARK).unlink(missing_ok=True)


def must_be_ours_to_start(container: Container, directory: Path) -> None:
    """Raises WrongState where it runs already, here or elsewhere, or may do so."""
    name, status = container.name, container.state.status
    if status in (Status.RUNNING, Status.PAUSED):
        raise WrongState(f"container {name} already runs")
    if status in (Status.MOVED, Status.KEPT):
        raise WrongState(f"container {name} has moved to {container.state.moved_to}")
    if (directory / MARK).exists():
        raise WrongState(
            f"container {name} may run on another host: a move of it is not settled",
            hint=f"`cmigrate resolve {name}` settles it",
        )
