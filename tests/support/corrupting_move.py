"""A move over a link that changes memory on its way, run on a host of the lab.

    python3 -m tests.support.corrupting_move CONTAINER TARGET MODE (before|after)

The first byte of each page of private memory that goes over before, or after, COMMIT arrives changed. Ends with the
exit code of `cmigrate move --verify`, and writes the report's JSON.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from migrate.errors import exit_code_for
from migrate.links import Session, connect
from migrate.messages import Commit
from migrate.observe import Event, MoveEnded
from migrate.wiring import MoveOptions, move
from runtime.host import load_host_config
from transport.api import Buffer, Channel, Deadline, Frame, FrameKind
from transport.delegating import DelegatingChannel

PAGE_BYTES = 4096


class CorruptingChannel(DelegatingChannel):
    """``inner``, but for pages that a ``memory`` message announces."""

    def __init__(self, inner: Channel, *, after_commit: bool) -> None:
        super().__init__(inner)
        self._after_commit = after_commit
        self._committed = False
        self._announced = False

    def send(self, frame: Frame, *, deadline: Deadline) -> None:
        if frame.kind is FrameKind.CONTROL:
            kind = frame.message()["type"]
            self._committed = self._committed or kind == Commit.TYPE
            self._announced = kind == "memory"
        super().send(frame, deadline=deadline)

    def send_data(self, tag: int, buffers: Sequence[Buffer], *, deadline: Deadline) -> None:
        if self._announced and self._committed == self._after_commit:
            changed = bytearray(b"".join(bytes(buffer) for buffer in buffers))
            for page in range(0, len(changed), PAGE_BYTES):
                changed[page] ^= 1
            buffers = [changed]
        super().send_data(tag, buffers, deadline=deadline)


class _Keeping:
    def on_event(self, event: Event) -> None:
        if isinstance(event, MoveEnded):
            print(json.dumps(event.report.to_json()))


def main(container: str, target: str, mode: Any, when: str) -> int:
    def connecting(*arguments: Any, **options: Any) -> Session:
        session = connect(*arguments, **options)
        return replace(session, channel=CorruptingChannel(session.channel, after_commit=when == "after"))

    options = MoveOptions(mode=mode, transport="stream", allow_postcopy=True, verify=True, compress="none")
    try:
        move(load_host_config(), container, target, options, _Keeping(), connecting)
    except Exception as error:
        print(error, file=sys.stderr)
        return exit_code_for(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
