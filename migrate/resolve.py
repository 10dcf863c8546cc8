"""What an operator does about a move that does not end by itself: settle it, decide it, or call it off."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from migrate import machine, target_machine
from migrate.answers import dismiss_waiting
from migrate.arrivals import undo_reservation
from migrate.errors import MoveRefused, StillInDoubt
from migrate.journal import MoveJournal, close_journal, read_all
from migrate.kept_copy import kept_copy
from migrate.recover import drop_copy, recover
from runtime.api import Status
from runtime.container import Containers
from runtime.criu.dump import wake_after_dead_dump
from runtime.errors import Busy, NotFound, WrongState
from runtime.handover import end_handover
from runtime.host import HostConfig

Keep = Literal["source", "target"]
CANCEL_WAIT_S = 90.0
CANCEL_POLL_S = 0.05
_DOUBTFUL = {
    ("source", "COMMITTED"),
    ("target", "COMMIT_LOGGED"),
    ("source", "RETURNING"),
    ("target", "RETURNING"),
}
_HELD_BY_MOVE = re.compile(r"move to (?P<target>\S+) \(pid (?P<pid>\d+)\)")


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What was done, and the moves of this container that are still open on this host."""

    told: Sequence[str]
    open_moves: Sequence[str]


def settle(host: HostConfig, reference: str) -> Settled:
    """Finish or undo what journals and the other host allow. Raises NotFound for a name nothing here is known of."""
    container_id = _container_id(host, reference)
    dismiss_waiting(host, container_id, if_waiting=True)
    told = recover(host)
    containers = Containers(host)
    # Of a move whose rollback was cut short by the host's own end. Under the lock: who is at it holds that.
    with contextlib.suppress(Busy, NotFound), containers.locked(container_id, "resolve", wait_s=0.0) as container:
        if not _open(host, container_id):
            end_handover(containers.store.directory(container.id))
    return Settled(told=told, open_moves=[journal.move_id for journal in _open(host, container_id)])


def decide(host: HostConfig, reference: str, keep: Keep, *, other_side_is_fenced: bool) -> list[str]:
    """End what is in doubt by a person's word: the container is to run on the source, or on the target.

    The other host must not be able to run it: switched off, or its copy seen to be gone. Raises StillInDoubt without
    that word, WrongState where nothing is in doubt.
    """
    container_id = _container_id(host, reference)
    told = list(recover(host))
    kept = _decide_kept(host, container_id, keep, other_side_is_fenced)
    if kept is not None:
        return [*told, kept]
    doubtful = _open(host, container_id)
    if not doubtful:
        raise WrongState(f"no move of {reference} is in doubt here", hint="cmigrate history shows how moves ended")
    if not other_side_is_fenced:
        raise _must_be_fenced(keep, reference)
    for journal in doubtful:
        told.append(_decide_source(host, journal, keep) if journal.side == "source" else _decide_target(host, journal))
    return told


def _must_be_fenced(keep: Keep, reference: str) -> StillInDoubt:
    return StillInDoubt(
        f"to keep the {keep}, the other host must not be able to run {reference}",
        hint="switch it off or see that no copy runs there; then add --other-side-is-fenced",
    )


def _decide_kept(host: HostConfig, container_id: str, keep: Keep, fenced: bool) -> str | None:
    """Of a copy that is kept here in case it is to come back; None where none is."""
    containers = Containers(host)
    try:
        if containers.get(container_id).state.status is not Status.KEPT:
            return None
    except NotFound:
        return None
    with containers.locked(container_id, "resolve", wait_s=1.0) as container:
        copy = kept_copy(host, container)
        if keep == "source" and not fenced:
            raise _must_be_fenced(keep, container.name)
        return copy.decide(keep)


def _decide_source(host: HostConfig, journal: MoveJournal, keep: Keep) -> str:
    containers = Containers(host)
    container_id = str(journal.records[0].details.get("container", ""))
    with containers.locked(container_id, "resolve", wait_s=1.0) as container:
        if keep == "source":
            close_journal(host.journal_dir, journal, machine.Phase.RECLAIMED)
            wake_after_dead_dump(containers, container)
            return f"move {journal.move_id}: {container.name} runs on here"
        close_journal(host.journal_dir, journal, machine.Phase.DONE)
        drop_copy(containers, container.id)
        return f"move {journal.move_id}: the copy of {container.name} here is removed"


def _decide_target(host: HostConfig, journal: MoveJournal) -> str:
    """COMMIT came and no copy lives here: whichever is kept, this host has nothing to run."""
    undo_reservation(host, journal)
    close_journal(host.journal_dir, journal, target_machine.Phase.REFUSED)
    return f"move {journal.move_id} into this host is ended: nothing of it is left here"


def _open(host: HostConfig, container_id: str) -> list[MoveJournal]:
    """Moves of the container that are neither over nor under way."""
    found = []
    for journal in read_all(host.journal_dir):
        if journal.damage or not journal.records:
            continue
        in_doubt = (journal.side, journal.phase) in _DOUBTFUL
        if in_doubt and journal.records[0].details.get("container") == container_id:
            found.append(journal)
    return found


def _container_id(host: HostConfig, reference: str) -> str:
    """By name or id, or by the id of a move: a target may have nothing but its journal."""
    try:
        return Containers(host).get(reference).id
    except NotFound:
        for journal in read_all(host.journal_dir):
            details = journal.records[0].details if journal.records else {}
            if reference in (journal.move_id, details.get("container")):
                return str(details["container"])
        raise


def cancel(host: HostConfig, reference: str) -> str:
    """Call off the move that is under way; where the container runs then.

    Raises WrongState when none is, MoveRefused when it was too late: after COMMIT the target runs it.
    """
    containers = Containers(host)
    container = containers.get(reference)
    lock = containers.store.directory(container.id) / "lock"
    found = _HELD_BY_MOVE.search(_text(lock))
    if found is None or not _holds(int(found["pid"]), lock):
        raise WrongState(f"no move of {container.name} is under way", hint="cmigrate history shows how moves ended")
    pid, target = int(found["pid"]), found["target"]
    os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + CANCEL_WAIT_S
    while _holds(pid, lock):
        if time.monotonic() > deadline:
            raise MoveRefused(f"the move of {container.name} has not ended within {CANCEL_WAIT_S:.0f} s")
        time.sleep(CANCEL_POLL_S)
    try:
        state = containers.get(container.id).state
    except NotFound:
        state = None
    if state is None or state.status == "moved":
        raise MoveRefused(f"too late: {container.name} runs on {target}", hint="move it back from there")
    return f"the move of {container.name} is called off: it runs on here"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _holds(pid: int, lock: Path) -> bool:
    """Whether the process has this file open: the text in it outlives who wrote it, and pids come again."""
    try:
        return any(os.path.samefile(f"/proc/{pid}/fd/{number}", lock) for number in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False
