"""The caller's side of a tracer (tracer_main.py): a process of its own, so that nobody's death harms a traced one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from runtime.linux.seqpacket import receive
from runtime.memory.place import NotInjected
from runtime.memory.remote import Injected, LeftBehind
from runtime.memory.tracer_main import MAX_MESSAGE_BYTES

PROGRAM = Path(__file__).with_name("tracer_main.py")
# It starts in a tenth of a second, and a thread that it has in hand is not waited for longer than ten seconds.
ANSWER_TIMEOUT_S = 30.0
END_TIMEOUT_S = 15.0


class TracerProcess:
    """Started when this is made, and again after it had to end. For one caller at a time; ``close`` it."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def make_userfaultfd(self, pid: int) -> Injected:
        """As runtime.memory.remote. Raises NotInjected."""
        answer, descriptors = self._ask({"op": "open", "pid": pid})
        if len(descriptors) != 1:
            raise NotInjected("the tracer brought no descriptor")
        return Injected(descriptor=descriptors[0], stop_ms=answer["stop_ms"])

    def close_descriptor(self, pid: int, descriptor: int) -> None:
        """As runtime.memory.remote. Raises NotInjected."""
        self._ask({"op": "close", "pid": pid, "descriptor": descriptor})

    def close(self) -> None:
        """It ends, once it has done what it is at. Idempotent; the next call starts another."""
        self._hang_up()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT_S)

    def _start(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(PROGRAM), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
                env={"PATH": os.defpath},
            )
        ours.settimeout(ANSWER_TIMEOUT_S)
        self._control = ours
        return ours

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        control = self._start()
        try:
            control.send(json.dumps(request).encode())
            data, descriptors = receive(control, MAX_MESSAGE_BYTES, 1)
        except OSError as error:
            self._hang_up()
            raise NotInjected(f"the tracer does not answer: {error}") from error
        except BaseException:
            # Interrupted: the answer would be taken for that to the next question.
            self._hang_up()
            raise
        if not data:
            self.close()
            raise NotInjected("the tracer has died")
        answer: dict[str, Any] = json.loads(data)
        if "stuck" in answer:
            self.close()
        if "left" in answer:
            left = LeftBehind(answer["left"])
            left.ours = descriptors[0] if descriptors else None
            raise left
        if "failed" in answer:
            raise NotInjected(answer["failed"])
        return answer, descriptors

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
