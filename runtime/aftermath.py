"""What is done after a container has ended: ``python -m runtime.aftermath ID``, started by its monitor.

Clean up what it left in the kernel; then remove it (--rm), or start it again as its restart policy says.
"""

from __future__ import annotations

import contextlib
import sys
import time

from runtime.api import Container, Status
from runtime.container import Containers
from runtime.errors import NotFound, RuntimeFault
from runtime.host import load_host_config

# docker's back-off: 100 ms doubled each time, at most a minute.
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 60.0
# A foreground `cmigrate run --rm` shows the rest of the log first; its reader may be slow.
ATTACHED_WAIT_S = 60.0


def restart_delay_s(container: Container) -> float | None:
    """Seconds until it should start again; None when it should not."""
    policy, state = container.spec.restart, container.state
    if policy.name == "no" or state.status != Status.EXITED:
        return None
    if state.stopped_by_user:
        return None
    used_up = policy.max_retries is not None and state.restarts >= policy.max_retries
    if policy.name == "on-failure" and (state.exit_code == 0 or used_up):
        return None
    return float(min(FIRST_DELAY_S * 2 ** min(state.restarts, 20), MAX_DELAY_S))


def main(container_id: str) -> int:
    containers = Containers(load_host_config())
    with contextlib.suppress(NotFound):
        with containers.locked(container_id, "aftermath", wait_s=60.0) as container:
            if container.state.status != Status.EXITED:
                return 0
            containers.clean_up(container.id)
            if container.spec.auto_remove:
                containers.wait_until_unattached(container.id, ATTACHED_WAIT_S)
                containers.store.remove(container.id)
                return 0
        delay = restart_delay_s(container)
        if delay is not None:
            time.sleep(delay)
            if containers.get(container.id).state == container.state:
                with contextlib.suppress(RuntimeFault):
                    containers.start(container.id, restarts=container.state.restarts + 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
