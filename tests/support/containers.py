"""Containers of a host that exists for one test only, started by the test's own process."""

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.container import Containers
from runtime.host import HostConfig

MONITORS_END_S = 10.0


@contextmanager
def one_host(bridge: str, **fields: Any) -> Iterator[Containers]:
    """A host with its own run directory, state on a disk, cgroup parent and ``bridge``; all of it goes at the end."""
    name = f"cmigrate-test-{secrets.token_hex(3)}"
    run_dir = Path("/run") / name
    run_dir.mkdir()
    others = _children()
    # An overlay's upper layer can not lie on an overlay, which /tmp may be.
    with tempfile.TemporaryDirectory(dir="/var/lib/cmigrate") as state:
        host = HostConfig(
            name="here", state_dir=Path(state), run_dir=run_dir, cgroup_parent=name, bridge=bridge, **fields
        )
        found = Containers(host)
        try:
            yield found
        finally:
            for container in found.list():
                found.remove(container.id, force=True)
            _reap(others)
            subprocess.run(["ip", "link", "delete", bridge], capture_output=True, timeout=10, check=False)
            subprocess.run(["nft", "delete", "table", "ip", "cmigrate"], capture_output=True, timeout=10, check=False)
            shutil.rmtree(run_dir)


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update(map(int, (task / "children").read_text().split()))
    return found


def _reap(others: set[int]) -> None:
    """Monitors are children of the process that started them: here, of this one. Fixtures may have other children."""
    deadline = time.monotonic() + MONITORS_END_S
    while monitors := _children() - others:
        for pid in monitors:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        assert time.monotonic() < deadline, f"still there: {monitors}"
        time.sleep(0.01)
