"""The command that says whether a container is well after its move."""

import math
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import ExitCode, MoveRefused, ProtocolViolation, Unhealthy, exit_code_for
from migrate.health import CheckHealth, HealthCheck, HealthSeen, attempt, handle_check_health, look_there
from migrate.journal import Journal
from migrate.messages import Hello
from migrate.report import MoveReport, Outcome
from migrate.session import Asked
from runtime.health import CheckResult
from runtime.host import HostConfig
from transport.api import Frame
from transport.testing.memory import memory_pair

QUESTION = CheckHealth(move_id="abc", command="true", timeout_ms=1000, retries=3, interval_ms=500)
MOVED = MoveReport(
    id="abc",
    container="web1",
    source="host1",
    target="host2",
    mode="diskless",
    transport="stream",
    outcome=Outcome.MIGRATED,
    started_at="2026-01-01T12:00:00.000Z",
    total_ms=1.0,
)


def test_the_first_success_counts_and_there_is_a_pause_before_each_further_try() -> None:
    codes = iter((1, 1, 0))
    pauses: list[float] = []
    seen = attempt(QUESTION, lambda: CheckResult(exit_code=next(codes), output="said"), sleep=pauses.append)
    assert (seen.healthy, seen.exit_code, seen.attempts, seen.output) == (True, 0, 3, "said")
    assert pauses == [0.5, 0.5]


def test_what_fails_every_time_is_unhealthy_with_the_last_words() -> None:
    words = iter(("a", "b", "c"))
    seen = attempt(QUESTION, lambda: CheckResult(exit_code=7, output=next(words)), sleep=lambda _s: None)
    assert (seen.healthy, seen.exit_code, seen.attempts, seen.output) == (False, 7, 3, "c")


@pytest.mark.parametrize("message", [QUESTION, HealthSeen(move_id="a", healthy=True, exit_code=0, attempts=1, ms=1.5)])
def test_a_message_comes_back_from_the_wire_as_it_was(message: CheckHealth | HealthSeen) -> None:
    assert type(message).parse(Frame.control(message.to_message()).message()) == message


@pytest.mark.parametrize(
    "change",
    [
        {"command": "x" * 5000},
        {"timeout_ms": 0},
        {"timeout_ms": math.inf},
        {"retries": 0},
        {"retries": 1000},
        {"interval_ms": -1},
        {"move_id": "../x"},
    ],
)
def test_what_a_peer_may_not_ask_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation, match=next(iter(change))):
        CheckHealth.parse({**QUESTION.to_message(), **change})


def asked(directory: Path) -> Asked:
    ours, _theirs = memory_pair()
    host = HostConfig(name="host2", config_dir=directory, state_dir=directory / "state", run_dir=directory / "run")
    return Asked(host=host, channel=ours, peer_hello=Hello(version="1", host="host1"))


@pytest.mark.parametrize("phase", ["", "RESERVED", "REFUSED"])
def test_only_in_a_container_that_came_by_the_move_anything_is_run(tmp_path: Path, phase: str) -> None:
    question = asked(tmp_path)
    if phase:
        with Journal(question.host.journal_dir, "abc", side="target") as journal:
            journal.append(phase, {"container": "0123456789ab"})
    with pytest.raises(MoveRefused, match="no container came here by move abc"):
        handle_check_health(question, QUESTION.to_message())


def test_a_target_that_can_not_be_asked_is_no_error_of_the_move(tmp_path: Path) -> None:
    seen = look_there(asked(tmp_path).host, MOVED, HealthCheck(command="true"))
    assert not seen.healthy
    assert seen.exit_code is None
    assert "host2" in seen.output


@pytest.mark.parametrize(("code", "word"), [(None, "was not looked at"), (3, "ended with 3")])
def test_the_error_says_that_the_container_was_moved(code: int | None, word: str) -> None:
    error = Unhealthy.seen("sick", code, "web1", "host2")
    assert exit_code_for(error) == ExitCode.UNHEALTHY
    assert "web1 was moved and runs on host2" in str(error)
    assert word in str(error)
    assert "sick" in str(error)
