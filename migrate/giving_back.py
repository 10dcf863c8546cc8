"""The target's side of a container that goes back: what runs here is ended, for good, and only then the source is told.

Follows target_machine.py from what the journal says, in whichever process the question comes in. RETURNING is on the
disk before anything is killed, RETURNED before the answer; an agent that dies in between leaves the rest to the next.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from migrate import messages
from migrate.arrivals import at_work, settle_arrival
from migrate.errors import MoveRefused
from migrate.journal import COMPLETE, Journal, MoveJournal, read_one
from migrate.messages_kept import GiveBack
from migrate.reports import ReportStore
from migrate.session import Asked
from migrate.target_machine import JOURNALED, Action, Event, Phase, recovered, step
from runtime.container import Containers
from runtime.errors import Busy, NotFound
from runtime.host import HostConfig
from runtime.kept import end_for_good
from runtime.wire import remove_wires

LOCK_WAIT_S = 8.0


def handle_give_back(asked: Asked, message: Mapping[str, Any]) -> None:
    """Handler of "give-back" for session.HANDLERS."""
    question = GiveBack.parse(message)
    state = give_back(asked.host, question.move_id)
    asked.answer(messages.Answer(move_id=question.move_id, epoch=question.epoch, state=state).to_message())


def handle_done(asked: Asked, message: Mapping[str, Any]) -> None:
    """Handler of "done" where it comes on a connection of its own: the source's copy is gone. Nothing is answered."""
    done = messages.Done.parse(message)
    ReportStore(asked.host).try_to_save_theirs(done.report)
    journal = _journal(asked.host, done.move_id)
    if journal.phase in (Phase.RESUMED, Phase.SETTLED):
        Stay(asked.host, journal).on(Event.DONE)


def give_back(host: HostConfig, move_id: str) -> str:
    """End what runs here of this move; the answer for the source. Raises MoveRefused for a move that never came, Busy
    while the container is busy, or does not end: then the source has to ask again."""
    journal = _journal(host, move_id)
    if journal.phase not in (Phase.RETURNING, Phase.RETURNED) and at_work(journal) and not journal.reached(COMPLETE):
        raise Busy(f"move {move_id} is still bringing in what the container needs", hint="ask again")
    if journal.phase == Phase.COMMIT_LOGGED:
        settle_arrival(host, journal)
    with _lock(Containers(host), _container_id(journal)):
        stay = Stay(host, _journal(host, move_id))
        if stay.has_left:
            stay.on(Event.MOVED_ON)
        stay.on(Event.GIVE_BACK)
        if stay.phase is Phase.RETURNING:
            stay.on(Event.COPY_GONE)
    return stay.answer


def finish(host: HostConfig, journal: MoveJournal) -> list[str]:
    """What an agent that died has left of giving back; a line for what was done. Raises Busy."""
    with _lock(Containers(host), _container_id(journal)):
        stay = Stay(host, _journal(host, journal.move_id))
        if stay.phase is Phase.RETURNING:
            stay.on(Event.RESTARTED)
            stay.on(Event.COPY_GONE)
        elif stay.phase is Phase.RETURNED and stay.is_here:
            stay.on(Event.RESTARTED)
        else:
            return []
    return [f"move {journal.move_id} into this host is given back: nothing of it is left here"]


def settle_stay(host: HostConfig, container_id: str) -> None:
    """The container is about to leave for another host: it is not given back any more. Under its lock."""
    move_id = Containers(host).store.came_by(container_id)
    journal = read_one(host.journal_dir, move_id, "target") if move_id else None
    if journal is not None and not journal.damage and journal.phase == Phase.RESUMED:
        Stay(host, journal).on(Event.MOVED_ON)


class Stay:
    """A container's stay on this host, from RESUMED to its end; ``answer`` is what the source is to hear."""

    def __init__(self, host: HostConfig, journal: MoveJournal) -> None:
        self._host = host
        self._containers = Containers(host)
        self._move = journal
        self._id = _container_id(journal)
        self.phase = recovered(journal.phase)
        self.answer = "committed"
        self._actions: dict[Action, Callable[[], None]] = {
            Action.KILL_COPY: self._kill,
            Action.UNDO: self._undo,
            Action.DROP_KEPT: lambda: None,
            Action.SEND_RETURNED: lambda: self._answer("returned"),
            Action.SEND_SETTLED: lambda: self._answer("settled"),
        }

    def on(self, event: Event) -> None:
        phase, actions = step(self.phase, event)
        for action in actions:
            if action in JOURNALED:
                self._write(JOURNALED[action])
                self.phase = phase
            else:
                self._actions[action]()
        self.phase = phase

    @property
    def has_left(self) -> bool:
        """Whether another container of this id is here: it came back by another move."""
        return self.phase is Phase.RESUMED and self._came_by not in ("", self._move.move_id)

    @property
    def is_here(self) -> bool:
        """What came by this move: the container, or what is left of it."""
        return self._came_by == self._move.move_id

    @property
    def _came_by(self) -> str:
        return self._containers.store.came_by(self._id)

    def _answer(self, state: str) -> None:
        self.answer = state

    def _write(self, phase: Phase) -> None:
        with Journal(
            self._host.journal_dir, self._move.move_id, side="target", epoch=self._move.records[-1].epoch
        ) as file:
            file.append(phase, {"by": os.getpid()})

    def _kill(self) -> None:
        if not self.is_here:
            return
        try:
            container = self._containers.get(self._id)
        except NotFound:  # released by an agent that died before it could say so
            self._containers.clean_up(self._id)
        else:
            end_for_good(self._containers, container)

    def _undo(self) -> None:
        if self.is_here:
            with contextlib.suppress(NotFound):
                self._containers.refresh_names(self._containers.get(self._id).spec, gone=True)
            self._containers.clean_up(self._id)
            remove_wires(self._id)
            self._containers.store.remove(self._id)
        shutil.rmtree(self._host.state_dir / "moves" / self._move.move_id, ignore_errors=True)


def _journal(host: HostConfig, move_id: str) -> MoveJournal:
    journal = read_one(host.journal_dir, move_id, "target")
    if journal is None or journal.damage or not journal.reached("COMMIT_LOGGED"):
        raise MoveRefused(f"no container came here by move {move_id}")
    return journal


@contextlib.contextmanager
def _lock(containers: Containers, container_id: str) -> Iterator[None]:
    """The container's, if it is here still."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(NotFound):
            held.enter_context(containers.store.locked(container_id, wait_s=LOCK_WAIT_S, purpose="give back"))
        yield


def _container_id(journal: MoveJournal) -> str:
    return str(journal.records[0].details.get("container", ""))
