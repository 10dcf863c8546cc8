"""Asking a target where a move stands, on a connection of its own: after a link that broke, or a mover that died."""

from __future__ import annotations

import contextlib
import time

from migrate import messages
from migrate.errors import ContainerLost, InDoubt, MigrateError, PeerFailed, ProtocolViolation, RolledBack, describe
from migrate.links import Session, connect
from migrate.observe import Warning
from migrate.postcopy_source import KeptMemory
from runtime.errors import RuntimeFault
from runtime.host import HostConfig
from transport.api import Deadline, Frame, TransportError

ASK_TIMEOUT_S = 10.0
# The target's guard needs milliseconds to end the container; the rest is for a link that comes back.
SETTLE_TIMEOUT_S = 20.0
SETTLE_PAUSE_S = 0.3
# A target that is told that a move is off needs milliseconds to undo it; one that hangs is not waited for.
DISCARD_TIMEOUT_S, UNDO_TIMEOUT_S = 10.0, 5.0
_GIVEN_UP = (messages.Error.TYPE, messages.Refused.TYPE)


def ask(host: HostConfig, target: str, move_id: str, epoch: int, timeout_s: float = ASK_TIMEOUT_S) -> str:
    """The target's answer: a Standing of messages.Answer. Raises TransportError, MigrateError or RuntimeFault."""
    deadline = Deadline.after(timeout_s)
    with connect(host, target, deadline=deadline) as session:
        question = messages.Ask(move_id=move_id, epoch=epoch)
        session.channel.send(Frame.control(question.to_message()), deadline=deadline)
        answer = messages.Answer.parse(session.channel.receive(deadline=deadline).message())
    if (answer.move_id, answer.epoch) != (move_id, epoch):
        raise ProtocolViolation(f"{target} answered for another move")
    return answer.state


def discard(host: HostConfig, session: Session, move_id: str, epoch: int, *, wait: bool) -> None:
    """Tell the target that it is off. ``wait`` until it has undone it, or is gone, or has had time enough."""
    message = messages.Discard(move_id=move_id, epoch=epoch, why="the move was called off")
    try:
        session.channel.send(Frame.control(message.to_message()), deadline=Deadline.after(DISCARD_TIMEOUT_S))
    except TransportError:
        # It broke, or has half a frame on it: the target would wait for us to come back. Who asks does not.
        with contextlib.suppress(TransportError, MigrateError, RuntimeFault):
            ask(host, session.entry.name, move_id, epoch, timeout_s=UNDO_TIMEOUT_S)
        return
    with contextlib.suppress(TransportError):
        if not wait:
            return
        deadline = Deadline.after(UNDO_TIMEOUT_S)
        while session.channel.receive(deadline=deadline).message().get("type") not in _GIVEN_UP:
            pass


def bring_memory(
    kept: KeptMemory | None, host: HostConfig, session: Session, move_id: str, epoch: int
) -> ContainerLost | None:
    """The container runs on the target and needs what is here. Afterwards nothing here is needed: it lives there, or
    is lost. Raises InDoubt where that can not be learned."""
    if kept is None:
        return None
    try:
        kept.serve()
    except Exception as error:
        # The target must not wait for what will not come.
        session.channel.abort()
        return after_the_switch(host, session.entry.name, move_id, epoch, error)
    return None


def after_the_switch(
    host: HostConfig, target: str, move_id: str, epoch: int, cause: BaseException
) -> ContainerLost | None:
    """What became of a container that ran on the target when ``cause`` ended the bringing of its memory.

    None: all of it had arrived, it runs there. Raises InDoubt where the target can not be asked in time.
    """
    deadline = Deadline.after(SETTLE_TIMEOUT_S)
    while True:
        state = ""
        # The link may come back.
        with contextlib.suppress(TransportError, MigrateError, RuntimeFault):
            state = ask(host, target, move_id, epoch)
        if state == "running":
            return None
        if state == "lost":
            return ContainerLost.because(cause)
        if deadline.expired():
            raise InDoubt.while_filling(move_id, cause) from cause
        time.sleep(SETTLE_PAUSE_S)


def what_became(
    host: HostConfig, session: Session, move_id: str, cause: BaseException, limit_s: float, epoch: int = 1
) -> MigrateError | None:
    """After COMMIT, when ``cause`` took the answer away: asked again and again for so long, on links of their own. That
    of ``session`` is cut.

    None: it runs there. ContainerLost: it ran there, and not all of its memory came. RolledBack: it never will.
    Otherwise InDoubt; so too when somebody does not want to wait.
    """
    session.channel.abort()
    if isinstance(cause, InDoubt):
        return cause
    deadline = Deadline.after(limit_s)
    state = ""
    try:
        while True:
            # Of a link that is down the first answer is late: the target may have been able to answer all the while.
            with contextlib.suppress(TransportError, MigrateError, RuntimeFault):
                state = ask(host, session.entry.name, move_id, epoch, timeout_s=min(ASK_TIMEOUT_S, max(limit_s, 1.0)))
            if state in ("running", "lost", "refused") or deadline.expired():
                break
            time.sleep(SETTLE_PAUSE_S)
    except KeyboardInterrupt:
        state = ""
    if state == "running":
        return None
    if state == "lost":
        return ContainerLost.because(cause)
    if state == "refused":
        return RolledBack.because(cause)
    return InDoubt.after_commit(move_id, cause)


def not_seen_complete(error: BaseException, name: str) -> Warning:
    """A container was moved, and ``error`` ended the wait until all of it is in place there. Raises ContainerLost where
    the target says so."""
    if isinstance(error, ContainerLost):
        raise error
    if isinstance(error, PeerFailed) and error.code == "lost":
        raise ContainerLost(error.what, hint=error.hint, log_lines=error.log_lines) from error
    return Warning(
        what=f"it was not seen that everything is in place on the target: {describe(error).what}",
        remedy=f"its files are kept here until `cmigrate resolve {name}`",
    )
