"""A restore of one container that is held before its first instruction, until the caller releases or discards it.

prepare()   sandbox mounted, monitor and CRIU started; images may still be on their way
restore()   everything is in place, no instruction has run: CRIU waits at ``post-restore``
release()   it runs, and its address answers here        or   discard()   nothing of it is left
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pycriu import rpc_pb2 as rpc

from runtime.api import ContainerSpec, ContainerState
from runtime.container import Containers, running_state
from runtime.criu.binary import CriuBinary
from runtime.criu.locks import take_lost_locks
from runtime.criu.log import failure
from runtime.criu.options import ExternalMount, restore_request
from runtime.criu.rpc import ENVIRONMENT, CriuSession
from runtime.criu.segments import ANONYMOUS_NAME
from runtime.errors import CriuFailed
from runtime.farewell import Farewell
from runtime.linux.rcu import ExpeditedGracePeriods
from runtime.linux.tcp_table import TcpConnection
from runtime.memory.lazy import lazy_restore_allowed
from runtime.memory.tasks import tasks_inside
from runtime.neighbours import NeighbourTable
from runtime.network import ContainerNetwork, ensure_bridge
from runtime.networks import host_for
from runtime.packets import PacketHold
from runtime.redelivery import Redelivery
from runtime.sandbox.charger import Charger
from runtime.sandbox.launch import MonitorLaunch, SandboxOrders
from runtime.wayback import lead_back
from runtime.wire import ContainerWire, WireSpec

RESTORE_TIMEOUT_S = 600.0
RELEASE_TIMEOUT_S = 60.0
# So many segments of shared memory can be given to CRIU as they are; a program seldom has more than two large ones.
MEMORY_FILES = 8


class HeldRestore:
    """One restore of ``spec`` from the image set in ``images``. ``directory`` holds upper, work and log."""

    def __init__(
        self, containers: Containers, spec: ContainerSpec, criu: CriuBinary, images: Path, directory: Path
    ) -> None:
        self._containers = containers
        self.spec = spec
        self._criu = criu
        self._images = images
        self._directory = directory
        self._run_dir = containers.run_dir(spec.id)
        self._host = host_for(containers.host, spec.network)
        self._network = ContainerNetwork(self._host, spec.id)
        self._hold: PacketHold | None = None
        self._redelivery = Redelivery(spec.id, spec.network)
        self._grace_periods = ExpeditedGracePeriods(containers.host.run_dir)
        self._table: NeighbourTable | None = None
        self.neighbours: Mapping[str, str] = {}
        """Address -> MAC of what the container knew where it was; to be set before ``restore``."""
        self.unheard: Sequence[TcpConnection] = ()
        """Connections that ended because it had not accepted them; to be set before ``restore``."""
        self._farewell = Farewell(spec.network)
        self.way_back = ""
        """MAC of the bridge that connections shall go on through (wayback.py); to be set before ``prepare``."""
        self.memory_files: tuple[int, ...] = ()
        """After ``prepare``: empty memory files that CRIU has as well, for ``restore`` to name. This object's."""
        self.charger = Charger()
        """For who fills them, or other memory of the container."""
        self.wire: WireSpec | None = None
        """To the host it comes from, where that is in another segment; to be set before ``prepare``."""
        self._wire: ContainerWire | None = None
        self._launch: MonitorLaunch | None = None
        self._session: CriuSession | None = None
        self._sandbox: dict[str, Any] = {}
        self._init_pid = 0
        self._mounting = False
        self._helper = ThreadPoolExecutor(1, "completes-images")
        self.marks: dict[str, float] = {}
        """time.monotonic() of: restore, namespaces, restored, release, connected, released"""

    @property
    def may_have_run(self) -> bool:
        """Whether an instruction of the container may have run here."""
        return "resuming" in self.marks

    @property
    def monitor_pid(self) -> int:
        return self._launch.process.pid if self._launch else 0

    def prepare(self) -> None:
        """Make cgroup, bridge, sandbox; start the monitor, and CRIU below it."""
        if self.spec.network is not None:
            ensure_bridge(self._host)
            if self.way_back:
                lead_back(self._host, self.spec.id, self.spec.network, self.spec.ports, self.way_back)
            if self.wire is not None:
                self._wire = ContainerWire(self._host, self.spec, self.wire)
                self._wire.prepare(toward=False)
            self._hold = PacketHold(self._host, self.spec.id, self.spec.network)
            self._hold.prepare()
            self._table = NeighbourTable(self._host, self.spec.network)
            self._network.get_ready(self.spec.network)
        cgroup = self._containers.cgroup(self.spec.id)
        cgroup.create(self.spec.limits)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        orders = SandboxOrders(
            spec=self.spec,
            directory=self._directory,
            run_dir=self._run_dir,
            cgroup_paths=cgroup.paths(),
            criu_argv=self._criu.argv,
            criu_environment=tuple(ENVIRONMENT.items()),
        )
        try:
            for _ in range(MEMORY_FILES):
                # Named as CRIU would name what it made for anonymous shared memory.
                self.memory_files += (os.memfd_create(ANONYMOUS_NAME, os.MFD_CLOEXEC),)
            passed = (theirs.fileno(), self.charger.helpers.fileno(), *self.memory_files)
            self._launch = MonitorLaunch(orders, "restore", passed)
        finally:
            theirs.close()
            self.charger.started()
        self._session = CriuSession(ours)
        self._sandbox = self._launch.expect("sandbox")

    def hold_packets(self) -> None:
        """The container is frozen where it was: from now on its frames are held here."""
        self._grace_periods.begin()
        if self._wire is not None:
            self._wire.join()
        if self._hold is not None:
            self._hold.start()

    def tmpfs_roots(self) -> list[Path]:
        """The prepared tmpfs mounts (/dev/shm first), reachable through the monitor's mount namespace."""
        base = Path(f"/proc/{self.monitor_pid}/root")
        return [Path(f"{base}{self._run_dir}/tmpfs-{n}") for n in range(1 + len(self.spec.tmpfs))]

    def tasks(self) -> dict[int, int]:
        """This host's pid by the one inside, of every process that was restored."""
        return tasks_inside(self._init_pid, self._containers.cgroup(self.spec.id).pids())

    def begin_mounting(self) -> None:
        """Nothing changes the upper layer from outside any more. ``restore`` waits until it is done. Raises
        CriuFailed."""
        if self._launch is not None and not self._mounting:
            self._mounting = True
            self._launch.tell("mount")

    def restore(
        self,
        mounts: Sequence[ExternalMount],
        pipes: tuple[int, int],
        *,
        auto_dedup: bool = False,
        lazy: bool = False,
        memory_files: Mapping[str, int] | None = None,
        complete: Callable[[], object] = lambda: None,
    ) -> None:
        """Bring everything back up to the last moment before an instruction runs. Raises CriuFailed.

        ``lazy``: a pager listens in ``images`` and has the private memory (runtime/memory/pager.py).
        ``memory_files``: by the keys of segments.py, the index in the attribute of that name.
        ``complete`` is called by another thread while CRIU makes namespaces; it looks at images of private memory, and
        speaks to the pager of tasks, only afterwards.
        """
        if self._session is None or self._launch is None:
            raise CriuFailed("the restore was not prepared")
        self.marks["restore"] = time.monotonic()
        self._grace_periods.begin()
        self.begin_mounting()
        self._launch.expect("mounted")
        # CRIU opens the directory as /proc/<our pid>/fd/<number>, so it stays open here until then.
        images_fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        completing = self._helper.submit(complete)
        try:
            with lazy_restore_allowed(self._containers.host.run_dir) if lazy else contextlib.nullcontext():
                self._restore(images_fd, mounts, pipes, auto_dedup, lazy, memory_files or {}, completing)
            take_lost_locks(self._images, self.tasks())
        finally:
            wait([completing])
            self._helper.shutdown()
            os.close(images_fd)

    def _restore(
        self,
        images_fd: int,
        mounts: Sequence[ExternalMount],
        pipes: tuple[int, int],
        auto_dedup: bool,
        lazy: bool,
        memory_files: Mapping[str, int],
        completing: Future[object],
    ) -> None:
        assert self._session is not None
        request = restore_request(
            spec=self.spec,
            run_dir=self._run_dir,
            images_fd=images_fd,
            root=self._sandbox["root"],
            mounts=mounts,
            inherited=tuple(zip(pipes, self._sandbox["log_fds"], strict=True)),
            memory_files={key: self._sandbox["memory_fds"][index] for key, index in memory_files.items()},
            auto_dedup=auto_dedup,
            lazy=lazy,
        )
        self._session.send(request)
        while True:
            event = self._session.next_event(RESTORE_TIMEOUT_S)
            if event.type != rpc.NOTIFY:
                raise failure("restore", self._log_text(), event.cr_errno)
            if event.notify.script == "setup-namespaces":
                self._init_pid = event.notify.pid
                # While CRIU mounts; sockets are restored after its next question.
                self._session.acknowledge()
                try:
                    self._set_up_network()
                except Exception:
                    self._complain_first()
                    raise
                self.marks["namespaces"] = time.monotonic()
                continue
            if event.notify.script == "post-setup-namespaces":
                completing.result()
            if event.notify.script == "post-restore":
                self.marks["restored"] = time.monotonic()
                return
            self._session.acknowledge()

    def _complain_first(self) -> None:
        """Something went wrong while CRIU was at work. Where that has failed, its namespaces have gone with it: what it
        says is the cause."""
        assert self._session is not None
        event = self._session.next_event(RESTORE_TIMEOUT_S)
        if event.type != rpc.NOTIFY:
            raise failure("restore", self._log_text(), event.cr_errno)

    def _set_up_network(self) -> None:
        if self._table is not None:
            self._table.get_ready(self.neighbours)
        self._redelivery.get_ready(self._images)
        # The bridge must not know the address here yet: an empty namespace would answer peers with a reset.
        if self.spec.network is not None:
            self._network.attach(self._init_pid, self.spec.network, connect=False)
        self._redelivery.open_inside(self._init_pid)
        self._farewell.get_ready(self._init_pid, self.unheard)

    def release(
        self, *, started_at: str = "", restarts: int = 0, before_run: Callable[[], object] = lambda: None
    ) -> ContainerState:
        """Let it run. After this returned, the container runs here or CriuFailed says that it died on the way.

        ``before_run`` is called at the last moment at which it is certain that no instruction of it has run.
        """
        assert self._session is not None
        assert self._launch is not None
        self.marks["release"] = time.monotonic()
        # From here on the monitor keeps the container, even if this process dies before CRIU has answered.
        self._launch.tell("adopt", init_pid=self._init_pid)
        before_run()
        self._session.acknowledge()
        while True:
            event = self._session.next_event(RELEASE_TIMEOUT_S)
            if event.type != rpc.NOTIFY:
                break
            if event.notify.script == "pre-resume":
                self._redelivery.deliver()
            if event.notify.script == "pre-resume" and self.spec.network is not None:
                self._network.connect()
                self._network.announce(1)
                if self._table is not None:
                    self._table.set(self._network)
                if self._hold is not None:
                    self._hold.hand_over()
                self.marks["connected"] = time.monotonic()
            if event.notify.script == "pre-resume":
                self.marks["resuming"] = time.monotonic()
            self._session.acknowledge()
        self.marks["released"] = time.monotonic()
        self._grace_periods.end()
        if not event.success:
            raise failure("restore", self._log_text(), event.cr_errno)
        return running_state(self._init_pid, self.monitor_pid, restarts=restarts, started_at=started_at)

    def settle(self) -> None:
        """After ``release``, outside the blackout: announce the address, publish ports, let the monitor take over."""
        assert self._launch is not None
        assert self._session is not None
        if self.spec.network is not None:
            self._network.announce(1)
            self._network.announce_again()
            if self._hold is not None:
                # What came while the bridges were learning the way.
                self._hold.hand_over()
                self._hold.close()
            self._network.publish(self.spec.ports, self.spec.network)
            self._farewell.say()
        if self._wire is not None:
            self._wire.arrived()
        self._session.close()
        with self._launch:
            self._launch.expect("started")
        self._close_network()

    def discard(self) -> None:
        """Undo everything; safe at any moment before ``release`` and when called twice."""
        self._grace_periods.end()
        if self._session is not None:
            with contextlib.suppress(CriuFailed, OSError):
                if "restored" in self.marks:
                    self._session.acknowledge(False)
                    self._session.next_event(RELEASE_TIMEOUT_S)
            self._session.close()
            self._session = None
        self.charger.close()  # the monitor waits for its helper, which waits for us
        if self._launch is not None:
            with self._launch:
                pass
            self._launch = None
        if self._wire is not None:
            self._wire.undo()
        self._close_network()
        self._containers.clean_up(self.spec.id)

    def close_memory_files(self) -> None:
        """Those that CRIU took live on in what maps them."""
        for fd in self.memory_files:
            os.close(fd)
        self.memory_files = ()
        self.charger.close()

    def _close_network(self) -> None:
        self.close_memory_files()
        self._network.close()
        self._redelivery.close()
        self._farewell.close()
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        if self._hold is not None:
            self._hold.close()

    def _log_text(self) -> str:
        texts = []
        for path in (self._images / "restore.log", self._run_dir / "criu-output.log"):
            with contextlib.suppress(OSError):
                texts.append(path.read_text(errors="replace"))
        return "\n".join(texts)
