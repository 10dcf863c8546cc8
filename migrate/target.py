"""The target's side of one move, following the table of target_machine.py: reserve, receive, restore and hold.

Whatever goes wrong before COMMIT is on this host's disk, everything made for the move is undone, REFUSED is journaled,
and the source is told. After it, the container runs here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from migrate import messages
from migrate.causes import target_event_of
from migrate.errors import ContainerLost, MoveRefused, describe
from migrate.guards import without_pauses
from migrate.incoming import Incoming
from migrate.journal import COMPLETE, RELEASING, Journal, boot_id
from migrate.losses import report_loss
from migrate.memory_target import NoPages, PageSink, StorePages
from migrate.messages_kept import Keeping
from migrate.packing import WAYS
from migrate.postcopy_target import DEATH_RECORD, MISSING_MARK, RemoteFeed
from migrate.reports import ReportStore
from migrate.session import Asked, versions
from migrate.shared_target import SharedTarget
from migrate.target_machine import JOURNALED, Action, Event, Phase, step
from migrate.verify_target import ExpectedMemory, complete_message
from migrate.waiting import WaitingRoom
from runtime.background import Background
from runtime.container import Containers
from runtime.criu.binary import find_criu
from runtime.criu.restore import HeldRestore
from runtime.errors import CriuFailed
from runtime.memory.pager import Pager, PagerDied
from runtime.store import process_start_ticks
from runtime.workdir import WorkDirectory
from transport.api import Channel, Deadline, Frame, FrameKind, TransportError

# The source may be busy for long between two frames while CRIU walks memory there, but not for ever.
IDLE_TIMEOUT_S = 600.0
# From READY on both sides wait for a few bytes only.
COMMIT_TIMEOUT_S = 60.0
DONE_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 60.0
# Memory fills at a gigabyte a second and more, whatever else the host does.
FILL_TIMEOUT_S = 3600.0
# Nothing is undone and nobody refuses from here on.
_MAY_HAVE_RUN = (Phase.COMMIT_LOGGED, Phase.RESUMED, Phase.CONFIRMED)

M = TypeVar("M", bound=messages.Message)


class TargetMove:
    """One move into this host, driven by the source's messages."""

    def __init__(self, asked: Asked, offer: messages.Offer) -> None:
        host = self._host = asked.host
        self._channel: Channel | RemoteFeed = asked.channel
        self._asked, self._offer, self._spec = asked, offer, offer.spec
        self._feed: RemoteFeed | None = None
        self._containers = Containers(host)
        self._criu = find_criu()
        self._phase = self._came_from = Phase.IDLE
        self._journal = Journal(host.journal_dir, offer.move_id, side="target", epoch=offer.epoch)
        self._directory = self._containers.store.directory(self._spec.id)
        # Image files of a stop-copy go to the disk like any file; no page of any other move does.
        on_disk = host.state_dir / "moves" / offer.move_id if offer.mode == "stopcopy" else None
        self._work = WorkDirectory(on_disk)
        self._restore = HeldRestore(self._containers, self._spec, self._criu, self._work.path, self._directory)
        self._incoming: Incoming | None = None
        self._room = WaitingRoom(host.run_dir, offer.move_id, asked.channel, reconnect_s=offer.reconnect_s)
        self._expected = ExpectedMemory() if offer.verify else None
        self._state: messages.FrozenState | None = None
        self._pager: Pager | None = None
        self._stores: StorePages | None = None
        self._shared: SharedTarget | None = None
        self._running: messages.Running | None = None
        self._error: BaseException | None = None
        self._channel_is_clear = False
        """The source has said its last word on this move."""
        self._background = Background()
        move_id, epoch = offer.move_id, offer.epoch
        self._actions: dict[Action, Callable[[], None]] = {
            Action.JOURNAL_RESERVED: self._journal_reserved,
            Action.RESERVE: self._reserve,
            Action.SEND_PREPARED: lambda: self._send(
                messages.Prepared(
                    move_id=move_id,
                    versions=versions(),
                    packing=WAYS,
                    shared=self._shared is not None,
                    gives_back=True,
                    resume=self._room.resumes,
                    refill=self._room.resumes,
                )
            ),
            Action.STORE: lambda: None,
            Action.VERIFY_AND_RESTORE: self._restore_and_hold,
            Action.JOURNAL_HELD: self._note_held,
            Action.SEND_READY: lambda: self._send(messages.Ready(move_id=move_id, epoch=epoch)),
            Action.JOURNAL_COMMIT: self._journal_commit,
            Action.RELEASE: self._release,
            Action.SEND_RUNNING: self._send_running,
            Action.JOURNAL_RESUMED: lambda: self._write("RESUMED"),
            Action.JOURNAL_CONFIRMED: lambda: self._write("CONFIRMED"),
            Action.DROP_KEPT: self._work.close,
            Action.UNDO: self._undo,
            Action.JOURNAL_REFUSED: lambda: self._write("REFUSED", {"why": str(self._error)}),
            Action.SEND_REFUSED: self._send_refused,
        }

    def run(self) -> None:
        """To the end of the move. What goes wrong before COMMIT is undone and told to the source, not raised."""
        try:
            self._on(Event.OFFER)
            self._receive()
            self._on(Event.RESTORED)
            self._wait_for_commit()
        except BaseException as error:
            self._error = error
            if self._phase not in (Phase.IDLE, *_MAY_HAVE_RUN):
                self._on(target_event_of(error))
            elif self._phase is not Phase.IDLE:
                self._on_release_failed(error)
            if self._phase is Phase.IDLE or not isinstance(error, Exception):
                raise
            self._drain()
        finally:
            self._journal.close()

    def _drain(self) -> None:
        """What was on its way when this side gave up: a connection closed on it would take our last word along."""
        deadline = Deadline.after(DRAIN_TIMEOUT_S)
        with contextlib.suppress(TransportError):
            while not self._channel_is_clear:
                frame = self._channel.receive(deadline=deadline)
                self._channel_is_clear = (
                    frame.kind is FrameKind.CONTROL and frame.message().get("type") == messages.Discard.TYPE
                )

    def _on(self, event: Event) -> None:
        """The phase is entered when its record is on the disk, or, without one, when all is done that leads to it."""
        self._came_from = self._phase
        phase, actions = step(self._phase, event)
        for action in actions:
            self._actions[action]()
            if action in JOURNALED:
                self._phase = phase
        self._phase = phase

    def _write(self, phase: str, details: Mapping[str, Any] | None = None) -> None:
        self._journal.append(phase, details)

    def _send(self, message: messages.Message) -> None:
        self._channel.send(Frame.control(message.to_message()), deadline=Deadline.after(IDLE_TIMEOUT_S))

    # Before COMMIT

    def _journal_reserved(self) -> None:
        own, source = os.getpid(), self._asked.peer_hello.host
        who = {"pid": own, "pid_start": process_start_ticks(own), "boot": boot_id(), "source": source}
        wire = {"wire": self._offer.wire.number} if self._offer.wire is not None else {}
        record = self._journal.append("RESERVED", {"container": self._spec.id, "mode": self._offer.mode, **who, **wire})
        self._begun_at = record.at

    def _reserve(self) -> None:
        self._work.make()
        self._containers.store.reserve(self._spec, self._offer.move_id)
        for name in ("upper", "work"):
            (self._directory / name).mkdir(exist_ok=True)
        self._restore.way_back, self._restore.wire = self._offer.way_back, self._offer.wire
        self._restore.prepare()
        self._incoming = Incoming(
            self._asked.channel,
            trees=[self._directory / "upper", *self._restore.tmpfs_roots()],
            images=self._work.path,
            log=self._directory / "log.jsonl",
            pages=self._page_sink(),
            shared=self._shared,
            expected=self._expected,
            deadline=lambda: Deadline.after(IDLE_TIMEOUT_S),
            on_frozen=self._hold_packets,
            on_reach=self._come_forward,
            on_trees=self._restore.begin_mounting,
        )
        self._room.open()

    def _page_sink(self) -> PageSink:
        if self._offer.mode == "stopcopy":
            return NoPages()
        self._shared = SharedTarget(self._restore.memory_files, self._restore.charger.take)
        # Started now: in the blackout it only has to be told where the pages are.
        self._pager = Pager(self._containers.cgroup(self._spec.id).paths(), record=self._directory / DEATH_RECORD)
        self._stores = StorePages(
            self._work.path, self._criu.version, self._pager, keep_stores=self._expected is not None
        )
        return self._stores

    def _come_forward(self) -> None:
        self._background.leave()
        self._send(messages.Reached(move_id=self._offer.move_id))

    def _hold_packets(self) -> None:
        self._room.close()
        self._restore.hold_packets()
        self._send(messages.Holding(move_id=self._offer.move_id))

    def _receive(self) -> None:
        incoming = self._incoming
        assert incoming is not None
        # Only who is asked whether everything has come knows when to leave it.
        with self._background if self._room.resumes else contextlib.nullcontext():
            come = self._room.through(incoming.until_control, lambda: incoming.taken)
        self._state = self._expect(messages.FrozenState, come)
        self._on(Event.STATE)

    def _restore_and_hold(self) -> None:
        assert self._incoming is not None
        assert self._state is not None
        self._incoming.begin()
        lazy = self._stores is not None and self._stores.lazy
        if self._expected is not None:
            self._expected.begin(self._work.path)
        self._restore.neighbours, self._restore.unheard = self._state.neighbours, self._state.unheard
        files = self._shared.give_to_criu(self._work.path, self._state.shared) if self._shared is not None else {}
        mounts, pipes, complete = self._state.mounts, self._state.pipes, self._complete_memory
        self._restore.restore(mounts, pipes, auto_dedup=not lazy, lazy=lazy, memory_files=files, complete=complete)
        self._incoming.finish_shared(self._state, self._restore.tasks)
        if self._expected is not None:
            found = self._expected.compare(self._restore.tasks(), self._stores)
            move_id = self._offer.move_id
            self._send(messages.Verified(move_id=move_id, pages=found.pages, ms=found.ms, later=found.later))

    def _note_held(self) -> None:
        # Not synced: after a crash of this host there is nothing left of it to be undone.
        self._journal.note("RESTORED_HELD", self._shared.facts() if self._shared else None)

    def _complete_memory(self) -> None:
        """While CRIU makes namespaces. In post-copy the restore, too, may wait from here on for a page that is still on
        the source."""
        assert self._incoming is not None
        self._incoming.finish()
        if self._stores is None or self._pager is None or not any(self._stores.missing.values()):
            return
        missing, stores = self._stores.missing, self._stores.take_stores()
        mark = self._directory / MISSING_MARK
        self._feed = RemoteFeed(
            self._asked.channel, self._offer.move_id, self._room, self._pager, stores, missing, mark, self._expected
        )
        self._channel = self._feed
        self._feed.start()

    def _wait_for_commit(self) -> None:
        message = self._channel.receive(deadline=Deadline.after(COMMIT_TIMEOUT_S)).message()
        commit = self._expect(messages.Commit, message)
        if (commit.move_id, commit.epoch) != (self._offer.move_id, self._offer.epoch):
            raise MoveRefused("COMMIT came for another move")
        self._on(Event.COMMIT)
        self._on(Event.RELEASED)
        self._restore.settle()
        self._containers.refresh_names(self._spec)
        self._wait_for_done()
        self._become_complete()

    def _expect(self, kind: type[M], message: Mapping[str, Any]) -> M:
        if message.get("type") == messages.Discard.TYPE:
            self._channel_is_clear = True
            raise MoveRefused(f"called off by the source: {messages.Discard.parse(message).why}")
        return kind.parse(message)

    def _undo(self) -> None:
        if self._feed is not None:
            self._feed.give_up()
        # First the pager: its guard would kill the cgroup of that name, which may be another's by then.
        if self._pager is not None:
            self._pager.abandon()
        with contextlib.suppress(Exception):
            self._restore.discard()
        if self._incoming is not None:
            self._incoming.close()
        self._containers.store.forget_reservation(self._spec.id, self._offer.move_id)
        self._work.close()
        self._room.close()

    def _send_refused(self) -> None:
        error = self._error or MoveRefused("refused")
        answer: messages.Message = messages.Error.of(error)
        if self._came_from in (Phase.RESTORED_HELD, Phase.COMMIT_LOGGED):
            # COMMIT may be on its way or here: only this word gives the right to run back.
            move_id, epoch = self._offer.move_id, self._offer.epoch
            answer = messages.Refused(move_id=move_id, epoch=epoch, why=describe(error).what[:4000])
        with contextlib.suppress(TransportError):
            self._send(answer)

    # From COMMIT on

    def _journal_commit(self) -> None:
        assert self._state is not None
        # For who has to take over from here.
        self._write("COMMIT_LOGGED", {"started_at": self._state.started_at, "restarts": self._state.restarts})

    def _release(self) -> None:
        assert self._state is not None
        state = self._restore.release(
            started_at=self._state.started_at,
            restarts=self._state.restarts,
            before_run=lambda: self._journal.note(RELEASING),
        )
        marks = self._restore.marks
        self._running = messages.Running(
            move_id=self._offer.move_id,
            epoch=self._offer.epoch,
            marks_ms={
                "restore": (marks["restored"] - marks["restore"]) * 1000,
                "release": (marks["released"] - marks["release"]) * 1000,
                "shared": self._shared.place_ms if self._shared is not None else 0.0,
            },
            lazy=self._lazy_pager is not None,
        )
        self._runs_as = state

    def _send_running(self) -> None:
        assert self._running is not None
        with contextlib.suppress(TransportError):
            self._send(self._running)
        # Only now: it takes a processor, and the source waits for that word to end the blackout.
        if self._lazy_pager is not None:
            self._lazy_pager.begin_filling()
        if self._feed is not None:
            self._feed.let_source_come_back()
        self._containers.store.admit(self._spec.id, self._runs_as)

    def _wait_for_done(self) -> None:
        """The source may be gone by now; then the next agent start finds RESUMED and nothing is lost."""
        with contextlib.suppress(TransportError):
            timeout_s = DONE_TIMEOUT_S if self._feed is None else FILL_TIMEOUT_S
            message = self._channel.receive(deadline=Deadline.after(timeout_s)).message()
            if message.get("type") == Keeping.TYPE:
                return  # what becomes of it comes on another connection
            done = messages.Done.parse(message)
            self._on(Event.DONE)
            ReportStore(self._host).try_to_save_theirs(done.report)

    @property
    def _lazy_pager(self) -> Pager | None:
        return self._pager if self._stores is not None and self._stores.lazy else None

    def _become_complete(self) -> None:
        """All memory is in place and all files are on the disk when this returns: the source need keep nothing.
        Raises where a pager dies before that, and the container with it."""
        assert self._incoming is not None
        pager, filled = self._lazy_pager, None
        if pager is not None:
            with pager:
                if self._feed is not None:
                    self._feed.wait_filled()
                filled = pager.wait(FILL_TIMEOUT_S)
        self._incoming.sync()
        self._work.close()  # also where DONE did not come
        self._journal.note(COMPLETE)
        with contextlib.suppress(TransportError):
            self._send(complete_message(self._offer.move_id, filled, self._expected))

    def _on_release_failed(self, error: BaseException) -> None:
        """CRIU kills the tree when it can not let it go; where it did so before resuming anything, that is proof that
        no instruction ran here."""
        if isinstance(error, CriuFailed) and self._phase is Phase.COMMIT_LOGGED and not self._restore.may_have_run:
            self._on(Event.NEVER_RAN)
        else:
            if isinstance(error, PagerDied):
                raise self._report_loss(error) from error
            raise error

    def _report_loss(self, error: PagerDied) -> ContainerLost:
        """The source may be gone: what became of the container must be told here."""
        lost = ContainerLost.because(error)
        report_loss(
            self._host,
            lost,
            move_id=self._offer.move_id,
            container=self._spec.name,
            source=self._asked.peer_hello.host,
            target=self._host.name,
            mode=self._offer.mode,
            started_at=self._begun_at,
            transport=self._asked.channel.peer.transport,
        )
        return lost


def handle_offer(asked: Asked, message: Mapping[str, Any]) -> None:
    """Handler of "offer" for session.HANDLERS: one move, from offer to done."""
    with without_pauses():
        TargetMove(asked, messages.Offer.parse(message)).run()
