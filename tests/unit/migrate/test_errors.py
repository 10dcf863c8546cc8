import errno
import re
from pathlib import Path

import pytest

from migrate import errors
from migrate.errors import (
    CODES,
    ExitCode,
    InDoubt,
    MigrateError,
    MoveRefused,
    PeerFailed,
    RolledBack,
    code_for,
    describe,
    exit_code_for,
)
from runtime import errors as runtime_errors
from runtime.sandbox.launch import LaunchFailed
from transport import api as transport_api

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "exit-codes.md"


def subclasses(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (runtime_errors.BadInput("x"), 2),
        (runtime_errors.NotFound("x"), 3),
        (errors.UnknownHost("x"), 3),
        (errors.UnknownReport("x"), 3),
        (runtime_errors.NameTaken("x"), 4),
        (runtime_errors.WrongState("x"), 4),
        (MoveRefused("x"), 4),
        (errors.NotRoot("x"), 4),
        (RolledBack("x"), 5),
        (InDoubt("x"), 6),
        (transport_api.ConnectFailed("x"), 7),
        (transport_api.AuthenticationFailed("x"), 7),
        (transport_api.DeadlineExpired("x"), 7),
        (transport_api.ProtocolError("x"), 7),
        (errors.ProtocolViolation("x"), 7),
        (runtime_errors.MissingFeature("x"), 8),
        (runtime_errors.NoRoom("x"), 9),
        (runtime_errors.CorruptData("x"), 10),
        (runtime_errors.Busy("x"), 11),
        (runtime_errors.CriuFailed("x"), 12),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
        (OSError(errno.ENOSPC, "x"), 9),
        (OSError(errno.EPERM, "x"), 1),
        (runtime_errors.KernelCallFailed("write", "file", errno.ENOSPC), 9),
        (runtime_errors.KernelCallFailed("clone", "x", errno.ENOSYS), 8),
        (LaunchFailed("x", 127), 127),
        (PeerFailed("x", code="no-room"), 9),
        (PeerFailed("x", code="something newer"), 1),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, expected: int) -> None:
    assert exit_code_for(error) == expected


def test_every_class_of_our_own_is_classified() -> None:
    unclassified = {MigrateError, PeerFailed, errors._Caused}  # a base, the peer's word, a base
    for kind in subclasses(MigrateError) - unclassified:
        assert any(issubclass(kind, known) for known, _name, _exit in CODES), kind


def test_a_class_stands_before_its_bases() -> None:
    seen: list[type[BaseException]] = []
    for kind, name, _exit in CODES:
        assert not any(issubclass(kind, earlier) for earlier in seen), f"{name} is never reached"
        seen.append(kind)


def test_every_exit_code_is_documented() -> None:
    rows = {int(number) for number in re.findall(r"^\| *(\d+) *\|", DOCUMENT.read_text(), re.MULTILINE)}
    assert {int(code) for code in ExitCode} <= rows


def test_every_error_name_is_documented() -> None:
    text = DOCUMENT.read_text()
    assert not [name for _kind, name, _exit in CODES if f"`{name}`" not in text]


def test_a_rollback_tells_the_cause_in_its_own_words() -> None:
    cause = runtime_errors.CriuFailed("CRIU could not restore", hint="try x", log_lines=("Error (a.c:1): b",))
    told = describe(RolledBack.because(cause))
    assert told.exit_code == 5
    assert told.code == "rolled-back"
    assert "CRIU could not restore" in told.what
    assert told.hint == "try x"
    assert told.log_lines == ("Error (a.c:1): b",)


def test_doubt_names_the_move_and_says_what_happens_next() -> None:
    told = describe(InDoubt.after_commit("abc123", transport_api.ChannelClosed("the peer went away")))
    assert told.exit_code == 6
    assert "abc123" in told.what
    assert "the peer went away" in told.what
    assert "frozen" in told.hint


def test_a_transport_error_is_told_once_without_its_hint_in_the_text() -> None:
    told = describe(transport_api.ConnectFailed("nobody answers", hint="start the agent"))
    assert (told.what, told.hint) == ("nobody answers", "start the agent")


def test_an_error_nobody_foresaw_names_its_class() -> None:
    told = describe(ZeroDivisionError("division by zero"))
    assert (told.code, told.exit_code) == ("internal-error", 1)
    assert told.what == "ZeroDivisionError: division by zero"


def test_blockers_are_told_with_the_refusal() -> None:
    blocker = {"level": "blocker", "check": "name", "what": "taken", "remedy": "rename"}
    line = describe(MoveRefused("no", blockers=[blocker])).to_json()
    assert line["blockers"] == [blocker]
    assert line["type"] == "error"
    assert "log_lines" not in line


def test_the_code_of_an_error_survives_the_way_to_the_other_host() -> None:
    for kind, name, exit_code in CODES:
        if kind is not KeyboardInterrupt:
            assert exit_code_for(PeerFailed("x", code=name)) == exit_code
    assert code_for(PeerFailed("x", code="busy")) == "busy"


def test_an_error_of_the_kernel_that_says_so_has_the_same_name() -> None:
    told = describe(OSError(30, "Read-only file system", "/var/lib/x"))
    assert (told.code, told.exit_code) == ("read-only", ExitCode.NO_ROOM)
    assert "/var/lib/x" in told.what
