"""The source's way back to a container that runs on the target and lacks memory, when the link breaks after the switch.

The frozen tasks have that memory for as long as the mover lives. The target keeps its faults waiting and knows what has
arrived, so it says what is missing, and the fill goes on there. Nothing is decided here: a target that has given up
says what became of the container, and one that can not be reached leaves the move where it always was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from migrate import messages
from migrate.errors import ContainerLost
from migrate.missing import hear_missing
from migrate.outgoing import Outgoing
from migrate.reconnect import Line
from runtime.memory.ranges import PageRanges
from transport.api import Deadline, Frame, TransportError


def mend_links(out: Outgoing, line: Line, prepared: messages.Prepared, move_id: str, epoch: int) -> None:
    """Let ``out`` bring back the link of this move where it breaks, as far as the target goes along."""
    out.mend = line.mending(prepared.resume, move_id, epoch)
    out.refill = Refill(line, move_id, epoch).go_on if prepared.refill and line.limit_s else None


@dataclass(frozen=True, kw_only=True)
class _Standing:
    missing: dict[int, PageRanges] | None
    """None: it runs there and needs nothing more."""


class Refill:
    """Of one move."""

    def __init__(self, line: Line, move_id: str, epoch: int) -> None:
        self._line = line
        self._move_id = move_id
        self._epoch = epoch

    def go_on(self, error: TransportError, kept: Mapping[int, PageRanges]) -> dict[int, PageRanges] | None:
        """Bring the link back after ``error``: what the target lacks of ``kept``. None, and no link, when it has all.

        Raises ChannelClosed when the link does not come back in time, ContainerLost, MoveRefused where it never ran
        there and never will, or what is wrong with what the target answers.
        """
        found = self._line.bring_back(error, lambda until: self._ask(until, error, kept))
        if found.missing is None:
            # Who answered knows nothing of this move: what is still to be said would not be heard.
            self._line.channel.cut()
        return found.missing

    def _ask(self, until: Deadline, error: TransportError, kept: Mapping[int, PageRanges]) -> _Standing | None:
        """None where the answer is no answer yet: a release that is under way, or an error."""
        channel = self._line.channel
        question = messages.Resume(move_id=self._move_id, epoch=self._epoch)
        channel.send(Frame.control(question.to_message()), deadline=until)
        message = channel.receive(deadline=until).message()
        if message.get("type") == messages.Resumed.TYPE:
            total_bytes = messages.Resumed.parse(message).missing_bytes
            return _Standing(missing=hear_missing(lambda: channel.receive(deadline=until).message(), total_bytes, kept))
        if message.get("type") == messages.Refused.TYPE:
            refused = messages.Refused.parse(message)
            if (refused.move_id, refused.epoch) == (self._move_id, self._epoch):
                raise refused.as_error()
        if message.get("type") == messages.Answer.TYPE:
            answer = messages.Answer.parse(message)
            if (answer.move_id, answer.epoch) == (self._move_id, self._epoch):
                if answer.state == "lost":
                    raise ContainerLost.because(error)
                if answer.state == "running":
                    return _Standing(missing=None)
        return None
