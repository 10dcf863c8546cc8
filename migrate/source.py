"""The source's side of one move, following the table of machine.py.

Until COMMIT is on this host's disk every failure ends with the container running here and nothing on the target.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from migrate import messages
from migrate.asking import bring_memory, discard, not_seen_complete, what_became
from migrate.causes import event_of
from migrate.departure import UndoWindow, keep_copy, leave_record, must_give_back, note_rolled_back
from migrate.errors import ContainerLost, InDoubt, MoveRefused, PeerFailed, RolledBack, name_peer
from migrate.filtering import load_filter
from migrate.frozen_state import send_frozen_state
from migrate.guards import CallOff, signals_ignored, without_pauses
from migrate.journal import Journal
from migrate.leaving import Leaving
from migrate.machine import JOURNALED, Action, Event, Phase, step
from migrate.memory_source import DifferenceSender, LiveMemory, PageThread
from migrate.messages_kept import Keeping
from migrate.observe import Held, PhaseEnded, PhaseStarted
from migrate.outgoing import Outgoing, Pace
from migrate.phases import PhaseClock
from migrate.plan import NEED_CONSENT
from migrate.postcopy_source import KeptMemory
from migrate.precopy import Budget
from migrate.queues import tell_what_is_lost
from migrate.reconnect import Line
from migrate.refill import mend_links
from migrate.rounds import Rounds, rounds_of, untracked_warning
from migrate.shared_source import SharedSource
from migrate.trees_source import SourceTrees
from migrate.verify_source import send_hashes
from runtime.api import Container
from runtime.background import Background
from runtime.connections import TcpPolicy
from runtime.container import Containers, open_tree_roots
from runtime.criu.binary import CriuBinary
from runtime.criu.dump import HeldDump
from runtime.criu.filter.table import PageFilter
from runtime.criu.pages import page_socketpair
from runtime.errors import CriuFailed
from runtime.host import HostConfig
from runtime.memory.tracker import make_tracker
from runtime.memory.tracker_still import StillTracker
from runtime.workdir import WorkDirectory
from transport.api import Deadline, TransportError

IDLE_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 600.0  # it comes after the whole restore, which grows with memory where that is eager
COMPLETE_TIMEOUT_S = 3600.0
FIRST_EPOCH = 1

M = TypeVar("M", bound=messages.Message)


class SourceMove:
    """One move out of this host. Single use; call ``run``, then read ``clock``, ``running`` and ``sent_bytes``."""

    def __init__(
        self,
        host: HostConfig,
        container: Container,
        line: Line,
        *,
        mode: str,
        move_id: str,
        criu: CriuBinary,
        observer: Held,
        budget: Budget,
        verify: bool,
        pace: Pace,
        leaving: Leaving,
        make_report: Callable[[SourceMove], Mapping[str, Any]],
        tcp: TcpPolicy = "keep",
        max_blackout_ms: float | None = None,
        window: UndoWindow | None = None,
    ) -> None:
        self._containers = Containers(host)
        self._host = host
        self._container = container
        self.line, self._session = line, line.session
        self._mode = mode
        self._move_id = move_id
        self._criu = criu
        self._observer = observer
        self._make_report = make_report
        self._phase = Phase.INIT
        self._journal = Journal(host.journal_dir, move_id, side="source", epoch=FIRST_EPOCH)
        # Image files of a stop-copy go to the disk like any file; no page of any other move does.
        self._closing = ExitStack()
        self._work = WorkDirectory(host.state_dir / "moves" / move_id if mode == "stopcopy" else None)
        self.out = self._out = Outgoing(line.session.channel, lambda: Deadline.after(IDLE_TIMEOUT_S), pace)
        self._dump = HeldDump(self._containers, container, criu, self._work.path, tcp=tcp)
        self._log = self._containers.store.directory(container.id) / "log.jsonl"
        self._cgroup = self._containers.cgroup(container.id)
        roots = open_tree_roots(self._containers, container, self._closing)
        self._trees = SourceTrees(roots, self._out, self._cgroup.pids)
        self._pages: PageThread | None = None
        self._live: LiveMemory | None = None
        self.shared: SharedSource | None = None
        self._filter: PageFilter | None = None
        self.kept: KeptMemory | None = None
        self.closed: tuple[str, ...] = ()  # connections that the move ended
        self._undo = ExitStack()
        self._leaving = leaving
        self._call_off = CallOff(max_blackout_ms)
        self._budget = budget
        self._verify = verify
        self._window = window
        self.clock = PhaseClock()
        self.rounds: Rounds | None = None
        self.complete: messages.Complete | None = None
        self.verified: messages.Verified | None = None
        self.running: messages.Running | None = None
        self.prepared: messages.Prepared | None = None
        self._given_up = False  # the target has said so
        self._actions = self._action_table()

    def _action_table(self) -> dict[Action, Callable[[], None]]:
        commit = messages.Commit(move_id=self._move_id, epoch=FIRST_EPOCH)
        return {
            Action.JOURNAL_PREPARED: self._journal_prepared,
            Action.SEND_OFFER: self._send_offer,
            Action.COPY: self._copy,
            Action.FREEZE_AND_DUMP: self._freeze_and_dump,
            Action.SEND_STATE: self._send_state,
            Action.JOURNAL_COMMITTED: lambda: self._write("COMMITTED"),
            Action.SEND_COMMIT: lambda: self._send(commit),
            Action.JOURNAL_KEEPING: lambda: self._write("KEEPING", self._window.begin() if self._window else None),
            Action.LET_GO: self._let_go,
            Action.JOURNAL_DONE: lambda: self._write("DONE"),
            Action.KILL_COPY: self._kill_copy,
            Action.SEND_DONE: self._send_done,
            Action.THAW: self._thaw,
            Action.JOURNAL_ROLLED_BACK: lambda: note_rolled_back(self._journal, self._observer),
            Action.JOURNAL_RECLAIMED: lambda: self._write("RECLAIMED"),
            Action.SEND_DISCARD: self._send_discard,
        }

    # The walk through the table

    def run(self) -> None:
        """Returns with the container on the target; raises RolledBack (it runs here), or InDoubt."""
        try:
            with without_pauses(), self._call_off.noticed():
                self._go()
        except BaseException as error:
            self._fail(self._call_off.cause(error))
        finally:
            self._journal.close()
            self._closing.close()

    def _go(self) -> None:
        self._mark("prepare")
        self._on(Event.START)
        self.prepared = self._hear(messages.Prepared)
        must_give_back(self.prepared.gives_back, self._window)
        self._out.pace.packer.allow(self.prepared.packing)
        if self._live is not None and self.prepared.shared:
            self.shared = self._live.take_shared_apart(self._filter, in_rounds=self._mode in ("precopy", "hybrid"))
        mend_links(self._out, self.line, self.prepared, self._move_id, FIRST_EPOCH)
        self._mark("files")
        self._on(Event.TARGET_PREPARED)
        with self._observer.blackout(), self._call_off.limited():
            self._on(Event.COPIED)
            self._on(Event.DUMPED)
            self._mark("restore")
            if self._verify:
                self.verified = self._hear(messages.Verified, READY_TIMEOUT_S, self.kept)
                self._mark("verify", ago_s=self.verified.ms / 1000)
            self._hear(messages.Ready, READY_TIMEOUT_S, self.kept)
            self._mark("switchover")
            with signals_ignored():
                self._on(Event.TARGET_READY)
                self.running = self._hear(messages.Running, kept=self.kept)
            self._mark("finish")
        self._finish_late(bring_memory(self.kept, self._host, self._session, self._move_id, FIRST_EPOCH))

    def _on(self, event: Event) -> None:
        """The phase is entered when its record is on the disk, or, without one, when all is done that leads to it."""
        phase, actions = step(self._phase, event)
        for action in actions:
            self._actions[action]()
            if action in JOURNALED:
                self._phase = phase
        self._phase = phase

    def _fail(self, error: BaseException) -> None:
        """Roll back where that is still ours to decide; raises what to tell the operator."""
        name_peer(error, self._session.entry.name)
        self._given_up = isinstance(error, PeerFailed)
        if self._phase in (Phase.DONE, Phase.KEEPING):
            self._observer.on_event(not_seen_complete(error, self._container.name))
            return
        if self._phase is Phase.COMMITTED and not isinstance(error, MoveRefused):
            learnt = what_became(self._host, self._session, self._move_id, error, self.line.patience_s)
            if learnt is None or isinstance(learnt, ContainerLost):
                self._finish_late(learnt)
                return
            error = learnt
        if isinstance(error, InDoubt):
            # Closing our end makes CRIU let go of the tasks, which the cgroup keeps frozen: nothing runs here.
            self._dump.close()
            raise error
        if self._phase is Phase.INIT:
            raise error
        # A second Ctrl-C must not leave the container as the first one found it: frozen.
        with signals_ignored():
            self._on(event_of(error))
        told_already = (KeyboardInterrupt, RolledBack)
        if isinstance(error, told_already if self._dump.was_frozen else (*told_already, MoveRefused)):
            raise error
        raise RolledBack.because(error) from error

    def _finish_late(self, lost: ContainerLost | None) -> None:
        """The link broke after COMMIT, and the target has said that it runs there, or ran and was lost."""
        if "finish" not in self.clock:
            self._mark("finish")
        if self._window is None:
            self._on(Event.TARGET_RUNNING)
        else:
            self._keep()
        if lost is not None:
            raise lost

    def _mark(self, name: str, ago_s: float = 0.0) -> None:
        before, at = self.clock.current, self.clock.mark(name, ago_s=ago_s)
        if before is not None:
            self._observer.on_event(PhaseEnded(name=before[0], ms=(at - before[1]) * 1000))
        self._observer.on_event(PhaseStarted(name=name))

    def _journal_prepared(self) -> None:
        details = {"container": self._container.id, "mode": self._mode, "target": self._session.entry.name}
        window = {"undo_window_s": self._window.seconds} if self._window is not None else {}
        self._write("PREPARED", {**details, **window, "came_by": self._containers.store.came_by(self._container.id)})

    def _write(self, phase: str, details: Mapping[str, Any] | None = None) -> None:
        self._journal.append(phase, details)

    # Talking

    def _send(self, message: messages.Message) -> None:
        self._out.control(message.to_message())

    def _hear(self, kind: type[M], timeout_s: float = IDLE_TIMEOUT_S, kept: KeptMemory | None = None) -> M:
        if kept is not None:
            return kept.hear(kind, timeout_s)
        return kind.parse(self._session.channel.receive(deadline=Deadline.after(timeout_s)).message())

    def _send_offer(self) -> None:
        spec, mode = self._container.spec, self._mode
        offer = messages.Offer(move_id=self._move_id, epoch=FIRST_EPOCH, mode=mode, spec=spec, verify=self._verify)
        self._send(self._leaving.get_ready(offer, self._undo, reconnect_s=self.line.limit_s))
        self._undo.callback(self._work.close)
        self._work.make()
        self._undo.callback(self._dump.rollback)
        self._filter = load_filter(self._host.state_dir, self._closing, self._observer)
        if self._mode == "stopcopy":
            self._dump.prepare(page_filter=self._filter)
            return
        ours, theirs = page_socketpair()
        self._undo.callback(ours.close)
        with theirs:
            self._dump.prepare(page_socket=theirs, page_filter=self._filter)
        tracker = StillTracker() if self._mode == "diskless" else make_tracker()
        self._live = LiveMemory(self._cgroup.pids, self._out, tracker)
        self._live.keep_back = self._mode in NEED_CONSENT
        self._undo.callback(self._live.close)
        self._pages = PageThread(ours, self._criu.version, DifferenceSender(self._out, self._live))

    def _send_discard(self) -> None:
        wait = self._dump.was_frozen and not self._given_up
        discard(self._host, self._session, self._move_id, FIRST_EPOCH, wait=wait)
        self._dump.announce()

    def _send_done(self) -> None:
        with contextlib.suppress(TransportError):
            self._send(messages.Done(move_id=self._move_id, epoch=FIRST_EPOCH, report=self._make_report(self)))
            # It runs there already; until its memory and files are whole there, the files here are kept.
            self._mark("complete")
            self.complete = self._hear(messages.Complete, COMPLETE_TIMEOUT_S, self.kept)
            self._containers.store.remove(self._container.id)

    # Doing

    def _thaw(self) -> None:
        self._undo.close()
        self.clock.mark("thawed")

    def _copy(self) -> None:
        """Files go over while the container runs, and memory with pre-copy; only what changes meanwhile goes again."""
        with Background():
            self._trees.send()
            self._out.log(self._log)
            if self._live is not None and self._mode != "diskless":
                self._mark("rounds")
                self._copy_memory(self._live)
        self._dump.look_ahead(self._move_id)
        self._out.all_has_come(self._move_id)

    def _copy_memory(self, live: LiveMemory) -> None:
        if self._mode == "postcopy":
            live.scan()  # from now on what is written is known: it goes over first
            return
        own_cpus = self._container.spec.limits.cpus
        self.rounds = rounds_of(live, self._out, self._cgroup, own_cpus, self._observer, self._budget)
        if self.rounds.run().action == "postcopy":
            live.keep_back = True
        if warning := untracked_warning(live.facts().untracked):
            self._observer.on_event(warning)

    def _freeze_and_dump(self) -> None:
        self._out.pace.lift()
        self._mark("freeze")
        self._dump.freeze()
        self._leaving.frozen()
        self._send(messages.Frozen(move_id=self._move_id))
        # While the target gets ready to hold frames.
        self.closed = self._dump.close_lost()
        live = self._live if self._live is not None and not self._live.keep_back else None
        if live is not None:
            live.scan_frozen()
        self._hear(messages.Holding)
        self._dump.cut_off()
        self._dump.begin()
        if live is not None:
            self._mark("memory")
            # CRIU is left with what changes until it has seized the tasks: a system call that sleeps goes on till then.
            live.send_frozen()
        self._mark("dump")
        self._write_images()

    def _write_images(self) -> None:
        live = self._live
        if live is None or self._pages is None:
            self._dump.dump()
            return
        self._pages.start()
        try:
            self._dump.dump(before_walk=lambda: live.finish(self._filter))
        except CriuFailed as error:
            # Where the channel broke CRIU only saw its page server refuse: the channel's error is the cause.
            cause = self._pages.wait()
            raise (error if cause is None or isinstance(cause, CriuFailed) else cause) from error
        cause = self._pages.wait()
        if cause is not None:
            raise cause
        live.send_late()

    def _send_state(self) -> None:
        self.closed += tell_what_is_lost(self._dump, self._observer)
        if self._verify:
            self._mark("hash")
            send_hashes(self._out, self._cgroup.pids(), self._work.path)
        self._mark("send")
        self._trees.send()
        self._out.images(self._work.path)
        if self._live is not None and self._live.keep_back:
            self.kept = self._closing.enter_context(contextlib.closing(KeptMemory(self._out, self._live)))
            self.kept.announce(self._work.path)
        self._out.log(self._log)
        send_frozen_state(self._out, self._dump, self.shared, channel_is_shared=self.kept is not None, mark=self._mark)
        self._dump.hold()  # while the target restores

    def _kill_copy(self) -> None:
        """The copy here is dead weight: kill it, remove what is left of it."""
        self._dump.finish()
        if self._live is not None:
            self._live.close()
        self._undo.pop_all()
        self._work.close()
        self._containers.clean_up(self._container.id)
        wire = self._leaving.left()
        leave_record(self._containers, self._container, self._session.entry.name, self._observer, wire)

    def _keep(self) -> None:
        with signals_ignored():
            self._on(Event.TARGET_RUNNING_KEEP)
        with contextlib.suppress(TransportError):
            self._send(Keeping(move_id=self._move_id, epoch=FIRST_EPOCH))
            self._mark("complete")
            self.complete = self._hear(messages.Complete, COMPLETE_TIMEOUT_S, self.kept)

    def _let_go(self) -> None:
        assert self._window is not None
        self._dump.stay_frozen()
        wire = self._leaving.left()
        self._undo.close()
        target = self._session.entry.name
        keep_copy(self._containers, self._container, target, self._move_id, self._window, self._observer, wire)
