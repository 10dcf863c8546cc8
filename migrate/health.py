"""Whether a container is well after its move: a command in it, asked for by the source and run by the target.

The answer is only reported: by then the container has run on the target, and nothing of it is left on the source.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from migrate.errors import MigrateError, MoveRefused, describe
from migrate.fields import Count, Flag, MoveId, Text, Time
from migrate.journal import read_one
from migrate.links import TransportName, connect
from migrate.messages import Message
from migrate.report import Health, MoveReport
from migrate.session import Asked
from migrate.wire import MAX_TEXT, integer
from runtime.container import Containers
from runtime.errors import RuntimeFault
from runtime.health import CheckResult, run_check
from runtime.host import HostConfig
from transport.api import Deadline, Frame, TransportError

CONNECT_TIMEOUT_S = 20.0
# Beside the command's own time: starting it on a busy host, and the way there and back.
ANSWER_GRACE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """A shell command that ends with 0 when the container is well; tried ``retries`` times before it counts as
    failed, ``interval_s`` apart."""

    command: str
    timeout_s: float = 10.0
    retries: int = 3
    interval_s: float = 1.0

    @property
    def longest_s(self) -> float:
        return self.retries * (self.timeout_s + self.interval_s + ANSWER_GRACE_S)


@dataclass(frozen=True, kw_only=True)
class CheckHealth(Message):
    """Source asks after a move: is its container well?"""

    TYPE: ClassVar[str] = "check-health"
    move_id: MoveId
    command: Text
    timeout_ms: Annotated[int, integer(1, 3_600_000)]
    retries: Annotated[int, integer(1, 100)]
    interval_ms: Annotated[int, integer(0, 3_600_000)]


@dataclass(frozen=True, kw_only=True)
class HealthSeen(Message):
    """The answer, of the last attempt."""

    TYPE: ClassVar[str] = "health"
    move_id: MoveId
    healthy: Flag
    exit_code: Count
    attempts: Count
    ms: Time
    output: Text = ""


def handle_check_health(asked: Asked, message: Mapping[str, Any]) -> None:
    """Handler of "check-health" for session.HANDLERS. Only a container that came by the move it names is looked at."""
    question = CheckHealth.parse(message)
    journal = read_one(asked.host.journal_dir, question.move_id, "target")
    if journal is None or not journal.reached("COMMIT_LOGGED"):
        raise MoveRefused(f"no container came here by move {question.move_id}")
    container_id = str(journal.records[0].details.get("container", ""))
    containers = Containers(asked.host)
    timeout_s = question.timeout_ms / 1000
    answer = attempt(question, lambda: run_check(containers, container_id, question.command, timeout_s))
    asked.answer(answer.to_message())


def attempt(
    question: CheckHealth, check: Callable[[], CheckResult], *, sleep: Callable[[float], None] = time.sleep
) -> HealthSeen:
    """Until it is well, or has been tried often enough."""
    begin = time.monotonic()
    for number in range(1, question.retries + 1):
        result = check()
        if result.exit_code == 0 or number == question.retries:
            break
        sleep(question.interval_ms / 1000)
    return HealthSeen(
        move_id=question.move_id,
        healthy=result.exit_code == 0,
        exit_code=result.exit_code,
        attempts=number,
        ms=(time.monotonic() - begin) * 1000,
        output=result.output[-MAX_TEXT:],
    )


def look_there(host: HostConfig, moved: MoveReport, check: HealthCheck) -> Health:
    """Ask the target. Never raises: the move is over, whatever this finds. Not even Ctrl-C, which ends the wait."""
    question = CheckHealth(
        move_id=moved.id,
        command=check.command,
        timeout_ms=int(check.timeout_s * 1000),
        retries=check.retries,
        interval_ms=int(check.interval_s * 1000),
    )
    try:
        way: TransportName = "ssh" if moved.transport == "ssh" else "stream"
        with connect(host, moved.target, transport=way, deadline=Deadline.after(CONNECT_TIMEOUT_S)) as session:
            deadline = Deadline.after(check.longest_s)
            session.channel.send(Frame.control(question.to_message()), deadline=deadline)
            seen = HealthSeen.parse(session.channel.receive(deadline=deadline).message())
    except (TransportError, MigrateError, RuntimeFault, KeyboardInterrupt) as error:
        return Health(healthy=False, output=f"it could not be looked at: {describe(error).what}")
    return Health(
        healthy=seen.healthy,
        exit_code=seen.exit_code,
        attempts=seen.attempts,
        ms=round(seen.ms, 3),
        output=seen.output,
    )
