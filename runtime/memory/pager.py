"""The caller's side of a pager (pager_main.py): start it before the blackout, hand it stores, and see it through."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import ProgramFailed, RuntimeFault
from runtime.linux.seqpacket import receive
from runtime.memory.store import Store

PROGRAM = Path(__file__).with_name("pager_main.py")
START_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 1 << 16
# Of one message about arrivals, each at most 20 digits.
_RUN_NUMBERS = 2000


class PagerDied(RuntimeFault):
    """The pager died before all memory was filled; the container has been killed."""


@dataclass(frozen=True, kw_only=True)
class PagerReport:
    """What a pager did. ``complete_ms``: from the end of the restore until all memory was there; 0 when it is not yet.

    ``faults`` are page faults somebody waited for, ``zero_faults`` those of them for pages that never existed,
    ``remote_faults`` pages that had not arrived yet when somebody wanted them. ``longest_wait_ms`` is of one fault.
    """

    faults: int
    remote_faults: int
    longest_wait_ms: float
    zero_faults: int
    fault_bytes: int
    filled_bytes: int
    forks: int
    moves: int
    removals: int
    tasks_left: int
    complete_ms: float


class Pager:
    """One container's pager. It ends by itself when all memory is filled, also when this object has gone."""

    def __init__(
        self, cgroups: Sequence[Path], *, record: Path | None = None, output: int = subprocess.DEVNULL
    ) -> None:
        """Start it. ``cgroups`` are the directories of the container's that are killed should the pager die (those must
        exist); ``record`` is a file where that is noted, as JSON with ``what``. Raises ProgramFailed."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_TIMEOUT_S)
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", str(PROGRAM), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                timeout=START_TIMEOUT_S,
                check=False,
                cwd="/",
                env={"PATH": os.defpath},
            )
        finally:
            theirs.close()
        if done.returncode:
            self._control.close()
            raise ProgramFailed(f"the pager does not start (exit code {done.returncode})")
        self._report: PagerReport | None = None
        self._ended = False
        try:
            self._tell("guard", cgroups=[str(path) for path in cgroups], record=str(record or ""))
            self.pid = int(self._expect("ready", START_TIMEOUT_S)["pid"])
            """Of the process that fills; its parent is the guard. Neither is a child of this process."""
        except BaseException:
            self.abandon()
            raise

    def fileno(self) -> int:
        """Readable when the pager has something to say, which ``wait`` then returns without waiting."""
        return self._control.fileno()

    def add_space(
        self,
        vpid: int,
        store: Store,
        spans: Iterable[tuple[int, int]],
        hot: Iterable[tuple[int, int]] = (),
        remote: Iterable[tuple[int, int]] = (),
    ) -> None:
        """The memory of the task with this pid in the images: (start, end) of each mapping CRIU leaves to the pager.

        ``hot`` are filled first, in this order. The pager consumes the store; the caller may close its own end.
        ``remote``, ascending: what is not in the store yet. The caller brings it, and says ``arrived``.
        """
        spans, hot = list(spans), list(hot)
        plan = os.memfd_create("cmigrate-plan", os.MFD_CLOEXEC)
        with open(plan, "r+b") as file:
            file.write(b"".join(struct.pack("=QQ", start, end) for start, end in (*spans, *hot, *remote)))
            file.flush()
            file.seek(0)
            self._tell("space", [store.fileno(), plan], vpid=vpid, spans=len(spans), hot=len(hot))

    def listen(self, directory: Path) -> None:
        """CRIU's work directory: its socket is there when this returns, and the restore may begin."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._tell("listen", [descriptor])
        finally:
            os.close(descriptor)
        self._expect("listening", ANSWER_TIMEOUT_S)

    def wait_until_told(self) -> None:
        """It knows all spaces when this returns, and no task may come before: CRIU speaks to it on another socket."""
        self._tell("count")
        self._expect("counters", ANSWER_TIMEOUT_S)

    def begin_filling(self) -> None:
        """The restore is held at its end (post-restore), or released: fill what nobody asks for as well.

        Where all memory was asked for already the pager is done; what became of it ``wait`` tells.
        """
        with contextlib.suppress(PagerDied):
            self._tell("fill")

    def arrived(self, vpid: int, runs: Iterable[tuple[int, int]]) -> None:
        """(address, size in bytes) of pages that are in the task's store now. Raises PagerDied."""
        flat = [number for run in runs for number in run]
        for first in range(0, len(flat), _RUN_NUMBERS):
            self._tell("arrived", vpid=vpid, runs=flat[first : first + _RUN_NUMBERS])

    def lose(self, why: str) -> None:
        """Nothing will arrive any more: if anything is missing, the pager dies and the container with it."""
        with contextlib.suppress(PagerDied):
            self._tell("lose", why=why)

    def next_want(self, timeout_s: float) -> tuple[int, int] | None:
        """(pid, address) of a page that has not arrived and that somebody waits for; None when all memory is filled.

        Raises PagerDied, or ProgramFailed when neither happens in time. For one thread, beside others that tell.
        """
        message = self._expect("want", timeout_s)
        return None if self._ended else (int(message["vpid"]), int(message["offset"]))

    def report(self) -> PagerReport:
        """How far it is. Raises PagerDied."""
        if self._report is None and not self._ended:
            with contextlib.suppress(PagerDied):
                self._tell("count")
            self._expect("counters", ANSWER_TIMEOUT_S)
        assert self._report is not None
        return self._report

    def wait(self, timeout_s: float) -> PagerReport:
        """Until all memory is filled. Raises PagerDied, or ProgramFailed when it takes longer."""
        if not self._ended:
            self._expect("filled", timeout_s)
        assert self._report is not None
        return self._report

    def abandon(self) -> None:
        """The restore is given up: end the pager, and nothing is killed. Nothing happens when it has ended.

        Call it before the held restore is discarded: a pager that loses its tasks unexpectedly kills the container.
        """
        with contextlib.suppress(PagerDied, ProgramFailed):
            self._tell("abandon")
            self._expect("nothing", ANSWER_TIMEOUT_S)
        self._control.close()

    def close(self) -> None:
        """Leave the pager to itself: it goes on until it is done."""
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, op: str, descriptors: Sequence[int] = (), **details: Any) -> None:
        try:
            socket.send_fds(self._control, [json.dumps({"op": op, **details}).encode()], list(descriptors))
        except OSError as error:
            raise PagerDied("the pager has ended early") from error

    def _expect(self, event: str, timeout_s: float) -> dict[str, Any]:
        """Read until this event, or the last. What comes before it is news that nobody asked for."""
        self._control.settimeout(timeout_s)
        while True:
            try:
                data, _descriptors = receive(self._control, MAX_MESSAGE_BYTES)
            except TimeoutError:
                raise ProgramFailed(f"the pager did not say {event!r} within {timeout_s:g} s") from None
            except OSError:
                data = b""
            if not data:
                raise PagerDied("the pager ended without a word", hint="was it killed? see dmesg")
            message: dict[str, Any] = json.loads(data)
            said = message.pop("event")
            if said == "died":
                self._ended = True
                raise PagerDied(f"the pager died ({message['what']}) and the container with it")
            if said in ("counters", "filled"):
                self._report = PagerReport(**message)
                self._ended = said == "filled"
            if said == event or self._ended:
                return message
