"""The source's side of one move, following the table of machine.py.

Until COMMIT is on this host's disk every failure ends with the container running here and nothing on the target.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from migrate import messages
from migrate.costs import FixedCosts
from migrate.errors import InDoubt, MoveRefused, PeerFailed, RolledBack
from migrate.journal import Journal
from migrate.links import Session
from migrate.machine import Action, Event, Phase, step
from migrate.memory_source import DifferenceSender, LiveMemory
from migrate.observe import Held, PhaseEnded, PhaseStarted, Progress
from migrate.outgoing import Outgoing, PageSender
from migrate.phases import PhaseClock
from migrate.precopy import Budget, Decision, Kind, Precopy, Round
from runtime.api import Container
from runtime.container import Containers
from runtime.criu.binary import CriuBinary
from runtime.criu.dump import HeldDump
from runtime.criu.pages import PageServer, page_socketpair
from runtime.errors import CriuFailed
from runtime.host import HostConfig
from runtime.linux.procfs import parse_shared_writable
from runtime.memory.tracker import make_tracker
from runtime.tree import SentContent, Snapshot, compare, scan
from runtime.workdir import WorkDirectory
from transport.api import Deadline, Frame, TransportError

IDLE_TIMEOUT_S = 120.0
# READY comes after the whole restore, which for an eager restore grows with memory.
READY_TIMEOUT_S = 600.0
DISCARD_TIMEOUT_S = 10.0
FILL_TIMEOUT_S = 3600.0
FIRST_EPOCH = 1

M = TypeVar("M", bound=messages.Message)


class SourceMove:
    """One move out of this host. Single use; call ``run``, then read ``clock``, ``running`` and ``sent_bytes``."""

    def __init__(
        self,
        host: HostConfig,
        container: Container,
        session: Session,
        *,
        mode: str,
        move_id: str,
        criu: CriuBinary,
        observer: Held,
        budget: Budget,
        make_report: Callable[[SourceMove], Mapping[str, Any]],
    ) -> None:
        self._containers = Containers(host)
        self._container = container
        self._session = session
        self._mode = mode
        self._move_id = move_id
        self._criu = criu
        self._observer = observer
        self._make_report = make_report
        self._phase = Phase.INIT
        self._journal = Journal(host.journal_dir, move_id, side="source", epoch=FIRST_EPOCH)
        # Image files of a stop-copy go to the disk like any file; no page of any other move does.
        self._work = WorkDirectory(host.state_dir / "moves" / move_id if mode == "stopcopy" else None)
        self._out = Outgoing(session.channel, lambda: Deadline.after(IDLE_TIMEOUT_S))
        self._dump = HeldDump(self._containers, container, criu, self._work.path)
        self._trees = self._tree_roots()
        self._log = self._containers.store.directory(container.id) / "log.jsonl"
        self._snapshots: list[Snapshot | None] = [None] * len(self._trees)
        self._sent = [SentContent() for _tree in self._trees]
        self._cgroup = self._containers.cgroup(container.id)
        self._pages: _PageThread | None = None
        self._live: LiveMemory | None = None
        self._undo = ExitStack()
        self._budget = budget
        self.clock = PhaseClock()
        self.rounds = 0
        self.predicted_ms: float | None = None
        self.filled: messages.Filled | None = None
        self.running: messages.Running | None = None
        self.prepared: messages.Prepared | None = None
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
            Action.JOURNAL_DONE: lambda: self._write("DONE"),
            Action.KILL_COPY: self._kill_copy,
            Action.SEND_DONE: self._send_done,
            Action.THAW: self._undo.close,
            Action.JOURNAL_ROLLED_BACK: lambda: self._write("ROLLED_BACK"),
            Action.JOURNAL_RECLAIMED: lambda: self._write("RECLAIMED"),
            Action.SEND_DISCARD: self._send_discard,
        }

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        return self._out.sent_bytes

    def _tree_roots(self) -> list[Path]:
        """The upper layer, then /dev/shm and the other tmpfs mounts as the container's own processes see them."""
        spec = self._container.spec
        inside = Path(f"/proc/{self._container.state.init_pid}/root")
        points = ["/dev/shm", *spec.tmpfs]
        return [self._containers.store.directory(spec.id) / "upper", *(Path(f"{inside}{point}") for point in points)]

    # The walk through the table

    def run(self) -> None:
        """Returns with the container on the target; raises RolledBack (it runs here), or InDoubt."""
        try:
            with garbage_collector_off():
                self._go()
        except BaseException as error:
            self._fail(error)
        finally:
            self._journal.close()

    def _go(self) -> None:
        self._mark("prepare")
        self._on(Event.START)
        self.prepared = self._hear(messages.Prepared)
        self._mark("files")
        self._on(Event.TARGET_PREPARED)
        with self._observer.blackout():
            self._on(Event.COPIED)
            self._on(Event.DUMPED)
            self._mark("restore")
            self._hear(messages.Ready, READY_TIMEOUT_S)
            self._mark("switchover")
            self._on(Event.TARGET_READY)
            self.running = self._hear(messages.Running)
            self._mark("finish")
        self._on(Event.TARGET_RUNNING)

    def _on(self, event: Event) -> None:
        self._phase, actions = step(self._phase, event)
        for action in actions:
            self._actions[action]()

    def _fail(self, error: BaseException) -> None:
        """Roll back where that is still ours to decide; raises what to tell the operator."""
        if self._phase is Phase.DONE:
            # It runs there; what failed was only throwing away what is left here.
            raise error
        if self._phase in (Phase.COMMITTED, Phase.IN_DOUBT) and not isinstance(error, MoveRefused):
            # Closing our end makes CRIU let go of the tasks, which the cgroup keeps frozen: nothing runs here.
            self._dump.close()
            raise InDoubt.after_commit(self._move_id, error) from error
        if self._phase is Phase.INIT:
            raise error
        self._on(_event_of(error))
        if isinstance(error, (KeyboardInterrupt, MoveRefused)):
            raise error
        raise RolledBack.because(error) from error

    def _mark(self, name: str) -> None:
        before, at = self.clock.current, self.clock.mark(name)
        if before is not None:
            self._observer.on_event(PhaseEnded(name=before[0], ms=(at - before[1]) * 1000))
        self._observer.on_event(PhaseStarted(name=name))

    def _journal_prepared(self) -> None:
        target = self._session.entry.name
        self._write("PREPARED", {"container": self._container.id, "mode": self._mode, "target": target})

    def _write(self, phase: str, details: Mapping[str, Any] | None = None) -> None:
        self._journal.append(phase, details)

    # Talking

    def _send(self, message: messages.Message) -> None:
        self._out.control(message.to_message())

    def _hear(self, kind: type[M], timeout_s: float = IDLE_TIMEOUT_S) -> M:
        return kind.parse(self._session.channel.receive(deadline=Deadline.after(timeout_s)).message())

    def _send_offer(self) -> None:
        spec = self._container.spec
        self._send(messages.Offer(move_id=self._move_id, epoch=FIRST_EPOCH, mode=self._mode, spec=spec))
        self._undo.callback(self._work.close)
        self._undo.callback(self._dump.rollback)
        if self._mode == "stopcopy":
            self._dump.prepare()
            return
        ours, theirs = page_socketpair()
        self._undo.callback(ours.close)
        with theirs:
            self._dump.prepare(page_socket=theirs)
        if self._mode == "precopy":
            self._live = LiveMemory(self._cgroup.pids, self._out, make_tracker())
            self._undo.callback(self._live.close)
            sender: PageSender = DifferenceSender(self._out, self._live)
        else:
            sender = PageSender(self._out)
        self._pages = _PageThread(ours, self._criu.version, sender)

    def _send_discard(self) -> None:
        with contextlib.suppress(TransportError):
            message = messages.Discard(move_id=self._move_id, epoch=FIRST_EPOCH, why="the move was called off")
            deadline = Deadline.after(DISCARD_TIMEOUT_S)
            self._session.channel.send(Frame.control(message.to_message()), deadline=deadline)

    def _send_done(self) -> None:
        with contextlib.suppress(TransportError):
            self._send(messages.Done(move_id=self._move_id, epoch=FIRST_EPOCH, report=self._make_report(self)))
            if self.running is not None and self.running.lazy:
                # It runs there already; this only tells how long its memory took.
                self._mark("fill")
                self.filled = self._hear(messages.Filled, FILL_TIMEOUT_S)

    # Doing

    def _copy(self) -> None:
        """Files go over while the container runs, and memory with pre-copy; only what changes meanwhile goes again."""
        for number in range(len(self._trees)):
            self._send_tree(number)
        self._out.log(self._log)
        if self._live is not None:
            self._mark("rounds")
            self._copy_memory(self._live)

    def _copy_memory(self, live: LiveMemory) -> None:
        control = Precopy(self._budget, FixedCosts())
        live.scan()
        begin = time.monotonic()
        while True:
            wire_before = self._out.sent_bytes["pages"]
            page_bytes = live.send()
            live.scan()
            now = time.monotonic()
            done = Round(
                seconds=max(now - begin, 1e-4),
                page_bytes=page_bytes,
                wire_bytes=self._out.sent_bytes["pages"] - wire_before,
                dirty_bytes=live.pending_bytes,
            )
            begin = now
            self.rounds += 1
            decision = control.decide(done)
            self._show_round(decision)
            if decision.kind is Kind.STOP and decision.action == "abort":
                raise MoveRefused("; ".join(decision.reasons) or "pre-copy does not converge")
            if decision.kind not in (Kind.CONTINUE, Kind.THROTTLE):
                self.predicted_ms = decision.blackout_ms
                return

    def _show_round(self, decision: Decision) -> None:
        sent = self._out.sent_bytes["pages"]
        seconds = time.monotonic() - self.clock.at("rounds")
        self._observer.on_event(
            Progress(phase=f"round {self.rounds}", kind="pages", sent_bytes=sent, rate_Bps=sent / max(seconds, 1e-3))
        )

    def _send_tree(self, number: int) -> None:
        root, before, sent = self._trees[number], self._snapshots[number], self._sent[number]
        snapshot = scan(root, previous=before, settle=before is None)
        # Times do not tell of stores through shared mappings: on a tmpfs never, elsewhere not of every one.
        always = snapshot.file_inodes() if number else self._mapped_inodes(snapshot)
        self._out.tree(number, root, compare(before, snapshot, always=always, sent=sent), sent)
        self._snapshots[number] = snapshot

    def _mapped_inodes(self, snapshot: Snapshot) -> frozenset[int]:
        found = set()
        for pid in self._cgroup.pids():
            with contextlib.suppress(OSError):
                for path in parse_shared_writable(Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")):
                    entry = snapshot.entries.get(path.lstrip("/"))
                    if entry is not None:
                        found.add(entry.inode)
        return frozenset(found)

    def _freeze_and_dump(self) -> None:
        self._mark("freeze")
        self._dump.freeze()
        self._send(messages.Frozen(move_id=self._move_id))
        self._hear(messages.Holding)
        self._dump.cut_off()
        self._mark("dump")
        if self._pages is not None:
            self._pages.start()
        if self._pages is None:
            self._dump.dump()
            return
        try:
            self._dump.dump(before_walk=self._live.finish if self._live is not None else None)
        except CriuFailed as error:
            # Where the channel broke CRIU only saw its page server refuse: the channel's error is the cause.
            cause = self._pages.wait()
            raise (error if cause is None or isinstance(cause, CriuFailed) else cause) from error
        cause = self._pages.wait()
        if cause is not None:
            raise cause

    def _send_state(self) -> None:
        self._mark("send")
        for number in range(len(self._trees)):
            self._send_tree(number)
        self._out.images(self._work.path)
        state = self._container.state
        self._out.log(self._log)
        self._send(
            messages.FrozenState(
                mounts=self._dump.mounts, pipes=self._dump.pipes, started_at=state.started_at, restarts=state.restarts
            )
        )

    def _kill_copy(self) -> None:
        """The copy here is dead weight: kill it, remove what is left of it."""
        self._dump.finish()
        self._undo.pop_all()
        self._containers.clean_up(self._container.id)
        self._containers.store.remove(self._container.id)
        self._work.close()


class _PageThread:
    """The page server beside the conversation with CRIU; the only sender on the channel while it runs."""

    def __init__(self, sock: socket.socket, criu_version: tuple[int, int, int], sender: PageSender) -> None:
        self._server = PageServer(sock, criu_version, sender)
        self._sender = sender
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="pages", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _serve(self) -> None:
        try:
            self._server.serve(idle_timeout_s=IDLE_TIMEOUT_S)
            self._sender.flush()
        except BaseException as error:
            # The server has told CRIU, whose failure ends the wait for post-dump.
            self._error = error

    def wait(self) -> BaseException | None:
        """Until the stream is over; what went wrong with it."""
        self._thread.join()
        return self._error


@contextlib.contextmanager
def garbage_collector_off() -> Iterator[None]:
    """No collection in the blackout: with a large heap one takes milliseconds."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _event_of(error: BaseException) -> Event:
    if isinstance(error, KeyboardInterrupt):
        return Event.CANCELLED
    if isinstance(error, (MoveRefused, PeerFailed)):
        return Event.TARGET_REFUSED
    if isinstance(error, TransportError):
        return Event.LINK_LOST
    return Event.FAULT
