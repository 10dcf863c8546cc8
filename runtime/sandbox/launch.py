"""The launching side of a monitor: starts it, hands it its orders, and follows the dialogue to "started"."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.api import ContainerSpec
from runtime.errors import ProgramFailed, RuntimeFault, WrongState
from runtime.host import HostConfig
from runtime.linux.seqpacket import receive

MONITOR = Path(__file__).with_name("monitor.py")
LAUNCH_TIMEOUT_S = 30.0
MAX_MESSAGE_BYTES = 1 << 20


class LaunchFailed(RuntimeFault):
    """The first process did not come up; ``exit_code`` is 125, 126 or 127 as docker has them."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class SandboxOrders:
    """What a monitor needs to know. ``seccomp`` is a BPF program, empty for none."""

    spec: ContainerSpec
    directory: Path
    run_dir: Path
    cgroup_paths: tuple[Path, ...]
    capabilities: tuple[int, ...] = ()
    seccomp: bytes = b""
    criu_argv: tuple[str, ...] = ()
    criu_environment: tuple[tuple[str, str], ...] = ()

    def to_message(self, mode: str) -> dict[str, Any]:
        return {
            "mode": mode,
            "spec": self.spec.to_json(),
            "directory": str(self.directory),
            "run_dir": str(self.run_dir),
            "cgroup_paths": [str(path) for path in self.cgroup_paths],
            "capabilities": list(self.capabilities),
            "seccomp": base64.b64encode(self.seccomp).decode(),
            "with_init": self.spec.init,
            "criu_argv": list(self.criu_argv),
            "criu_environment": dict(self.criu_environment),
            "criu_output": str(self.run_dir / "criu-output.log"),
            "python": sys.executable,
            "environment": {key: value for key, value in os.environ.items() if key in KEPT_ENVIRONMENT},
        }


# The monitor's aftermath needs to find this host's settings and little else.
KEPT_ENVIRONMENT = ("PATH", "CMIGRATE_CONFIG", "CMIGRATE_CRIU", "LANG", "PYTHONDONTWRITEBYTECODE")


class MonitorLaunch:
    """One monitor on its way up. Leaving the ``with`` block before ``started`` makes it undo everything."""

    def __init__(self, orders: SandboxOrders, mode: str, pass_fds: Sequence[int] = ()) -> None:
        orders.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(LAUNCH_TIMEOUT_S)
        output = os.open(orders.run_dir / "monitor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._output = orders.run_dir / "monitor.log"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(MONITOR), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )
        finally:
            os.close(output)
            theirs.close()
        message = json.dumps(orders.to_message(mode)).encode()
        socket.send_fds(self._control, [message], list(pass_fds))
        self._started = False

    def __enter__(self) -> MonitorLaunch:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._control.close()
        if self._started:
            # It lives on; whoever waits for children of this process must not trip over it.
            self.process.returncode = 0
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LAUNCH_TIMEOUT_S)

    def expect(self, event: str) -> dict[str, Any]:
        """The monitor's next message, which must be ``event``; raises LaunchFailed with its reason otherwise."""
        try:
            data, _descriptors = receive(self._control, MAX_MESSAGE_BYTES)
        except TimeoutError:
            raise ProgramFailed("the container's monitor does not answer", hint=f"see {self._output}") from None
        if not data:
            raise ProgramFailed(f"the container's monitor ended early: {self._tail()}")
        message: dict[str, Any] = json.loads(data)
        if message["event"] == "failed":
            raise LaunchFailed(message["what"], message["exit_code"])
        if message["event"] != event:
            raise ProgramFailed(f"the container's monitor said {message['event']!r} instead of {event!r}")
        self._started = event == "started"
        return message

    def tell(self, op: str, **details: Any) -> None:
        self._control.send(json.dumps({"op": op, **details}).encode())

    def _tail(self) -> str:
        with contextlib.suppress(OSError):
            return self._output.read_text(errors="replace")[-500:].strip()
        return ""


def ask_monitor(
    host: HostConfig, container_id: str, op: str, *, timeout_s: float | None = 5.0, **details: Any
) -> dict[str, Any]:
    """One request to a running container's monitor (service.py lists them). Raises WrongState when there is none."""
    path = host.run_dir / container_id / "monitor.sock"
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.send(json.dumps({"op": op, **details}).encode())
            data = connection.recv(MAX_MESSAGE_BYTES)
        except TimeoutError:
            raise ProgramFailed(
                f"the monitor of {container_id} does not answer", hint="is the host overloaded?"
            ) from None
        except OSError as error:
            raise WrongState(
                f"container {container_id} has no monitor ({error.strerror})", hint="is it running?"
            ) from error
    if not data:
        raise WrongState(f"the monitor of {container_id} went away", hint=f"deadline {deadline}")
    answer: dict[str, Any] = json.loads(data)
    return answer
