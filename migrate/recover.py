"""What a mover or an agent that died has left undone is finished or undone here: at every agent start and before every
move. The journals say how far it was; who still lives holds the container's lock and is left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence

from migrate import machine
from migrate.arrivals import at_work, settle_arrival, undo_refused
from migrate.asking import ask
from migrate.departure import keep_of_lost
from migrate.errors import MigrateError
from migrate.giving_back import finish
from migrate.journal import MoveJournal, close_journal, read_all
from migrate.kept_copy import settle_kept
from migrate.losses import report_loss_of
from migrate.waiting import door_of
from runtime.api import Container, Status
from runtime.background import Background
from runtime.container import Containers
from runtime.criu.dump import wake_after_dead_dump
from runtime.errors import Busy, NotFound, RuntimeFault
from runtime.handover import handed_over_by
from runtime.host import HostConfig
from runtime.linux import rcu
from runtime.memory import lazy
from runtime.wayback import sweep_ways
from runtime.wire import sweep
from transport.api import TransportError

_SOURCE_BEFORE_COMMIT = {"PREPARED", "PRECOPY", "FROZEN", "SENDING"}
_SETTLED = {"DONE", "ROLLED_BACK", "RECLAIMED", "CONFIRMED", "REFUSED", "RESUMED", "SETTLED"}
# Of a copy that is, or was, kept in case it is to come back.
_KEPT = {"KEEPING", "RETURNING", "TAKEN_BACK"}
_GIVEN_BACK = {"RETURNING", "RETURNED"}


def recover(host: HostConfig) -> list[str]:
    """Settle what can be settled without asking anybody; a line for each thing done or still open."""
    told: list[str] = []
    rcu.turn_off_what_is_left(host.run_dir)
    lazy.turn_off_what_is_left(host.run_dir)
    with contextlib.suppress(RuntimeFault):  # next time
        sweep()
        sweep_ways()
    Background().sweep()
    journals = list(read_all(host.journal_dir))
    arriving = {move_id for move_id, _spec in Containers(host).store.incoming()}
    for journal in journals:
        if journal.damage or not journal.records:
            continue
        if journal.phase in _SETTLED:
            if (journal.side, journal.phase) == ("source", "DONE") and _is_of_this_stay(host, journal):
                with contextlib.suppress(Busy, NotFound):
                    told += _forget_moved(host, journal)
            if (journal.side, journal.phase) == ("source", "RECLAIMED"):
                with contextlib.suppress(Busy, NotFound):
                    told += _thaw_reclaimed(host, journal)
            if (journal.side, journal.phase) == ("target", "REFUSED") and journal.move_id in arriving:
                undo_refused(host, journal)
            continue
        with contextlib.suppress(Busy):
            told += _unsettled(host, journal)
    _remove_kept_files(host, journals)
    for journal in journals:
        if journal.side == "target" and journal.records and not at_work(journal):
            door_of(host.run_dir, journal.move_id).unlink(missing_ok=True)
    return told


def _unsettled(host: HostConfig, journal: MoveJournal) -> list[str]:
    if journal.side == "source":
        return settle_kept(host, journal) if journal.phase in _KEPT else _source(host, journal)
    return finish(host, journal) if journal.phase in _GIVEN_BACK else settle_arrival(host, journal)


def _remove_kept_files(host: HostConfig, journals: Sequence[MoveJournal]) -> None:
    """Of moves that are over on this disk, and whose process did not live to remove them."""
    directory = host.state_dir / "moves"
    for name in os.listdir(directory) if directory.exists() else ():
        known = [journal for journal in journals if journal.move_id == name]
        over = _SETTLED | _KEPT | _GIVEN_BACK
        if known and all(journal.phase in over and not at_work(journal) for journal in known):
            shutil.rmtree(directory / name, ignore_errors=True)


def _source(host: HostConfig, journal: MoveJournal) -> list[str]:
    containers = Containers(host)
    details = journal.records[0].details
    container_id, target = str(details.get("container", "")), str(details.get("target", ""))
    try:
        with containers.locked(container_id, "recovery", wait_s=0.0) as container:
            if journal.phase in _SOURCE_BEFORE_COMMIT:
                # The target cannot run without COMMIT, so nobody has to be asked.
                wake_after_dead_dump(containers, container)
                close_journal(host.journal_dir, journal, machine.Phase.ROLLED_BACK)
                told = f"move {journal.move_id} of {container.name} was broken off: it runs on here"
            else:
                told = _settle_doubt(host, journal, containers, container, target)
    except NotFound:
        close_journal(host.journal_dir, journal, machine.Phase.ROLLED_BACK)
        told = f"move {journal.move_id} was broken off, and its container is gone"
    # Not before: the files of a mover that lives, and holds the lock, are none of ours.
    shutil.rmtree(host.state_dir / "moves" / journal.move_id, ignore_errors=True)
    return [told]


def _thaw_reclaimed(host: HostConfig, journal: MoveJournal) -> list[str]:
    """Who wrote RECLAIMED may have died before the thaw. The mark tells: it goes with the thaw, and names this move."""
    containers = Containers(host)
    container_id = str(journal.records[0].details.get("container", ""))
    directory = containers.store.directory(container_id)
    if handed_over_by(directory) != journal.move_id:
        return []
    with containers.locked(container_id, "recovery", wait_s=0.0) as container:
        if handed_over_by(directory) != journal.move_id:
            return []
        wake_after_dead_dump(containers, container)
        return [f"move {journal.move_id}: {container.name} runs on here"]


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
    if state == "lost":
        return _settle_loss(host, journal, containers, container, target)
    if state == "running":
        drop_copy(containers, container.id)
        close_journal(host.journal_dir, journal, machine.Phase.DONE)
        return f"move {journal.move_id}: {name} runs on {target}"
    if state == "refused":
        close_journal(host.journal_dir, journal, machine.Phase.RECLAIMED)
        wake_after_dead_dump(containers, container)
        return f"move {journal.move_id}: {target} refused, {name} runs on here"
    return f"move {journal.move_id} of {name} is in doubt: {target} says {state}; ask again in a minute"


def _settle_loss(
    host: HostConfig, journal: MoveJournal, containers: Containers, container: Container, target: str
) -> str:
    """Nothing of it runs there. What is here is kept for a while if that was asked for."""
    name = container.name
    told = f"move {journal.move_id}: {name} was lost, for its memory did not all arrive; "
    try:
        kept = keep_of_lost(host, journal, containers, container, target)
    except (RuntimeFault, OSError) as error:
        return f"{told}its copy stays frozen here, and can not be kept to be run again now: {error}"
    if not kept:
        drop_copy(containers, container.id)
        close_journal(host.journal_dir, journal, machine.Phase.DONE)
    report_loss_of(host, journal, name, source=host.name, target=target, why="the mover on the source died")
    return f"{told}its copy is kept here: `cmigrate undo {name}`" if kept else f"{told}its files are on {target}"


def drop_copy(containers: Containers, container_id: str) -> None:
    """The container lives elsewhere: kill what is frozen here, and remove its files."""
    containers.cgroup(container_id).kill()
    containers.clean_up(container_id)
    containers.store.remove(container_id)
