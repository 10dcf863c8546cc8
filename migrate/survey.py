"""Measures what a prediction needs: the link, the container's memory, and how fast it is written.

Takes a tenth of a second while the container runs, and leaves nothing behind in it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from migrate.costs import fit_curve
from migrate.errors import ProtocolViolation
from migrate.plan import MoveFacts
from migrate.rounds import Gauges, sample_dirtying
from migrate.session import Asked
from runtime.api import Container
from runtime.cgroup import ContainerCgroup
from runtime.container import Containers
from runtime.facts import size_of_tree
from runtime.linux.procfs import parse_memory_stat
from runtime.memory.api import DirtyTracker
from runtime.memory.tracker import make_tracker
from transport.api import Channel, Deadline, Frame, FrameKind

# First little, for slow links; then enough to fill the buffers on the way of a fast one.
PROBE_BYTES = (256 << 10, 16 << 20)
PROBE_FRAME_BYTES = 1 << 20
# A probe that took so long has measured the link; a larger one would only take longer.
LONG_ENOUGH_S = 0.02
MAX_PROBE_BYTES = 256 << 20
PROBE_TIMEOUT_S = 30.0
LOOK_AT_FILES_S = 0.1


def measure_rate_Bps(channel: Channel, most_bytes: int = PROBE_BYTES[-1]) -> float:
    """Bytes a second that the target takes in, with everything that costs on the way. Sends the first probe and no more
    than ``most_bytes`` in the other."""
    deadline = Deadline.after(PROBE_TIMEOUT_S)
    # No link's compression is to make it look faster than it is.
    block = os.urandom(PROBE_FRAME_BYTES)
    rate = 0.0
    for size in (PROBE_BYTES[0], *(min(size, most_bytes) for size in PROBE_BYTES[1:] if most_bytes > PROBE_BYTES[0])):
        begin = time.monotonic()
        channel.send(Frame.control({"type": "measure", "bytes": size}), deadline=deadline)
        for offset in range(0, size, PROBE_FRAME_BYTES):
            channel.send_data(0, (memoryview(block)[: size - offset],), deadline=deadline)
        answer = channel.receive(deadline=deadline).message()
        if answer.get("type") != "measured":
            raise ProtocolViolation("the peer did not answer a measurement")
        took_s = max(time.monotonic() - begin, 1e-6)
        rate = size / took_s
        if took_s > LONG_ENOUGH_S:
            break
    return rate


def answer_measure(asked: Asked, message: Mapping[str, Any]) -> None:
    """Handler of "measure": takes in that many bytes of data, and says so."""
    left = message.get("bytes")
    if not isinstance(left, int) or not 0 < left <= MAX_PROBE_BYTES:
        raise ProtocolViolation("measure does not fit")
    buffer = memoryview(bytearray(PROBE_FRAME_BYTES))

    def place(_tag: int, length: int) -> memoryview | None:
        return buffer[:length] if length <= len(buffer) else None

    deadline = Deadline.after(PROBE_TIMEOUT_S)
    while left > 0:
        frame = asked.channel.receive(deadline=deadline, into=place)
        if frame.kind is not FrameKind.DATA or not len(frame.body):
            raise ProtocolViolation("data was announced and did not come")
        left -= len(frame.body)
    asked.answer({"type": "measured"})


@dataclass(kw_only=True)
class _Watched:
    """migrate.rounds.Copier without the copying: only what scans find."""

    tracker: DirtyTracker
    pids: Callable[[], list[int]]
    dirty_bytes: int = 0
    hot_bytes: int = 0
    pending_bytes: int = 0

    def scan(self) -> None:
        processes = self.tracker.scan(self.pids()).processes
        self.dirty_bytes = sum(process.to_copy.bytes for process in processes)
        self.pending_bytes = max(self.pending_bytes, self.dirty_bytes)

    def send(self, *, defer_hot: bool = False) -> int:
        raise NotImplementedError("a survey sends nothing")


def survey(containers: Containers, container: Container, channel: Channel) -> MoveFacts:
    """The facts of this container and the link to the target."""
    cgroup = containers.cgroup(container.id)
    gauges = Gauges(page_wire_bytes=lambda: 0, cpu_s=lambda: None)
    tracker = make_tracker()
    try:
        watched = _Watched(tracker=tracker, pids=cgroup.pids)
        samples = sample_dirtying(watched, gauges)
    finally:
        tracker.close()
    return MoveFacts(
        memory_bytes=watched.pending_bytes,
        shared_bytes=_shared_bytes(cgroup),
        files_bytes=size_of_tree(containers.store.directory(container.id) / "upper", LOOK_AT_FILES_S)[0],
        rate_Bps=measure_rate_Bps(channel),
        curve=fit_curve(samples),
    )


def _shared_bytes(cgroup: ContainerCgroup) -> int:
    for path in cgroup.paths():
        with contextlib.suppress(OSError):
            charged = parse_memory_stat((path / "memory.stat").read_text())
            if charged is not None:
                return charged
    return 0
