"""A restored container whose caller was killed around the moment it was let go: what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from runtime.api import Container, ContainerState, Status, state_from_json
from runtime.container import Containers, running_state
from runtime.errors import RuntimeFault
from runtime.network import ContainerNetwork
from runtime.sandbox.launch import ask_monitor
from runtime.store import STATE, read_json

# CRIU and the monitor go on alone, for moments.
SETTLE_S = 5.0
POLL_S = 0.02


def orphan_state(
    containers: Containers,
    container_id: str,
    *,
    started_at: str,
    restarts: int,
    clock: Callable[[], float] = time.monotonic,
) -> ContainerState | None:
    """RUNNING with its processes, or EXITED when nothing of it lives; None when neither is certain in time."""
    deadline = clock() + SETTLE_S
    while True:
        try:
            answer = ask_monitor(containers.host, container_id, "status")
            init_pid, monitor_pid = int(answer["init_pid"]), int(answer["monitor_pid"])
            return running_state(init_pid, monitor_pid, restarts=restarts, started_at=started_at)
        except (RuntimeFault, KeyError):
            if not containers.cgroup(container_id).pids():
                return _recorded_end(containers, container_id, started_at, restarts)
        if clock() > deadline:
            return None
        time.sleep(POLL_S)


def _recorded_end(containers: Containers, container_id: str, started_at: str, restarts: int) -> ContainerState:
    """As its monitor noted it, which may be about to do that, or was killed as well."""
    file = containers.store.directory(container_id) / STATE
    deadline = time.monotonic() + SETTLE_S / 5
    while time.monotonic() < deadline:
        try:
            seen = state_from_json(read_json(file))
        except (RuntimeFault, FileNotFoundError):
            break
        if seen.status is Status.EXITED:
            fields = seen.to_json() | {"started_at": started_at, "restarts": restarts}
            return state_from_json(fields)
        time.sleep(POLL_S)
    return ContainerState(status=Status.EXITED, started_at=started_at, restarts=restarts)


def take_over(containers: Containers, container: Container) -> None:
    """What a caller does around a release, for a container that runs: bridge, announcement, ports. Idempotent.

    Raises RuntimeFault where the network can not be set.
    """
    spec, init_pid = container.spec, container.state.init_pid
    if spec.network is None:
        return
    with ContainerNetwork(containers.host, container.id) as network:
        network.look_up()
        network.connect()
        network.open_inside(init_pid, spec.network)
        network.announce()
        network.publish(spec.ports, spec.network)
