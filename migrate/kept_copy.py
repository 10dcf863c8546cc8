"""The source's side of a container that runs elsewhere while its frozen copy is kept here: given up, or taken back.

Follows machine.py from what the journal says, in whichever process: the mover that looks after a health check,
`cmigrate undo`, or whoever finds a window that is over or a request that was not answered. The caller holds the
container's lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

from migrate import messages
from migrate.departure import is_open
from migrate.errors import MigrateError, MoveRefused, ProtocolViolation, StillInDoubt, UnknownReport, describe
from migrate.journal import Journal, MoveJournal, read_one
from migrate.links import Session, connect
from migrate.machine import JOURNALED, Action, Event, Phase, recovered, step
from migrate.messages_kept import GiveBack
from migrate.report import Outcome
from migrate.reports import ReportStore
from runtime.api import Container, Status
from runtime.container import Containers
from runtime.errors import CorruptData, NotFound, RuntimeFault, WrongState
from runtime.host import HostConfig
from runtime.kept import lives, must_be_able_to_run, run_again
from transport.api import Deadline, Frame, TransportError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0
GIVE_BACK_TIMEOUT_S = 60.0
"""A target needs moments to end a container; the rest is for a link that comes back."""
PAUSE_S = 0.5
OPEN = (Phase.KEEPING, Phase.RETURNING)


def kept_copy(host: HostConfig, container: Container) -> KeptCopy:
    """Of a container that is under its lock. Raises WrongState where none is kept."""
    state = container.state
    if state.status is Status.KEPT:
        journal = read_one(host.journal_dir, state.kept_for, "source")
        if journal is not None and not journal.damage and journal.phase in OPEN:
            return KeptCopy(host, journal, container)
    raise WrongState(
        f"no copy of {container.name} is kept here: it is {state.status}",
        hint="`cmigrate move --undo-window SECONDS` keeps one for so long",
    )


def settle_kept(host: HostConfig, journal: MoveJournal) -> list[str]:
    """What its own process has left undone; a line for each thing done or still open. Raises Busy."""
    containers = Containers(host)
    container_id = str(journal.records[0].details.get("container", ""))
    try:
        if not _is_of(containers, containers.get(container_id), journal):
            return _closed(host, journal)
        with containers.locked(container_id, "recovery", wait_s=0.0) as container:
            again = read_one(host.journal_dir, journal.move_id, "source")
            if again is None or again.phase != journal.phase or not _is_of(containers, container, journal):
                return []
            return KeptCopy(host, again, container).settle()
    except NotFound:
        return _closed(host, journal)


def _is_of(containers: Containers, container: Container, journal: MoveJournal) -> bool:
    """Whether what is here was left by this move: the container may have been taken back and moved again since, or have
    come here once more. One whose mover died in between is frozen and not yet marked as kept."""
    state = container.state
    if state.status is Status.KEPT:
        return state.kept_for == journal.move_id
    same_stay = journal.records[0].details.get("came_by") == containers.store.came_by(container.id)
    unmarked = state.status is Status.RUNNING and journal.phase == Phase.KEEPING
    return same_stay and unmarked and containers.cgroup(container.id).frozen()


def _closed(host: HostConfig, journal: MoveJournal) -> list[str]:
    """Nothing is left of the copy: removed by a person."""
    if journal.phase in OPEN:
        KeptCopy.write(host, journal, Phase.DONE)
    return []


class KeptCopy:
    """One kept copy, from its journal."""

    def __init__(self, host: HostConfig, journal: MoveJournal, container: Container) -> None:
        self._host = host
        self._journal = journal
        self._containers = Containers(host)
        self._container = container
        self._target = str(journal.records[0].details.get("target", ""))
        self.phase = recovered(journal.phase)
        self._session: Session | None = None
        self._actions: dict[Action, Callable[[], None]] = {
            Action.SEND_GIVE_BACK: self._send_give_back,
            Action.THAW: self._thaw,
            Action.KILL_COPY: self._kill,
            Action.SEND_DONE: self._send_done,
            Action.LET_GO: lambda: None,
        }

    def take_back(self, timeout_s: float = GIVE_BACK_TIMEOUT_S) -> str:
        """It runs here again, as it was at the freeze, once the target has ended its own; what was done.

        Raises TransportError, MigrateError or RuntimeFault with nothing changed where it can not begin: the target is
        not reached, or the copy is gone; MoveRefused where it has left the target, and the copy here is given up;
        StillInDoubt when the target was asked and has not answered: the copy stays frozen.
        """
        if self.phase is Phase.KEEPING:
            must_be_able_to_run(self._containers, self._container)
        state = self._until_answered(Deadline.after(timeout_s))
        name = self._container.name
        if state == "settled":
            self._on(Event.TARGET_SETTLED)
            raise MoveRefused(
                f"{name} can not be taken back: it has left {self._target} for another host",
                hint=f"`cmigrate history` on {self._target} tells where it is",
            )
        self._on(Event.TARGET_RETURNED)
        return f"move {self._journal.move_id}: {name} runs on here, as it was at the freeze, and not on {self._target}"

    def accept(self) -> str:
        """The copy here is given up, once the target has said that it has the container; what was done, or why not."""
        name, target, move_id = self._container.name, self._target, self._journal.move_id
        if self.phase is Phase.RETURNING:
            raise WrongState(f"{target} was asked to give {name} back", hint=f"cmigrate resolve {name}")
        try:
            with self._connected(Deadline.after(CONNECT_TIMEOUT_S)):
                self._send(messages.Ask(move_id=move_id, epoch=self._epoch))
                state = self._hear_answer()
                if state != "running":
                    return f"move {move_id}: the copy of {name} stays frozen here, for {target} says {state}"
                self._on(Event.ACCEPTED)
        except (TransportError, MigrateError) as error:
            if self.phase is Phase.KEEPING:
                told = describe(error).what
                return f"move {move_id}: the copy of {name} stays frozen here until {target} answers: {told}"
        return f"move {move_id}: {name} is on {target}, its copy here is given up"

    def decide(self, keep: str) -> str:
        """By a person's word that the target can not run it, or does. Raises WrongState."""
        name, move_id = self._container.name, self._journal.move_id
        if keep == "source":
            self._on(Event.KEEP_SOURCE)
            return f"move {move_id}: {name} runs on here, as it was at the freeze"
        if self.phase is Phase.RETURNING:
            raise WrongState(
                f"{self._target} may hear yet that it is to give {name} back", hint="settle it without --keep target"
            )
        self._on(Event.KEEP_TARGET)
        return f"move {move_id}: the copy of {name} here is given up"

    def settle(self) -> list[str]:
        """What is left to do when nobody is at it."""
        if self.phase is Phase.KEEPING:
            kept = self._container.state.status is Status.KEPT
            return [] if kept and is_open(self._journal.details_of(Phase.KEEPING)) else [self.accept()]
        if self.phase is Phase.RETURNING:
            try:
                return [self.take_back(timeout_s=0.0)]
            except MigrateError as error:
                return [f"move {self._journal.move_id}: {error}"]
        self._on(Event.RESTARTED)
        return [f"move {self._journal.move_id}: {self._container.name} was taken back and runs on here"]

    # Talking

    def _until_answered(self, deadline: Deadline) -> str:
        while True:
            error: Exception
            try:
                with self._connected(Deadline.after(CONNECT_TIMEOUT_S)):
                    # From its record on nothing but the target's answer ends it.
                    self._on(Event.TAKE_BACK if self.phase is Phase.KEEPING else Event.RESTARTED)
                    state = self._hear_answer()
                if state in ("returned", "settled"):
                    return state
                error = ProtocolViolation(f"it says {state}")
            except (TransportError, MigrateError) as failed:
                if self.phase is Phase.KEEPING:
                    raise
                error = failed
            if deadline.expired():
                raise StillInDoubt(
                    f"{self._target} was asked to give {self._container.name} back and has not done so: "
                    f"{describe(error).what}",
                    hint=f"the copy here stays frozen; `cmigrate resolve {self._container.name}` asks again",
                ) from error
            time.sleep(PAUSE_S)

    @contextlib.contextmanager
    def _connected(self, deadline: Deadline) -> Any:
        with connect(self._host, self._target, deadline=deadline) as session:
            self._session = session
            try:
                yield
            finally:
                self._session = None

    def _send(self, message: messages.Message) -> None:
        assert self._session is not None
        self._session.channel.send(Frame.control(message.to_message()), deadline=Deadline.after(ANSWER_TIMEOUT_S))

    def _hear_answer(self) -> str:
        assert self._session is not None
        deadline = Deadline.after(ANSWER_TIMEOUT_S)
        answer = messages.Answer.parse(self._session.channel.receive(deadline=deadline).message())
        if (answer.move_id, answer.epoch) != (self._journal.move_id, self._epoch):
            raise ProtocolViolation(f"{self._target} answered for another move")
        return answer.state

    def _send_give_back(self) -> None:
        self._send(GiveBack(move_id=self._journal.move_id, epoch=self._epoch))

    def _send_done(self) -> None:
        """Best effort: nothing depends on it but the target's own record."""
        if self._session is None:
            return
        with contextlib.suppress(TransportError, UnknownReport, CorruptData):
            report = ReportStore(self._host).get(self._journal.move_id).to_json()
            self._send(messages.Done(move_id=self._journal.move_id, epoch=self._epoch, report=report))

    # Doing

    def _on(self, event: Event) -> None:
        phase, actions = step(self.phase, event)
        for action in actions:
            if action in JOURNALED:
                self.write(self._host, self._journal, JOURNALED[action])
                self.phase = phase
            else:
                self._actions[action]()
        self.phase = phase

    @property
    def _epoch(self) -> int:
        return self._journal.records[-1].epoch

    @staticmethod
    def write(host: HostConfig, journal: MoveJournal, phase: Phase) -> None:
        """It is on the disk when this returns."""
        epoch = journal.records[-1].epoch
        with Journal(host.journal_dir, journal.move_id, side="source", epoch=epoch) as file:
            file.append(phase, {"by": os.getpid()})

    def _thaw(self) -> None:
        containers, container = self._containers, self._container
        if not lives(container):
            # Nothing runs anywhere. Its files are those of the freeze: it can be started.
            containers.clean_up(container.id)
            ended = dataclasses.replace(
                container.state, status=Status.EXITED, init_pid=0, init_start_ticks=0, moved_to=""
            )
            containers.store.write_state(container.id, ended)
            raise WrongState(
                f"{container.name} was taken back, but its processes here were killed meanwhile",
                hint=f"its files are those of the freeze: cmigrate start {container.name}",
            )
        run_again(containers, container)
        self._note_in_report()

    def _note_in_report(self) -> None:
        reports = ReportStore(self._host)
        with contextlib.suppress(UnknownReport, CorruptData, RuntimeFault, OSError):
            report = reports.get(self._journal.move_id)
            reports.save(dataclasses.replace(report, outcome=Outcome.RETURNED))

    def _kill(self) -> None:
        self._containers.cgroup(self._container.id).kill()
        self._containers.clean_up(self._container.id)
        self._containers.store.remove(self._container.id)
