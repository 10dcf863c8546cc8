"""A probe beside a move: what a client on the source sees of it, as a process of its own."""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.address import host_address
from runtime.api import Container
from runtime.errors import BadInput, WrongState
from runtime.linux.tcp_table import TcpTable
from runtime.network import in_network_namespace

START_TIMEOUT_S = 10.0
SETTLE_S = 0.3
"""After the move: what was in the way of answers shows within this time."""
END_TIMEOUT_S = 40.0
_ADDRESS = re.compile(
    r"(?:(?P<kind>tcp|udp|http|redis|echo)://)?(?P<where>(?:\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):\d{1,5})(?P<path>/\S*)?"
)


def probe_words(asked: str, container: Container) -> list[str]:
    """The arguments of ``migrate.probe``. Raises BadInput, and WrongState for ``auto`` where nothing listens."""
    if asked == "auto":
        return ["tcp", _first_listener(container)]
    match = _ADDRESS.fullmatch(asked)
    if match is None or (match["path"] and match["kind"] != "http") or int(match["where"].rpartition(":")[2]) > 65535:
        hint = "[tcp://|udp://|http://|redis://|echo://]HOST:PORT, a path for http only, or auto"
        raise BadInput(f"--probe {asked!r} is no address of a service", hint=hint)
    return [match["kind"] or "tcp", match["where"], *(["--path", match["path"]] if match["path"] else [])]


def _first_listener(container: Container) -> str:
    """The lowest TCP port on which the container listens for others. UDP sockets do not tell whether they answer."""
    network = container.spec.network
    ports: set[int] = set()
    # A container that has just ended listens nowhere.
    with contextlib.suppress(FileNotFoundError), in_network_namespace(container.state.init_pid, TcpTable) as table:
        ports = {listener.port for listener in table.listeners() if not listener.loopback}
    if network is None or not ports:
        raise WrongState(
            f"--probe auto: container {container.name} listens on no TCP port",
            hint="give an address: --probe HOST:PORT",
        )
    return f"{host_address(network)}:{min(ports)}"


class Probing:
    """A running probe; it is connected when this is made. Use as context manager."""

    def __init__(self, words: list[str]) -> None:
        """Raises WrongState when the service does not answer."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "migrate.probe", *words, "--announce"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        try:
            connected = bool(self._line(START_TIMEOUT_S))
        except BaseException:
            self._end()
            raise
        if not connected:
            why = self._end().strip() or "nothing answers"
            hint = "see whether it answers: cmigrate probe"
            raise WrongState(f"--probe {words[0]}://{words[1]}: {why}", hint=hint)

    def finish(self) -> dict[str, Any]:
        """What it saw in all, once things have settled."""
        time.sleep(SETTLE_S)
        self._process.send_signal(signal.SIGTERM)
        return json.loads(self._line(END_TIMEOUT_S) or "{}") or {"downtime_ms": None, "failed": 0, "resets": 0}

    def _line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        return self._process.stdout.readline() if ready else ""

    def _end(self) -> str:
        """What it said on stderr."""
        self._process.kill()
        return self._process.communicate()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
