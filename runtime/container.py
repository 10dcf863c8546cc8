"""Life of containers on this host: create, start, exec, stop, remove. What ``cmigrate run|ps|exec|…`` call.

Every change happens under the container's lock, so that two commands at once on one container are serialised. What sets
up networks is imported where it is used: pyroute2 takes a tenth of a second, for which who only looks need not wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.api import Container, ContainerSpec, ContainerState, Status
from runtime.cgroup import CgroupStats, ContainerCgroup
from runtime.cgroup_layout import CgroupLayout
from runtime.errors import Busy, NoRoom, NotFound, RuntimeFault, WrongState
from runtime.forwarding import forward_ports
from runtime.handover import must_be_ours_to_start
from runtime.host import HostConfig
from runtime.linux.files import open_in_root
from runtime.names import refresh_names
from runtime.networks import host_for
from runtime.ports import refuse_taken_ports
from runtime.processes import ProcessInfo, read_process, send_signal
from runtime.rootfs import prepare_upper
from runtime.sandbox.launch import MonitorLaunch, SandboxOrders, ask_monitor
from runtime.seccomp import capability_set, default_profile
from runtime.store import ContainerStore, process_start_ticks

if TYPE_CHECKING:
    from runtime.wire import WireSpec

LOCK_WAIT_S = 30.0
KILL_WAIT_S = 10.0
POLL_S = 0.02


class Containers:
    """The containers of one host."""

    def __init__(self, host: HostConfig) -> None:
        self.host = host
        self.store = ContainerStore(host)
        self.layout = CgroupLayout.probe()

    # Reading

    def get(self, reference: str) -> Container:
        """By name, id or unambiguous prefix of an id, with its state as it truly is. Raises NotFound."""
        return self._true(self.store.get(reference))

    def list(self, *, all_states: bool = True) -> Sequence[Container]:
        """Sorted by creation, newest first."""
        containers = [self._true(container) for container in self.store.containers()]
        shown = (Status.RUNNING, Status.PAUSED, Status.KEPT)
        kept = [c for c in containers if all_states or c.state.status in shown]
        return sorted(kept, key=lambda container: container.spec.created_at, reverse=True)

    def _true(self, container: Container) -> Container:
        return dataclasses.replace(container, state=self.store.observe(container))

    def cgroup(self, container_id: str) -> ContainerCgroup:
        return ContainerCgroup(self.layout, self.host.cgroup_parent, container_id)

    def run_dir(self, container_id: str) -> Path:
        return self.host.run_dir / container_id

    def log_path(self, reference: str) -> Path:
        return self.store.directory(self.store.get(reference).id) / "log.jsonl"

    def stats(self, reference: str) -> CgroupStats:
        container = self._running(reference)
        return self.cgroup(container.id).stats()

    def top(self, reference: str) -> Sequence[ProcessInfo]:
        container = self._running(reference)
        found = [read_process(pid) for pid in self.cgroup(container.id).pids()]
        return sorted((p for p in found if p is not None), key=lambda process: process.pid)

    def _running(self, reference: str) -> Container:
        container = self.get(reference)
        if container.state.status not in (Status.RUNNING, Status.PAUSED):
            raise WrongState(f"container {container.name} is {container.state.status}", hint="it must run for this")
        return container

    @contextlib.contextmanager
    def locked(self, reference: str, purpose: str, wait_s: float = LOCK_WAIT_S) -> Iterator[Container]:
        """The container under its lock, read after the lock was taken."""
        container_id = self.store.get(reference).id
        with self.store.locked(container_id, wait_s=wait_s, purpose=purpose):
            yield self.get(container_id)

    # Changing

    def create(self, spec: ContainerSpec) -> Container:
        """Reserve the name and lay out the container's files; nothing runs yet."""
        container = self.store.create(spec)
        try:
            prepare_upper(spec, self.store.directory(spec.id))
        except BaseException:
            self.store.remove(spec.id)
            raise
        return container

    def run(self, spec: ContainerSpec, *, before_start: Callable[[str], object] | None = None) -> Container:
        """``create`` and ``start``; a container whose first process can not be started is gone again.

        ``before_start`` is called with the id while nothing runs yet.
        """
        self.create(spec)
        try:
            if before_start is not None:
                before_start(spec.id)
            return self.start(spec.id)
        except BaseException:
            self.remove(spec.id, force=True)
            raise

    def start(self, reference: str, *, restarts: int = 0) -> Container:
        """Start a created or exited container. Raises LaunchFailed when its program can not be run."""
        with self.locked(reference, "start") as container:
            must_be_ours_to_start(container, self.store.directory(container.id))
            self.clean_up(container.id)
            with ExitStack() as undo:
                undo.callback(self.clean_up, container.id)
                state = self._launch(container.spec, restarts)
                undo.pop_all()
            self.refresh_names(container.spec)
            return Container(spec=container.spec, state=state)

    def _launch(self, spec: ContainerSpec, restarts: int) -> ContainerState:
        if spec.ports:
            running = self.list(all_states=False)
            refuse_taken_ports(spec, [other.spec for other in running if other.id != spec.id])
        from runtime.network import ContainerNetwork, ensure_bridge

        host = host_for(self.host, spec.network)
        ensure_bridge(host)
        cgroup = self.cgroup(spec.id)
        cgroup.create(spec.limits)
        capabilities = capability_set(spec.cap_add, spec.cap_drop)
        confined = spec.seccomp == "default"
        orders = SandboxOrders(
            spec=spec,
            directory=self.store.directory(spec.id),
            run_dir=self.run_dir(spec.id),
            cgroup_paths=cgroup.paths(),
            capabilities=tuple(sorted(capabilities)),
            seccomp=default_profile(frozenset(spec.cap_add)) if confined else b"",
        )
        with MonitorLaunch(orders, "run") as launch:
            init_pid = int(launch.expect("created")["init_pid"])
            if spec.network is not None:
                with ContainerNetwork(host, spec.id) as network:
                    network.attach(init_pid, spec.network)
                    # Who talked to an earlier container with this address knows another MAC for it.
                    network.announce(1)
                    network.publish(spec.ports, spec.network)
            state = running_state(init_pid, launch.process.pid, restarts=restarts)
            # Before the first instruction: a crash of ours from here on leaves a state that tells the truth.
            self.store.write_state(spec.id, state)
            launch.tell("go")
            launch.expect("started")
        return state

    def stop(self, reference: str, timeout_s: float = 10.0) -> Container:
        """SIGTERM, and SIGKILL after ``timeout_s``; the container stays as exited."""
        with self.locked(reference, "stop") as container:
            if container.state.status not in (Status.RUNNING, Status.PAUSED):
                return container
            self._note_user_stop(container)
            cgroup = self.cgroup(container.id)
            send_signal(container, signal.SIGTERM)
            cgroup.thaw()
            if not self._wait_gone(container, timeout_s):
                cgroup.kill()
                if not self._wait_gone(container, KILL_WAIT_S):
                    raise Busy(
                        f"container {container.name} does not end", hint="a process hangs in the kernel: see dmesg"
                    )
        return self.get(container.id)

    def kill(self, reference: str, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to the container's first process; SIGKILL ends all of it."""
        with self.locked(reference, "kill") as container:
            self._must_run(container)
            if signal_number == signal.SIGKILL:
                self._note_user_stop(container)
                self.cgroup(container.id).kill()
                self._wait_gone(container, KILL_WAIT_S)
            else:
                send_signal(container, signal_number)

    def restart(self, reference: str, timeout_s: float = 10.0) -> Container:
        self.stop(reference, timeout_s)
        return self.start(reference)

    def pause(self, reference: str) -> None:
        """Freeze all of the container's processes until ``unpause``."""
        with self.locked(reference, "pause") as container:
            self._must_run(container)
            if container.state.status == Status.PAUSED:
                raise WrongState(f"container {container.name} is already paused")
            self.cgroup(container.id).freeze()
            self.store.write_state(container.id, dataclasses.replace(container.state, status=Status.PAUSED))

    def unpause(self, reference: str) -> None:
        with self.locked(reference, "unpause") as container:
            if container.state.status != Status.PAUSED:
                raise WrongState(f"container {container.name} is not paused")
            self.cgroup(container.id).thaw()
            self.store.write_state(container.id, dataclasses.replace(container.state, status=Status.RUNNING))

    def remove(self, reference: str, *, force: bool = False) -> None:
        """Delete a container that does not run; ``force`` kills it first."""
        with self.locked(reference, "remove") as container:
            if container.state.status is Status.KEPT and not force:
                hint = f"`cmigrate undo {container.name}` takes it back; --force gives the copy here up"
                raise WrongState(f"container {container.name} is kept, in case it is to come back", hint=hint)
            if container.state.status in (Status.RUNNING, Status.PAUSED):
                if not force:
                    raise WrongState(f"container {container.name} runs", hint="stop it first, or give --force")
                with contextlib.suppress(NoRoom):  # what makes room must not need any
                    self._note_user_stop(container)
                self.cgroup(container.id).kill()
                self._wait_gone(container, KILL_WAIT_S)
            self.clean_up(container.id)
            if container.state.status is not Status.MOVED:  # then they lead to where it lives
                from runtime.wire import remove_wires

                remove_wires(container.id)
            self.store.remove(container.id)
        self.refresh_names(container.spec, gone=True)

    def wait(self, reference: str) -> int:
        """Block until the container has ended; its exit code."""
        container = self.get(reference)
        while container.state.exit_code is None:
            if container.state.status in (Status.RUNNING, Status.PAUSED):
                with contextlib.suppress(WrongState):
                    answer = ask_monitor(self.host, container.id, "wait", timeout_s=None)
                    return int(answer["exit_code"])
            # Its first process is gone, and the monitor is about to say so, unless that is gone as well.
            state = container.state
            recording = process_start_ticks(state.monitor_pid) == state.monitor_start_ticks != 0
            container = self.get(container.id)
            if container.state.exit_code is None and not recording:
                raise WrongState(f"container {container.name} is {container.state.status} and has no exit code")
            time.sleep(POLL_S)
        return container.state.exit_code

    @contextlib.contextmanager
    def attached(self, container_id: str) -> Iterator[None]:
        """While held, a container with ``auto_remove`` that has ended is not removed: its end and log can be read."""
        fd = os.open(self.store.directory(container_id) / "attached", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)

    def wait_until_unattached(self, container_id: str, timeout_s: float) -> None:
        """Until nobody holds ``attached``, but no longer than ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self.store.directory(container_id) / "attached", os.O_RDWR | os.O_CLOEXEC)
            try:
                while time.monotonic() < deadline:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        return
                    time.sleep(POLL_S)
            finally:
                os.close(fd)

    def clean_up(self, container_id: str) -> None:
        """Remove what a container that does not run may have left in kernel and run directory. Idempotent."""
        from runtime.network import ContainerNetwork
        from runtime.wayback import let_expire

        cgroup = self.cgroup(container_id)
        cgroup.kill()
        cgroup.wait_empty(KILL_WAIT_S)
        cgroup.remove()
        with ContainerNetwork(self.host, container_id) as network:
            network.detach()
        let_expire(container_id)
        run_dir = self.run_dir(container_id)
        if any(os.path.ismount(path) for path in (run_dir / "root", run_dir / "tmpfs-0")):
            # Only a monitor sees mounts there; deleting through them would empty the container's own root.
            raise WrongState(f"{run_dir} is mounted here", hint="this runs in a monitor's mount namespace")
        shutil.rmtree(run_dir, ignore_errors=True)

    def forward_ports(self, spec: ContainerSpec, wire: WireSpec | None = None) -> None:
        """The container has moved away: its published ports lead to it from here for a while. Raises ProgramFailed."""
        if spec.network is not None and wire is not None:
            forward_ports(spec.ports, spec.network, grace_s=wire.grace_s, over=(wire.source, wire.target))
        elif spec.network is not None:
            forward_ports(spec.ports, spec.network)

    def refresh_names(self, spec: ContainerSpec, *, gone: bool = False) -> None:
        """The containers of its user-defined network know its name, or no more."""
        if spec.network is not None and spec.network.name:
            refresh_names(self.list(all_states=False), spec.network.name, [spec.name] if gone else ())

    def _must_run(self, container: Container) -> None:
        if container.state.status not in (Status.RUNNING, Status.PAUSED):
            raise WrongState(f"container {container.name} is {container.state.status}")

    def _note_user_stop(self, container: Container) -> None:
        if container.spec.restart.name != "no":  # else nothing would start it
            self.store.write_state(container.id, dataclasses.replace(container.state, stopped_by_user=True))

    def _wait_gone(self, container: Container, timeout_s: float) -> bool:
        """Until the first process is gone and its monitor has recorded the exit."""
        deadline = time.monotonic() + timeout_s
        state = container.state
        while time.monotonic() < deadline:
            init_alive = process_start_ticks(state.init_pid) == state.init_start_ticks
            monitor_alive = process_start_ticks(state.monitor_pid) == state.monitor_start_ticks
            if not init_alive and not monitor_alive:
                return True
            time.sleep(POLL_S)
        return False


def running_state(init_pid: int, monitor_pid: int, *, restarts: int = 0, started_at: str = "") -> ContainerState:
    """The state of a container that has just come up with these processes."""
    return ContainerState(
        status=Status.RUNNING,
        init_pid=init_pid,
        init_start_ticks=process_start_ticks(init_pid) or 0,
        monitor_pid=monitor_pid,
        monitor_start_ticks=process_start_ticks(monitor_pid) or 0,
        started_at=started_at or utc_now(),
        restarts=restarts,
    )


def open_tree_roots(containers: Containers, container: Container, undo: ExitStack) -> list[int]:
    """Descriptors of what is the container's own: upper layer, /dev/shm, other tmpfs mounts; closed by ``undo``.

    Opened as the container sees them, and not through a path that its symbolic links could lead elsewhere.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    roots = [os.open(containers.store.directory(container.id) / "upper", flags)]
    undo.callback(os.close, roots[0])
    inside = os.open(f"/proc/{container.state.init_pid}/root", flags)
    undo.callback(os.close, inside)
    for point in ("/dev/shm", *container.spec.tmpfs):
        roots.append(open_in_root(inside, point, flags))
        undo.callback(os.close, roots[-1])
    return roots


def utc_now() -> str:
    """RFC 3339 in UTC with milliseconds."""
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


__all__ = ["Containers", "NotFound", "ProcessInfo", "RuntimeFault", "running_state", "utc_now"]
