"""Moves into this host, for who asks about one and for who finds one whose agent has died: finished or undone.

The agent that dies before COMMIT leaves something to undo. After it, what it was about to release either runs, and is
taken over; or is proven never to have run, and is refused; or has ended, and that is what became of it here.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from migrate import target_machine
from migrate.journal import RELEASING, Journal, MoveJournal, boot_id, close_journal, read_one
from migrate.losses import report_loss_of
from migrate.postcopy_target import DEATH_RECORD, MISSING_MARK
from migrate.waiting import door_of
from runtime.api import Status
from runtime.container import Containers
from runtime.errors import Busy, CorruptData, NotFound, RuntimeFault
from runtime.host import HostConfig
from runtime.orphans import orphan_state, take_over
from runtime.store import process_start_ticks, read_json
from runtime.wire import remove_wires, restore_lead

_BEFORE_COMMIT = {"RESERVED", "RECEIVING", "VERIFIED", "RESTORED_HELD"}
_RUNS = {"RESUMED", "SETTLED", "CONFIRMED"}
# Of one that is being given back nothing certain can be said yet.
_OVER = {"REFUSED": "refused", "RETURNED": "returned", "RETURNING": "committed"}
_LOCK_WAIT_S = 8.0
KILLED = 128 + signal.SIGKILL


def standing(host: HostConfig, move_id: str, epoch: int) -> str:
    """Where a move into this host stands, for who asks; what was never heard of is refused for good."""
    journal = read_one(host.journal_dir, move_id, "target")
    if journal is None or not journal.records:
        with Journal(host.journal_dir, move_id, side="target", epoch=epoch) as file:
            file.append(target_machine.Phase.REFUSED, {"why": "asked about a move that never came"})
        return "refused"
    if journal.phase in _RUNS:
        return _whole(host, _container_id(journal))
    if journal.phase in _OVER:
        return _OVER[journal.phase]
    if at_work(journal):
        return "committed" if journal.phase == "COMMIT_LOGGED" else "held"
    with contextlib.suppress(Busy):
        settle_arrival(host, journal)
    settled = read_one(host.journal_dir, move_id, "target")
    assert settled is not None
    if settled.phase in _RUNS:
        return _whole(host, _container_id(settled))
    return "refused" if settled.phase == "REFUSED" else "committed"


def _whole(host: HostConfig, container_id: str) -> str:
    """Of a container that was released here: post-copy may have to bring memory still, or have failed to."""
    containers = Containers(host)
    directory = containers.store.directory(container_id)
    if not (directory / MISSING_MARK).exists():
        return "running"
    lost = (directory / DEATH_RECORD).exists() or not is_here(containers, container_id)
    return "lost" if lost else "committed"


def settle_arrival(host: HostConfig, journal: MoveJournal) -> list[str]:
    """Finish or undo one whose last record is not its end, unless its agent lives; a line for what was done or is
    open. Raises Busy while another one is at it."""
    if at_work(journal):
        return []
    if journal.phase in _BEFORE_COMMIT:
        undo_reservation(host, journal)
        close_journal(host.journal_dir, journal, target_machine.Phase.REFUSED)
        return [f"move {journal.move_id} into this host was broken off: undone"]
    container_id = _container_id(journal)
    try:
        with Containers(host).store.locked(container_id, wait_s=_LOCK_WAIT_S, purpose="recovery"):
            again = read_one(host.journal_dir, journal.move_id, "target")
            return _settle_committed(host, again) if again is not None and again.phase == "COMMIT_LOGGED" else []
    except NotFound:
        return [_open_line(journal)]


def _settle_committed(host: HostConfig, journal: MoveJournal) -> list[str]:
    """COMMIT is on this disk, and the agent died before it could say what it did."""
    containers = Containers(host)
    container_id = _container_id(journal)
    if not _is_admitted(containers, container_id):
        if not journal.reached(RELEASING):
            return _refuse_unrun(host, containers, journal)
        directory = containers.store.directory(container_id)
        details = journal.details_of("COMMIT_LOGGED")
        started_at, restarts = str(details.get("started_at", "")), int(details.get("restarts", 0))
        state = orphan_state(containers, container_id, started_at=started_at, restarts=restarts)
        death = _death(directory)
        if state is not None and state.status is Status.EXITED and death.get("never_ran"):
            return _refuse_unrun(host, containers, journal)
        # Killed, and who killed it can not be told: it may have been CRIU, which was let go and did not hear of it.
        killed = state is not None and state.exit_code in (None, KILLED) and state.status is Status.EXITED
        if state is None or (killed and not death and not (directory / MISSING_MARK).exists()):
            return [_open_line(journal)]
        containers.store.admit(container_id, state)
    close_journal(host.journal_dir, journal, target_machine.Phase.RESUMED)
    shutil.rmtree(host.state_dir / "moves" / journal.move_id, ignore_errors=True)
    container = containers.get(container_id)
    if container.state.status is Status.RUNNING:
        with contextlib.suppress(RuntimeFault):  # it may be ending, or be killed for want of memory, at this moment
            take_over(containers, container)
        return [f"move {journal.move_id}: {container.name} runs on here, its agent had died"]
    containers.clean_up(container_id)
    if _whole(host, container_id) == "lost":
        source = str(journal.records[0].details.get("source", ""))
        why = str(_death(containers.store.directory(container_id)).get("what", "the agent died"))
        report_loss_of(host, journal, container.name, source=source, target=host.name, why=why)
        return [f"move {journal.move_id}: {container.name} was lost, for its memory did not all arrive"]
    return [f"move {journal.move_id}: {container.name} came here and has ended"]


def _death(directory: Path) -> Mapping[str, Any]:
    """What the pager's guard wrote when it had to end the container."""
    try:
        return read_json(directory / DEATH_RECORD)
    except (FileNotFoundError, CorruptData):
        return {}


def _refuse_unrun(host: HostConfig, containers: Containers, journal: MoveJournal) -> list[str]:
    """The note that precedes the first instruction is missing, or the pager heard CRIU fail before that. Both may be
    wrong only after a crash of the host. When its processes are gone nothing of it will run any more."""
    if journal.details_of("RESERVED").get("boot") != boot_id():
        return [_open_line(journal)]
    containers.cgroup(_container_id(journal)).kill()
    close_journal(host.journal_dir, journal, target_machine.Phase.REFUSED)
    undo_reservation(host, journal)
    return [f"move {journal.move_id} into this host was broken off before anything ran: undone"]


def undo_refused(host: HostConfig, journal: MoveJournal) -> None:
    """Of one that is reserved still: its agent died between its last word and the end of its clean-up."""
    if not at_work(journal):
        undo_reservation(host, journal)


def undo_reservation(host: HostConfig, journal: MoveJournal) -> None:
    """Remove what a move into this host has made, unless the container lives here."""
    containers = Containers(host)
    container_id = _container_id(journal)
    if not is_here(containers, container_id):
        containers.clean_up(container_id)
        _undo_wire(containers, journal)
        containers.store.forget_reservation(container_id, journal.move_id)
    door_of(host.run_dir, journal.move_id).unlink(missing_ok=True)
    shutil.rmtree(host.state_dir / "moves" / journal.move_id, ignore_errors=True)


def _undo_wire(containers: Containers, journal: MoveJournal) -> None:
    """The one that this move has made; one that led away from here leads away again."""
    number = journal.records[0].details.get("wire")
    network = next((spec.network for move_id, spec in containers.store.incoming() if move_id == journal.move_id), None)
    if isinstance(number, int) and network is not None:
        remove_wires(_container_id(journal), number=number)
        restore_lead(containers.host, _container_id(journal), network)


def is_here(containers: Containers, container_id: str) -> bool:
    """And lives."""
    try:
        container = containers.get(container_id)
    except (NotFound, RuntimeFault):
        return False
    return container.id == container_id and container.state.status in (Status.RUNNING, Status.PAUSED)


def _is_admitted(containers: Containers, container_id: str) -> bool:
    try:
        return containers.get(container_id).id == container_id
    except (NotFound, RuntimeFault):
        return False


def at_work(journal: MoveJournal) -> bool:
    """Whether the agent that wrote the journal of an arrival lives."""
    details = journal.records[0].details
    pid, start_ticks = details.get("pid"), details.get("pid_start")
    return isinstance(pid, int) and process_start_ticks(pid) == start_ticks is not None


def _container_id(journal: MoveJournal) -> str:
    return str(journal.records[0].details.get("container", ""))


def _open_line(journal: MoveJournal) -> str:
    container_id = _container_id(journal)
    return f"move {journal.move_id} into this host has COMMIT, and container {container_id} does not run here"
