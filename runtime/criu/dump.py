"""A dump of one container that is held at its end: nothing is lost or resumed before the caller decides.

prepare()   CRIU is started and warm and waits at ``pre-dump``; the container still runs
freeze()    the cgroup freezer stops every task, the log is complete; cut_off(): its link leads nowhere
begin()     CRIU seizes the tasks, which takes a while: memory can be read meanwhile
dump()      CRIU writes images (and pages) and waits at ``post-dump``; hold(): the freezer holds the tasks as well
finish()    the source's copy is killed          or   rollback()   it runs on as if nothing had been
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pycriu import rpc_pb2 as rpc

from runtime.api import Container, Status
from runtime.connections import ConnectionCloser, TcpPolicy
from runtime.container import Containers
from runtime.criu.binary import CriuBinary
from runtime.criu.filter.table import PageFilter
from runtime.criu.log import failure
from runtime.criu.options import ExternalMount, dump_request, external_mounts
from runtime.criu.rpc import CriuSession
from runtime.datagrams import FILE, to_file
from runtime.errors import CriuFailed, RuntimeFault
from runtime.handover import begin_handover, end_handover
from runtime.linux.rcu import ExpeditedGracePeriods
from runtime.linux.tcp_table import TcpConnection, TcpTable
from runtime.linux.vfork import tasks_in_vfork
from runtime.neighbours import known_neighbours
from runtime.network import ContainerNetwork, in_network_namespace
from runtime.networks import host_for
from runtime.nft import remove_criu_tables
from runtime.sandbox.launch import ask_monitor
from runtime.udp_queues import UdpQueues, Waiting
from runtime.wire import drop_toward

PREPARE_TIMEOUT_S = 30.0
FREEZE_TIMEOUT_S = 10.0
VFORK_ATTEMPTS = 200
VFORK_PAUSE_S = 0.001
# The first pauses are too short to be felt; a listener that has taken none after the fourth does not want to.
ACCEPT_ATTEMPTS = 12
ACCEPT_PATIENCE = 3
ACCEPT_PAUSE_S = 0.001
# CRIU is silent while it walks memory; 4 GiB take seconds here, a terabyte minutes.
DUMP_TIMEOUT_S = 600.0
FINISH_TIMEOUT_S = 60.0


class HeldDump:
    """One dump. ``images`` is an empty directory that exists. Not thread safe except for the page server's socket."""

    def __init__(
        self,
        containers: Containers,
        container: Container,
        criu: CriuBinary,
        images: Path,
        *,
        tcp: TcpPolicy = "keep",
    ) -> None:
        self._containers = containers
        self.container = container
        self._criu = criu
        self.images = images
        self._cgroup = containers.cgroup(container.id)
        self._network = ContainerNetwork(host_for(containers.host, container.spec.network), container.id)
        self._session: CriuSession | None = None
        self._filter: PageFilter | None = None
        self._helper = ThreadPoolExecutor(1, "criu-seizes")
        self._seizing: Future[None] | None = None
        self._tcp_table: TcpTable | None = None
        self._udp: UdpQueues | None = None
        self._grace_periods = ExpeditedGracePeriods(containers.host.run_dir)
        self._frozen = False
        self._hands_over = False
        self.mounts: tuple[ExternalMount, ...] = ()
        self.pipes: tuple[int, int] = (0, 0)
        self.neighbours: dict[str, str] = {}
        """Address -> MAC, as of the last ``look_ahead``."""
        self.unaccepted = 0
        """Connections that nobody accepted until the end: they will be reset."""
        self.unheard: tuple[TcpConnection, ...] = ()
        """The same, each by itself."""
        self.waiting = Waiting()
        """After ``dump``: datagrams that its UDP sockets held. They are among the images."""
        self._tcp = tcp
        self._closer: ConnectionCloser | None = None
        self.marks: dict[str, float] = {}
        """time.monotonic() of: freeze, frozen, seized, dumped, held, finished"""

    def prepare(
        self,
        *,
        page_socket: socket.socket | None = None,
        page_filter: PageFilter | None = None,
        leave_running: bool = False,
    ) -> None:
        """Everything that can be done while the container runs. ``page_socket`` is CRIU's end of a socketpair;
        ``page_filter`` is loaded into CRIU, to be told in ``dump`` what CRIU need not look at."""
        state = self.container.state
        release_exec_waiters(self._containers, self.container.id)
        if self.container.spec.network is not None:
            self._network.look_up()
            self._network.open_inside(state.init_pid, self.container.spec.network)
        self._tcp_table = in_network_namespace(state.init_pid, TcpTable)
        self._udp = UdpQueues(state.init_pid, self._cgroup.pids, self.container.spec.network)
        self._closer = ConnectionCloser(self._containers.host, self.container, self._tcp)
        status = ask_monitor(self._containers.host, self.container.id, "status")
        self.pipes = (status["pipes"][0], status["pipes"][1])
        self.mounts = external_mounts(self.container.spec, Path(f"/proc/{state.init_pid}/mountinfo").read_text())
        images_fd = os.open(self.images, os.O_RDONLY | os.O_DIRECTORY)
        output = os.open(self.images / "criu-output.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        passed = [page_socket.fileno()] if page_socket else []
        environment: dict[str, str] = {}
        self._filter = page_filter
        if page_filter is not None:
            passed += page_filter.pass_fds
            environment = page_filter.environment
        try:
            self._session = CriuSession.spawn(self._criu, pass_fds=passed, environment=environment, output=output)
        finally:
            os.close(output)
        request = dump_request(
            init_pid=state.init_pid,
            images_fd=images_fd,
            mounts=self.mounts,
            freeze_cgroup=self._cgroup.criu_freezer_path(),
            page_server_fd=page_socket.fileno() if page_socket else None,
            leave_running=leave_running,
        )
        self._session.send(request)
        try:
            # CRIU opens the directory as /proc/<our pid>/fd/<number>, so it stays open here until then.
            self._advance_to("pre-dump", PREPARE_TIMEOUT_S)
        finally:
            os.close(images_fd)

    def look_ahead(self, move_id: str) -> None:
        """To be called shortly before ``freeze``: whom the container knows at link level goes along, and what its
        mappings are CRIU need not read while it is frozen. Until ``rollback`` nothing starts it here."""
        self._hands_over = True
        begin_handover(self._containers.store.directory(self.container.id), move_id)
        if self._filter is not None:
            self._filter.note_mappings(self._cgroup.pids)
        network = self.container.spec.network
        if network is not None:
            self.neighbours = known_neighbours(self._containers.host, self.container.state.init_pid, network)

    def freeze(self) -> None:
        """Stop the container. From here the blackout runs. Its sockets still take what arrives."""
        self._grace_periods.begin()
        self.marks["freeze"] = time.monotonic()
        self._frozen = True
        self._freeze_outside_vfork()
        # What the container wrote before is in the log now, and not in a pipe that CRIU would dump a second time.
        ask_monitor(self._containers.host, self.container.id, "drain")
        self.marks["frozen"] = time.monotonic()

    def _freeze_outside_vfork(self) -> None:
        """A task inside vfork can be frozen and not seized: thaw for a moment and try again, it is soon out of it."""
        for attempt in range(VFORK_ATTEMPTS):
            self._cgroup.freeze(FREEZE_TIMEOUT_S)
            inside = tasks_in_vfork(self._cgroup.pids())
            if not inside:
                return
            self._cgroup.thaw()
            time.sleep(VFORK_PAUSE_S * (1 + attempt % 5))
        raise CriuFailed(
            f"task {inside[0]} of the container stays inside vfork(), where it can not be dumped",
            hint="its child neither calls execve() nor ends: see what it waits for",
        )

    def close_lost(self) -> tuple[str, ...]:
        """End the connections that can not survive, after ``freeze``, and before ``cut_off``: their peers must hear it.
        Returns what was ended."""
        return () if self._closer is None else self._closer.close_lost()

    def cut_off(self) -> None:
        """No frame reaches the container any more; whoever holds them instead is ready."""
        self._network.disconnect()
        self._let_accept()

    def _let_accept(self) -> None:
        """A connection that nobody has accepted can not be dumped, and its client would be reset. None comes any more,
        so the container runs for moments until it has taken those that wait; one that does not keeps nobody waiting."""
        assert self._tcp_table is not None
        self.unaccepted = self._tcp_table.waiting_connections()
        if not self.unaccepted:
            return
        for attempt in range(ACCEPT_ATTEMPTS):
            self._cgroup.thaw()
            time.sleep(ACCEPT_PAUSE_S * (1 + attempt))
            self._freeze_outside_vfork()
            before, self.unaccepted = self.unaccepted, self._tcp_table.waiting_connections()
            if not self.unaccepted or (attempt >= ACCEPT_PATIENCE and self.unaccepted == before):
                break
        self.unheard = tuple(self._tcp_table.unaccepted())
        ask_monitor(self._containers.host, self.container.id, "drain")

    def begin(self) -> None:
        """After ``cut_off``: CRIU seizes the tasks, in the background until ``dump`` waits for it. What they do in the
        kernel goes on until then."""
        session = self._active()
        session.acknowledge()
        self._seizing = self._helper.submit(self._advance_to, "query-ext-files", DUMP_TIMEOUT_S)

    def dump(self, before_walk: Callable[[], object] | None = None) -> None:
        """Until CRIU has written everything; it holds the tasks then. Begins if need be.

        ``before_walk`` is called when all tasks stand still and CRIU has not looked at their memory yet.
        """
        session = self._active()
        if self._seizing is None:
            self.begin()
        assert self._seizing is not None
        self._seizing.result()
        self.marks["seized"] = time.monotonic()
        if before_walk is not None:
            before_walk()
            self.marks["scanned"] = time.monotonic()
        self._keep_datagrams()  # not while CRIU looks at the same sockets
        session.acknowledge()
        self._advance_to("post-dump", DUMP_TIMEOUT_S)
        self.marks["dumped"] = time.monotonic()

    def hold(self) -> None:
        """After ``dump``. CRIU thawed the group after seizing its tasks; from now on nothing runs, whoever dies."""
        self._cgroup.freeze(FREEZE_TIMEOUT_S)
        self.marks["held"] = time.monotonic()

    def _keep_datagrams(self) -> None:
        assert self._udp is not None
        self.waiting = self._udp.read()
        if self.waiting.datagrams:
            (self.images / FILE).write_bytes(to_file(self.waiting.datagrams))

    def finish(self) -> None:
        """Kill the held copy: the container lives elsewhere now. Its end is not recorded as an exit."""
        with contextlib.suppress(Exception):
            ask_monitor(self._containers.host, self.container.id, "release")
        session = self._active()
        session.acknowledge()
        with contextlib.suppress(CriuFailed):
            self._until_response(session, FINISH_TIMEOUT_S)
        # Nothing is left to thaw or to connect: a rollback from here on does nothing.
        self._frozen = False
        self.marks["finished"] = time.monotonic()
        self.close()

    def resume(self) -> None:
        """After a dump with ``leave_running``: accept it, and let the container run on."""
        session = self._active()
        session.acknowledge()
        self._until_response(session, FINISH_TIMEOUT_S)
        self._thaw()
        self.close()

    def rollback(self) -> None:
        """The container runs on, with its network; safe at any moment before ``finish`` and when called twice."""
        if self._seizing is not None:
            with contextlib.suppress(TimeoutError):
                self._seizing.exception(FINISH_TIMEOUT_S)  # CRIU is heard by one thread at a time
        if self._session is not None:
            with contextlib.suppress(CriuFailed, OSError):
                # CRIU waits for an answer, or will ask once more before it kills anything: then it finds this one.
                self._session.acknowledge(False)
                self._until_response(self._session, FINISH_TIMEOUT_S, answer=False)
        self._thaw()
        if self._hands_over:
            end_handover(self._containers.store.directory(self.container.id))
            self._hands_over = False
        self.close()

    def stay_frozen(self) -> None:
        """From now on ``rollback`` lets go of everything but the tasks: the freezer goes on holding those, and the link
        leads nowhere (runtime/kept.py)."""
        self._frozen = self._hands_over = False

    def _thaw(self) -> None:
        if self._frozen:
            self._cgroup.thaw()
            if self.container.spec.network is not None:
                self._network.connect()
                # Peers may have learned another way meanwhile: to a target that did not get it.
                self._network.announce()
            self._frozen = False

    @property
    def was_frozen(self) -> bool:
        return "freeze" in self.marks

    def announce(self) -> None:
        """After ``rollback``, when the target answers for the address no more: it may have done so after we had taken
        the container's frames back, and whoever heard that would go on sending there."""
        if self.was_frozen and self.container.spec.network is not None:
            with contextlib.suppress(RuntimeFault, OSError), self._network:
                self._network.open_inside(self.container.state.init_pid, self.container.spec.network)
                self._network.announce()

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._tcp_table is not None:
            self._tcp_table.close()
        if self._udp is not None:
            self._udp.close()
        self._helper.shutdown(wait=False)
        self._grace_periods.end()
        if self._closer is not None:
            self._closer.close()
        self._network.close()

    def _active(self) -> CriuSession:
        if self._session is None:
            raise CriuFailed("the dump is already over")
        return self._session

    def _advance_to(self, name: str, timeout_s: float) -> None:
        """Answer notifications up to ``name``, which stays unanswered."""
        session = self._active()
        while True:
            event = session.next_event(timeout_s)
            if event.type != rpc.NOTIFY:
                raise failure("dump", self._log_text(), event.cr_errno)
            if event.notify.script == name:
                return
            session.acknowledge()

    def _until_response(self, session: CriuSession, timeout_s: float, *, answer: bool = True) -> Any:
        while True:
            event = session.next_event(timeout_s)
            if event.type != rpc.NOTIFY:
                return event
            session.acknowledge(answer)

    def _log_text(self) -> str:
        texts = []
        for name in ("dump.log", "criu-output.log"):
            with contextlib.suppress(OSError):
                texts.append((self.images / name).read_text(errors="replace"))
        return "\n".join(texts)


def release_exec_waiters(containers: Containers, container_id: str) -> None:
    """End the outside parents of exec'd programs, which then belong to the container's init (sandbox/enter.py)."""
    directory = containers.run_dir(container_id) / "waiters"
    members = set(containers.cgroup(container_id).pids())
    for name in os.listdir(directory) if directory.exists() else ():
        # A stale file may name a pid that is somebody else's by now; only a member of the container is ours.
        if name.isdigit() and int(name) in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(name), signal.SIGKILL)
        with contextlib.suppress(FileNotFoundError):
            (directory / name).unlink()


def wake_after_dead_dump(containers: Containers, container: Container) -> None:
    """After a dump whose caller was killed: remove CRIU's network lock, give the link back, thaw. Idempotent.

    CRIU itself has seen its caller go, has let go of the tasks and unlocked what it locked, unless it was killed as
    well; the freezer is what kept them still.
    """
    state = container.state
    if state.status not in (Status.RUNNING, Status.PAUSED):
        end_handover(containers.store.directory(container.id))
        return
    in_network_namespace(state.init_pid, remove_criu_tables)
    with ContainerNetwork(host_for(containers.host, container.spec.network), container.id) as network:
        if container.spec.network is not None:
            network.look_up()
            network.connect()
            network.open_inside(state.init_pid, container.spec.network)
            network.announce()
    if state.status is Status.RUNNING:
        containers.cgroup(container.id).thaw()
    end_handover(containers.store.directory(container.id))
    drop_toward(container.id)
