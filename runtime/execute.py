"""``cmigrate exec``: one more program inside a running container, its input and output carried through pipes.

The program never holds a descriptor of the caller's terminal or files: those could not be dumped with the container.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.api import ContainerSpec, Status
from runtime.container import Containers
from runtime.errors import WrongState
from runtime.seccomp import capability_set, default_profile

ENTER = Path(__file__).parent / "sandbox" / "enter.py"
CHUNK_BYTES = 1 << 16


def execute(
    containers: Containers,
    reference: str,
    argv: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str = "",
    user: str = "",
    interactive: bool = False,
    detach: bool = False,
) -> int:
    """Run ``argv`` and wait for it; its exit code, or 125-127 as docker has them. With ``detach`` 0 at once.

    ``interactive`` passes this process's stdin on. Raises WrongState for a container that does not run.
    """
    process = start(containers, reference, argv, env=env, cwd=cwd, user=user, interactive=interactive, detach=detach)
    try:
        if not detach:
            _carry(process, interactive)
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def start(
    containers: Containers,
    reference: str,
    argv: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str = "",
    user: str = "",
    interactive: bool = False,
    detach: bool = False,
    timeout_s: float | None = None,
) -> subprocess.Popen[bytes]:
    """The process that ends as ``argv`` ends in the container; its pipes are the program's, without ``detach``.

    After ``timeout_s`` the program is killed where it is. Raises WrongState for a container that does not run.
    """
    container = containers.get(reference)
    if container.state.status != Status.RUNNING:
        raise WrongState(f"container {container.name} is {container.state.status}", hint="it must run for this")
    waiters = containers.run_dir(container.id) / "waiters"
    waiters.mkdir(exist_ok=True)
    orders = _orders(containers, container.spec, container.state.init_pid, waiters, argv, env, cwd, user, detach)
    orders["timeout_s"] = timeout_s
    reader, writer = os.pipe()
    pipe = subprocess.DEVNULL if detach else subprocess.PIPE
    # Without input a pipe that has ended: this host's /dev/null could not be dumped with the container.
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(ENTER), str(reader)],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            pass_fds=(reader,),
            env={"PATH": os.defpath},
        )
    finally:
        os.close(reader)
    if process.stdin is not None and not interactive:
        process.stdin.close()
    with open(writer, "wb") as file:
        file.write(json.dumps(orders).encode())
    return process


def _orders(
    containers: Containers,
    spec: ContainerSpec,
    init_pid: int,
    waiters: Path,
    argv: Sequence[str],
    env: Sequence[str],
    cwd: str,
    user: str,
    detach: bool,
) -> dict[str, Any]:
    data = spec.to_json()
    data |= {"argv": list(argv), "env": [*spec.env, *env], "cwd": cwd or spec.cwd, "user": user or spec.user}
    confined = spec.seccomp == "default"
    return {
        "spec": data,
        "init_pid": init_pid,
        "waiters": str(waiters),
        "detach": detach,
        "cgroup_paths": [str(path) for path in containers.cgroup(spec.id).paths()],
        "capabilities": sorted(capability_set(spec.cap_add, spec.cap_drop)),
        "seccomp": base64.b64encode(default_profile(frozenset(spec.cap_add)) if confined else b"").decode(),
        "with_init": False,
    }


def _carry(process: subprocess.Popen[bytes], interactive: bool) -> None:
    """Between our stdio and the program's pipes until both of its outputs have ended."""
    assert process.stdout is not None
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, 1)
        selector.register(process.stderr, selectors.EVENT_READ, 2)
        open_outputs = 2
        if interactive:
            # A regular file can not be polled: it is read in one go.
            try:
                selector.register(0, selectors.EVENT_READ, 0)
            except PermissionError:
                _feed_file(process)
        while open_outputs:
            for key, _events in selector.select():
                data = os.read(key.fd, CHUNK_BYTES)
                if key.data == 0:
                    if not _feed(process, data):
                        selector.unregister(0)
                elif data:
                    os.write(key.data, data)
                else:
                    selector.unregister(key.fileobj)
                    open_outputs -= 1


def _feed(process: subprocess.Popen[bytes], data: bytes) -> bool:
    """Pass input on; False when that was the end of it."""
    assert process.stdin is not None
    try:
        if data:
            process.stdin.write(data)
            process.stdin.flush()
            return True
        process.stdin.close()
    except BrokenPipeError:
        pass
    return False


def _feed_file(process: subprocess.Popen[bytes]) -> None:
    while _feed(process, os.read(0, CHUNK_BYTES)):
        pass
