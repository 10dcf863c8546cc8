"""What a mover or an agent that died has left undone is finished or undone here: at every agent start and before every
move. The journals say how far it was; who still lives holds the container's lock and is left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from migrate import machine, target_machine
from migrate.asking import ask
from migrate.errors import MigrateError
from migrate.journal import Journal, MoveJournal, read_all, read_one
from migrate.postcopy_target import DEATH_RECORD, MISSING_MARK
from runtime.api import Container, Status
from runtime.container import Containers
from runtime.criu.dump import wake_after_dead_dump
from runtime.errors import Busy, NotFound, RuntimeFault
from runtime.host import HostConfig
from runtime.linux.rcu import turn_off_what_is_left
from runtime.store import process_start_ticks
from transport.api import TransportError

_SOURCE_BEFORE_COMMIT = {"PREPARED", "PRECOPY", "FROZEN", "SENDING"}
_TARGET_BEFORE_COMMIT = {"RESERVED", "RECEIVING", "VERIFIED", "RESTORED_HELD"}
_SETTLED = {"DONE", "ROLLED_BACK", "RECLAIMED", "CONFIRMED", "REFUSED", "RESUMED"}


def recover(host: HostConfig) -> list[str]:
    """Settle what can be settled without asking anybody; a line for each thing done or still open."""
    told: list[str] = []
    turn_off_what_is_left(host.run_dir)
    for journal in read_all(host.journal_dir):
        if journal.damage or not journal.records:
            continue
        if journal.phase in _SETTLED:
            if (journal.side, journal.phase) == ("source", "DONE") and _is_of_this_stay(host, journal):
                with contextlib.suppress(Busy, NotFound):
                    told += _forget_moved(host, journal)
            continue
        with contextlib.suppress(Busy):
            told += _source(host, journal) if journal.side == "source" else _target(host, journal)
    return told


def _source(host: HostConfig, journal: MoveJournal) -> list[str]:
    containers = Containers(host)
    details = journal.records[0].details
    container_id, target = str(details.get("container", "")), str(details.get("target", ""))
    try:
        with containers.locked(container_id, "recovery", wait_s=0.0) as container:
            if journal.phase in _SOURCE_BEFORE_COMMIT:
                # The target cannot run without COMMIT, so nobody has to be asked.
                wake_after_dead_dump(containers, container)
                close_journal(host, journal, machine.Phase.ROLLED_BACK)
                return [f"move {journal.move_id} of {container.name} was broken off: it runs on here"]
            return [_settle_doubt(host, journal, containers, container, target)]
    except NotFound:
        close_journal(host, journal, machine.Phase.ROLLED_BACK)
        return [f"move {journal.move_id} was broken off, and its container is gone"]
    finally:
        shutil.rmtree(host.state_dir / "moves" / journal.move_id, ignore_errors=True)


def _forget_moved(host: HostConfig, journal: MoveJournal) -> list[str]:
    """A mover that died after DONE has left its frozen copy, or files that were kept until the target was complete."""
    containers = Containers(host)
    details = journal.records[0].details
    container_id, target = str(details.get("container", "")), str(details.get("target", ""))
    if _runs(containers, container_id):
        return []
    with containers.locked(container_id, "recovery", wait_s=0.0) as container:
        if _runs(containers, container_id):
            return []
        try:
            state = ask(host, target, journal.move_id, journal.records[-1].epoch)
        except (TransportError, MigrateError, RuntimeFault):
            return []  # they take room here and do no harm
        if state != "running":
            return []
        drop_copy(containers, container.id)
        return [f"move {journal.move_id}: {container.name} is on {target}, what was left of it here is removed"]


def _runs(containers: Containers, container_id: str) -> bool:
    """As somebody wants it to: a copy that a move has left is recorded as running, and frozen."""
    status = containers.get(container_id).state.status
    return status is Status.PAUSED or (status is Status.RUNNING and not containers.cgroup(container_id).frozen())


def _is_of_this_stay(host: HostConfig, journal: MoveJournal) -> bool:
    """The container may have moved back here since; then what is here is no leftover of this move. Times of day do not
    tell: a clock may have been put back in between. A journal that does not say so says nothing."""
    details = journal.records[0].details
    known, now = details.get("came_by"), Containers(host).store.came_by(str(details.get("container", "")))
    return isinstance(known, str) and known == now


def _settle_doubt(
    host: HostConfig, journal: MoveJournal, containers: Containers, container: Container, target: str
) -> str:
    """COMMIT was on this disk: only the target knows. The copy here stays frozen until it has answered."""
    name = container.name
    try:
        state = ask(host, target, journal.move_id, journal.records[-1].epoch)
    except (TransportError, MigrateError, RuntimeFault) as error:
        return f"move {journal.move_id} of {name} is in doubt, its copy here stays frozen: {error}"
    if state in ("running", "lost"):
        drop_copy(containers, container.id)
        close_journal(host, journal, machine.Phase.DONE)
        what = "runs on" if state == "running" else "was lost, for its memory did not all arrive; its files are on"
        return f"move {journal.move_id}: {name} {what} {target}"
    if state == "refused":
        close_journal(host, journal, machine.Phase.RECLAIMED)
        wake_after_dead_dump(containers, container)
        return f"move {journal.move_id}: {target} refused, {name} runs on here"
    return f"move {journal.move_id} of {name} is in doubt: {target} says {state}; ask again in a minute"


def standing(host: HostConfig, move_id: str, epoch: int) -> str:
    """Where a move into this host stands, for who asks; what was never heard of is refused for good."""
    journal = read_one(host.journal_dir, move_id, "target")
    if journal is None or not journal.records:
        with Journal(host.journal_dir, move_id, side="target", epoch=epoch) as file:
            file.append(target_machine.Phase.REFUSED, {"why": "asked about a move that never came"})
        return "refused"
    if journal.phase in ("RESUMED", "CONFIRMED"):
        return _whole(host, str(journal.records[0].details.get("container")))
    if journal.phase == "COMMIT_LOGGED":
        return (
            "running" if _is_here(Containers(host), str(journal.records[0].details.get("container"))) else "committed"
        )
    if journal.phase == "REFUSED":
        return "refused"
    details = journal.records[0].details
    if _lives(details.get("pid"), details.get("pid_start")):
        return "held"
    _target(host, journal)
    return "refused"


def _whole(host: HostConfig, container_id: str) -> str:
    """Of a container that was released here: post-copy may have to bring memory still, or have failed to."""
    containers = Containers(host)
    directory = containers.store.directory(container_id)
    if not (directory / MISSING_MARK).exists():
        return "running"
    lost = (directory / DEATH_RECORD).exists() or not _is_here(containers, container_id)
    return "lost" if lost else "committed"


def _target(host: HostConfig, journal: MoveJournal) -> list[str]:
    details = journal.records[0].details
    container_id = str(details.get("container", ""))
    if _lives(details.get("pid"), details.get("pid_start")):
        return []
    containers = Containers(host)
    if journal.phase in _TARGET_BEFORE_COMMIT:
        undo_reservation(host, journal)
        close_journal(host, journal, target_machine.Phase.REFUSED)
        return [f"move {journal.move_id} into this host was broken off: undone"]
    if _is_here(containers, container_id):
        close_journal(host, journal, target_machine.Phase.RESUMED)
        return []
    return [f"move {journal.move_id} into this host has COMMIT, and container {container_id} does not run here"]


def undo_reservation(host: HostConfig, journal: MoveJournal) -> None:
    """Remove what a move into this host has made, unless the container lives here."""
    containers = Containers(host)
    container_id = str(journal.records[0].details.get("container", ""))
    if not _is_here(containers, container_id):
        containers.clean_up(container_id)
        containers.store.forget_reservation(container_id, journal.move_id)
    shutil.rmtree(host.state_dir / "moves" / journal.move_id, ignore_errors=True)


def drop_copy(containers: Containers, container_id: str) -> None:
    """The container lives elsewhere: kill what is frozen here, and remove its files."""
    containers.cgroup(container_id).kill()
    containers.clean_up(container_id)
    containers.store.remove(container_id)


def _lives(pid: object, start_ticks: object) -> bool:
    return isinstance(pid, int) and process_start_ticks(pid) == start_ticks is not None


def _is_here(containers: Containers, container_id: str) -> bool:
    try:
        container: Container = containers.get(container_id)
    except (NotFound, RuntimeFault):
        return False
    return container.id == container_id and container.state.status in (Status.RUNNING, Status.PAUSED)


def close_journal(host: HostConfig, journal: MoveJournal, phase: str) -> None:
    side = journal.side
    with Journal(host.journal_dir, journal.move_id, side=side, epoch=journal.records[-1].epoch) as file:
        file.append(phase, {"why": "recovered", "by": os.getpid()})
