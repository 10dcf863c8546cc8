"""A container that runs elsewhere and whose frozen processes are kept here, in case it is to come back.

Its memory, its files and its address here are those of the freeze; nothing of it runs and its link leads nowhere. Only
the freezer holds it: CRIU has let go.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from runtime.api import Container, Status
from runtime.connections import ConnectionCloser
from runtime.container import KILL_WAIT_S, Containers
from runtime.criu.dump import wake_after_dead_dump
from runtime.errors import Busy, MissingFeature, RuntimeFault, WrongState
from runtime.network import ContainerNetwork
from runtime.networks import host_for
from runtime.ports import refuse_taken_ports
from runtime.sandbox.launch import ask_monitor
from runtime.store import process_start_ticks
from runtime.wire import WireSpec


def keep(
    containers: Containers,
    container: Container,
    *,
    moved_to: str,
    move_id: str,
    until: str,
    after_s: float,
    argv: Sequence[str],
) -> None:
    """It is frozen, and runs on ``moved_to`` now, by this move. Its monitor starts ``argv`` after ``after_s`` seconds,
    unless that is 0. Raises RuntimeFault."""
    # Before anything else: its end here, whoever brings it about, is no exit that a restart policy answers.
    ask_monitor(containers.host, container.id, "release")
    state = dataclasses.replace(
        container.state, status=Status.KEPT, moved_to=moved_to, kept_until=until, kept_for=move_id
    )
    containers.store.write_state(container.id, state)
    if after_s:
        ask_monitor(containers.host, container.id, "alarm", after_s=after_s, argv=list(argv))


def lead_ports_away(containers: Containers, container: Container, wire: WireSpec | None = None) -> None:
    """What it publishes leads to the other host, for a while, and not into the frozen copy. Raises ProgramFailed."""
    spec = container.spec
    if spec.network is not None and spec.ports:
        with ContainerNetwork(host_for(containers.host, spec.network), container.id) as network:
            network.unpublish()
    containers.forward_ports(spec, wire)


def lives(container: Container) -> bool:
    """Whether its first process does: a reboot, or the kernel in want of memory, may have ended it."""
    state = container.state
    return bool(state.init_pid) and process_start_ticks(state.init_pid) == state.init_start_ticks


def is_whole(containers: Containers, container: Container) -> bool:
    """Whether it is a frozen copy that can still run."""
    return container.state.status is Status.KEPT and lives(container) and containers.cgroup(container.id).frozen()


def must_be_able_to_run(containers: Containers, container: Container) -> None:
    """Raises WrongState where the copy is not whole, or a port that it publishes has been taken meanwhile; NoRoom or
    OSError where that it runs could not be written down."""
    if not is_whole(containers, container):
        raise WrongState(
            f"the copy of {container.name} here is gone: its processes were killed",
            hint=f"it runs on {container.state.moved_to}; move it back from there as it is now",
        )
    containers.store.write_state(container.id, container.state)
    if container.spec.ports:
        others = [other.spec for other in containers.list(all_states=False) if other.id != container.id]
        refuse_taken_ports(container.spec, others)


def run_again(containers: Containers, container: Container) -> None:
    """A kept container runs on here from where it was frozen. Nothing of it may run elsewhere any more. Idempotent.

    Its connections to the outside are ended first, while nobody can hear it: their peers have gone on with the other
    copy, and the numbers of these would be taken for something else. Its programs see them as aborted.
    """
    running = dataclasses.replace(container.state, status=Status.RUNNING, moved_to="", kept_until="", kept_for="")
    container = dataclasses.replace(container, state=running)
    if containers.cgroup(container.id).frozen():
        end_connections(containers, container)
        ask_monitor(containers.host, container.id, "alarm")
        ask_monitor(containers.host, container.id, "keep")
    network = container.spec.network
    if network is not None and container.spec.ports:
        with ContainerNetwork(host_for(containers.host, network), container.id) as link:
            link.publish(container.spec.ports, network)
    wake_after_dead_dump(containers, container)
    # Last, so that who finds it cut short knows that it is to be done again.
    containers.store.write_state(container.id, running)
    containers.refresh_names(container.spec)


def end_for_good(containers: Containers, container: Container) -> None:
    """Of a container that runs, or ran, here: its peers hear that their connections end, and it is killed. No exit is
    recorded, and no restart policy follows. Idempotent. Raises Busy where a process does not end."""
    cgroup = containers.cgroup(container.id)
    with contextlib.suppress(RuntimeFault, OSError):  # it has no monitor any more
        ask_monitor(containers.host, container.id, "release")
    with contextlib.suppress(RuntimeFault, OSError):
        cgroup.freeze()
        end_connections(containers, container)
    cgroup.kill()
    if not cgroup.wait_empty(KILL_WAIT_S):
        raise Busy(f"container {container.name} does not end", hint="a process hangs in the kernel: see dmesg")


def end_connections(containers: Containers, container: Container) -> None:
    """All but those inside, of a container whose processes stand still. A kernel that can not is no reason to fail."""
    if container.spec.network is None:
        return
    with (
        contextlib.suppress(MissingFeature, OSError),
        contextlib.closing(ConnectionCloser(containers.host, container, "close")) as closer,
    ):
        closer.close_lost()
