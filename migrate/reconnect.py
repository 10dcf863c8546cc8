"""The source's link of one move: when it breaks before the freeze it is brought back, and the move goes on.

Everything that talks to the target holds one channel, under which the connection is replaced. From the freeze on a
broken link is what it always was: a rollback before COMMIT, a question after it; but where memory follows after the
switch, it is brought back again (refill.py).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from migrate import messages
from migrate.errors import CanNotResume, MigrateError, MoveRefused, PeerFailed, RolledBack, describe
from migrate.links import Session
from migrate.observe import LinkBack, LinkLost, Observer
from runtime.host import HostConfig
from transport.api import AuthenticationFailed, ChannelClosed, Deadline, Frame, ProtocolError, TransportError
from transport.renewable import RenewableChannel

# Of one attempt: to connect and greet, and for the answer to a question.
ATTEMPT_S = 10.0
ANSWER_S = 10.0
# A target answers that it has undone an attempt, or after ten seconds that it is still at it.
UNDO_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S, PAUSE_FACTOR = 0.1, 2.0, 1.7
# As often a move begins again whose target has lost what it had: whatever kills it there would go on doing so.
MOST_BEGINNINGS = 3

T = TypeVar("T")


class Line:
    """One move's session, for as many connections as it takes. ``limit_s`` is for each break; 0: none is mended."""

    def __init__(
        self,
        host: HostConfig,
        session: Session,
        connecting: Callable[..., Session],
        observer: Observer,
        *,
        limit_s: float,
    ) -> None:
        self.channel = RenewableChannel(session.channel)
        self.session = replace(session, channel=self.channel)
        self.limit_s = limit_s
        self._host = host
        self._connecting = connecting
        self._observer = observer
        self.resumed = 0
        """How often the move went on where it was."""
        self.beginnings = 1
        self.broken = False
        """It is, and does not come back."""

    @property
    def patience_s(self) -> float:
        """How long the target is still to be asked on links of their own."""
        return 0.0 if self.broken else self.limit_s

    def mending(self, resumes: bool, move_id: str, epoch: int) -> Callable[[TransportError], int] | None:
        """``resume`` of this move, for a target that ``resumes``."""
        return functools.partial(self.resume, move_id, epoch) if resumes else None

    def resume(self, move_id: str, epoch: int, error: TransportError) -> int:
        """Bring the link back after ``error``, and the target's half of this move: how many bulk messages it has.

        Raises ChannelClosed when the link does not come back in time, CanNotResume when the target has nothing any
        more, AuthenticationFailed, or what is wrong with what it answers.
        """
        question = messages.Resume(move_id=move_id, epoch=epoch)

        def ask(until: Deadline) -> int:
            try:
                self.channel.send(Frame.control(question.to_message()), deadline=until)
                return messages.Resumed.parse(self.channel.receive(deadline=until).message()).taken
            except (MoveRefused, PeerFailed) as refusal:
                raise CanNotResume(describe(refusal).what, hint=refusal.hint) from refusal

        return self.bring_back(error, ask)

    def bring_back(self, error: TransportError, ask: Callable[[Deadline], T | None]) -> T:
        """Bring the link back after ``error``; what ``ask`` makes of the target's answer on it, None: not yet one.

        Raises ChannelClosed when that does not come about in time, AuthenticationFailed, and what ``ask`` does but
        TransportError.
        """
        if isinstance(error, ProtocolError) or self.channel.ended:
            raise error
        deadline, begin = Deadline.after(self.limit_s), time.monotonic()
        cause, connected = error, False
        while True:
            if not connected:
                self._connect(error, deadline, begin)
            connected = True
            try:
                answer = ask(Deadline.after(ANSWER_S))
            except TransportError as again:
                cause, connected, answer = again, False, None
            if answer is not None:
                self.resumed += 1
                self._observer.on_event(LinkBack(after_s=time.monotonic() - begin, resumed=True))
                return answer
            if deadline.expired():
                raise self._given_up(cause) from error
            if connected:
                time.sleep(FIRST_PAUSE_S)

    def begin_again(self, error: BaseException, move_id: str, epoch: int) -> bool:
        """Whether a move that ``error`` rolled back before its freeze is to be begun again. Then the link is whole, and
        the target has undone what it had of ``move_id``."""
        cause = error.__cause__ if isinstance(error, RolledBack) else None
        if self.broken or not self.limit_s or self.beginnings > MOST_BEGINNINGS:
            return False
        # A target that is silent is there: it would be so again.
        if not isinstance(cause, (ChannelClosed, CanNotResume)):
            return False
        why = describe(cause).what
        deadline, begin = Deadline.after(self.limit_s), time.monotonic()
        try:
            while True:
                if isinstance(cause, ChannelClosed):
                    self._connect(cause, deadline, begin)
                try:
                    if not self._undone_there(move_id, epoch):
                        return False
                    break
                except ChannelClosed as again:
                    cause = again
        except (TransportError, MigrateError):
            return False
        self.beginnings += 1
        self._observer.on_event(LinkBack(after_s=time.monotonic() - begin, resumed=False, why=why))
        return True

    def _undone_there(self, move_id: str, epoch: int) -> bool:
        """What the target is still reserving for the attempt that is over would be in the way of the next one."""
        deadline = Deadline.after(UNDO_S)
        question = messages.Ask(move_id=move_id, epoch=epoch)
        while not deadline.expired():
            self.channel.send(Frame.control(question.to_message()), deadline=deadline)
            answer = messages.Answer.parse(self.channel.receive(deadline=deadline).message())
            if answer.state != "held":
                return answer.state == "refused"
        return False

    def _connect(self, error: TransportError, deadline: Deadline, begin: float) -> None:
        self.channel.cut()
        pause_s, cause = FIRST_PAUSE_S, error
        while True:
            waited_s = time.monotonic() - begin
            self._observer.on_event(LinkLost(why=describe(cause).what, waited_s=waited_s, limit_s=self.limit_s))
            try:
                session = self._connecting(
                    self._host,
                    self.session.entry.name,
                    transport=self.session.transport,
                    direct=self.session.direct,
                    deadline=deadline.within(ATTEMPT_S),
                )
            except AuthenticationFailed:
                raise
            except TransportError as again:
                cause = again
            else:
                self.channel.renew(session.channel)
                return
            remaining_s = deadline.remaining() or 0.0
            if remaining_s <= pause_s:
                raise self._given_up(cause) from error
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * PAUSE_FACTOR)

    def _given_up(self, cause: TransportError) -> ChannelClosed:
        self.broken = True
        return ChannelClosed(
            f"the link was lost and did not come back within {self.limit_s:g} s: {cause.what}",
            hint="see that the host can be reached, and move it again; --reconnect-for SECONDS waits longer",
        )
