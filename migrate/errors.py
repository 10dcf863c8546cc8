"""Errors of a move and of the command, and the one table that gives every error its code and exit code.

MigrateError              what went wrong; ``hint`` says what to do next
|-- UnknownHost           no such host in the inventory
|-- UnknownReport         no report of that id
|-- NotRoot               the command needs root
|-- MoveRefused           preflight found blockers, or the peer said no; nothing has happened
|-- RolledBack            the move failed; the container runs on, on the source
|-- NotConverging         pre-copy can not meet the limit on the blackout
|-- BlackoutTooLong       the blackout passed --max-blackout before COMMIT
|-- Unhealthy             moved, and its health command failed there
|-- TakenBack             it ran on the target, and runs on the source again as it was at the freeze
|-- ContainerLost         it ran on the target without all of its memory, and the rest could not be brought
|-- InDoubt               COMMIT is out and no answer came; the source stays frozen and asks
|-- MemoryDiffers         --verify: a page on the target is not what it was on the source
|-- ProtocolViolation     the peer sent what this protocol does not allow
|-- CanNotResume          the link is back, and the target has nothing of this move any more
|-- NoCommonProtocol      the two versions of cmigrate do not understand each other
`-- PeerFailed            the other host reported an error; carries its code and decisive lines

Errors of ``runtime`` and ``transport`` come through as they are. The class is the exit code: see ``CODES``, and
docs/exit-codes.md for people.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from runtime import errors as runtime_errors
from transport import api as transport_api


class ExitCode(IntEnum):
    """What the process ends with; docs/exit-codes.md says the same in sentences."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    ROLLED_BACK = 5
    IN_DOUBT = 6
    CONNECTION = 7
    MISSING_FEATURE = 8
    NO_ROOM = 9
    CORRUPT = 10
    BUSY = 11
    CRIU = 12
    LOST = 13
    UNHEALTHY = 14
    INTERRUPTED = 130


class MigrateError(Exception):
    """Base of every error raised here on purpose. ``str()`` is one line for an operator."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class UnknownHost(MigrateError):
    pass


class UnknownReport(MigrateError):
    pass


class NotRoot(MigrateError):
    pass


class MoveRefused(MigrateError):
    """``blockers`` are all reasons at once: mappings with level, check, what and remedy, as preflight gives them."""

    def __init__(self, what: str, *, hint: str = "", blockers: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(what, hint=hint)
        self.blockers = tuple(dict(blocker) for blocker in blockers)


class ProtocolViolation(MigrateError):
    pass


class NoCommonProtocol(MigrateError):
    pass


class CanNotResume(MigrateError):
    """The link is back, and what went before it broke is of no use: the move has to begin again."""


class PeerFailed(MigrateError):
    """``code`` is a name of ``CODES`` when the peer is of our version; an unknown one counts as internal-error."""

    def __init__(self, what: str, *, hint: str = "", code: str = "", log_lines: Sequence[str] = ()) -> None:
        super().__init__(what, hint=hint)
        self.code = code
        self.log_lines = tuple(log_lines)


class _Caused(MigrateError):
    """An outcome together with the error that led to it."""

    def __init__(self, what: str, *, hint: str = "", log_lines: Sequence[str] = (), cause_code: str = "") -> None:
        super().__init__(what, hint=hint)
        self.log_lines = tuple(log_lines)
        self.cause_code = cause_code


class NotConverging(MigrateError):
    """Pre-copy can not meet the limit on the blackout, and the operator wants no move then."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"pre-copy does not get below the downtime limit: {why}",
            hint="raise --downtime-limit, allow --throttle, or accept a longer blackout with --on-timeout stopcopy",
        )


class BlackoutTooLong(MigrateError):
    """The container was frozen for as long as the operator allows, and COMMIT was not on the disk yet."""

    def __init__(self, limit_ms: float) -> None:
        super().__init__(
            f"the blackout passed the {limit_ms:g} ms of --max-blackout before the target could take over",
            hint="raise --max-blackout, or move with --mode precopy, which freezes for a shorter time",
        )


class Unhealthy(MigrateError):
    """The container was moved and runs on the target, and its health command does not say that it is well."""

    @classmethod
    def seen(cls, output: str, exit_code: int | None, container: str, target: str) -> Unhealthy:
        what = "was not looked at" if exit_code is None else f"its health command ended with {exit_code}"
        return cls(
            f"{container} was moved and runs on {target}, but {what}" + (f": {output}" if output else ""),
            hint=f"see `cmigrate logs {container}` there; nothing is undone, and it can be moved back as it is now",
        )


class TakenBack(MigrateError):
    """The container ran on the target, was not well there, and runs on the source again, as it was at the freeze."""

    @classmethod
    def unwell(cls, output: str, exit_code: int | None, container: str, target: str) -> TakenBack:
        return cls(
            f"{container} was moved, its health command ended with {exit_code} on {target}, and it runs on the source "
            "again, as it was when it was frozen" + (f": {output}" if output else ""),
            hint=f"what it did on {target} is lost, and connections of that time have ended",
        )

    @classmethod
    def lost(cls, lost: ContainerLost, container: str) -> TakenBack:
        return cls(
            f"{container} was lost on the target and runs on the source again, as it was when it was frozen: "
            f"{lost.what.rpartition('could not come: ')[2]}",
            hint="what it did there is lost, and connections of that time have ended",
        )


class RolledBack(_Caused):
    @classmethod
    def because(cls, cause: BaseException) -> RolledBack:
        """Tells the cause in the words of the error that was it."""
        told = describe(cause)
        return cls(
            f"the move failed and the container runs on, on the source: {told.what}",
            hint=told.hint or "correct the cause and move it again",
            log_lines=told.log_lines,
            cause_code=told.code,
        )


class InDoubt(_Caused):
    @classmethod
    def after_commit(cls, move_id: str, cause: BaseException) -> InDoubt:
        told = describe(cause)
        return cls(
            f"move {move_id} is in doubt: COMMIT was sent and the target did not answer: {told.what}",
            hint="the copy here stays frozen; bring the target or the link back, and the agents settle it",
            log_lines=told.log_lines,
            cause_code=told.code,
        )

    @classmethod
    def while_filling(cls, move_id: str, cause: BaseException) -> InDoubt:
        told = describe(cause)
        return cls(
            f"move {move_id}: the container ran on the target when the link broke, before all of its memory was there, "
            f"and the target does not answer: {told.what}",
            hint="the copy here stays frozen and will not run; the agents settle it when they reach each other",
            log_lines=told.log_lines,
            cause_code=told.code,
        )


class ContainerLost(_Caused):
    @classmethod
    def because(cls, cause: BaseException) -> ContainerLost:
        told = describe(cause)
        return cls(
            f"the container was lost: it ran on the target, and the rest of its memory could not come: {told.what}",
            hint="its files are on the target: start it there again; modes without --allow-postcopy do not risk this",
            log_lines=told.log_lines,
            cause_code=told.code,
        )


class MemoryDiffers(MigrateError):
    """``--verify`` found pages on the target that are not what they were on the source."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what,
            hint="nothing ran with it; please report this, with both hosts' versions; another --mode may do it right",
        )

    @classmethod
    def after_the_switch(cls, pages: int, target: str) -> MemoryDiffers:
        found = cls(
            f"the container runs on {target}, and {pages} pages that came after the switch are not what they were"
        )
        found.hint = "restart the container there; please report this, with both hosts' versions"
        return found


class StillInDoubt(MigrateError):
    """Nobody here can tell where the container may run."""


# First match wins, so a class stands before its bases. The names travel in ERROR messages and in --json.
CODES: tuple[tuple[type[BaseException], str, ExitCode], ...] = (
    (RolledBack, "rolled-back", ExitCode.ROLLED_BACK),
    (TakenBack, "taken-back", ExitCode.ROLLED_BACK),
    (InDoubt, "in-doubt", ExitCode.IN_DOUBT),
    (ContainerLost, "lost", ExitCode.LOST),
    (StillInDoubt, "in-doubt", ExitCode.IN_DOUBT),
    (UnknownHost, "unknown-host", ExitCode.NOT_FOUND),
    (UnknownReport, "unknown-report", ExitCode.NOT_FOUND),
    (NotRoot, "not-root", ExitCode.REFUSED),
    (NotConverging, "not-converging", ExitCode.ROLLED_BACK),
    (MemoryDiffers, "memory-differs", ExitCode.CORRUPT),
    (Unhealthy, "unhealthy", ExitCode.UNHEALTHY),
    (BlackoutTooLong, "blackout-too-long", ExitCode.ROLLED_BACK),
    (MoveRefused, "refused", ExitCode.REFUSED),
    (ProtocolViolation, "protocol", ExitCode.CONNECTION),
    (NoCommonProtocol, "protocol-version", ExitCode.CONNECTION),
    (CanNotResume, "can-not-resume", ExitCode.CONNECTION),
    (runtime_errors.BadInput, "bad-input", ExitCode.USAGE),
    (runtime_errors.NotFound, "not-found", ExitCode.NOT_FOUND),
    (runtime_errors.NameTaken, "name-taken", ExitCode.REFUSED),
    (runtime_errors.WrongState, "wrong-state", ExitCode.REFUSED),
    (runtime_errors.Busy, "busy", ExitCode.BUSY),
    (runtime_errors.MissingFeature, "missing-feature", ExitCode.MISSING_FEATURE),
    (runtime_errors.ReadOnly, "read-only", ExitCode.NO_ROOM),
    (runtime_errors.NoRoom, "no-room", ExitCode.NO_ROOM),
    (runtime_errors.CorruptData, "corrupt-data", ExitCode.CORRUPT),
    (runtime_errors.CriuFailed, "criu-failed", ExitCode.CRIU),
    (transport_api.AuthenticationFailed, "authentication", ExitCode.CONNECTION),
    (transport_api.ConnectFailed, "connect", ExitCode.CONNECTION),
    (transport_api.DeadlineExpired, "deadline", ExitCode.CONNECTION),
    (transport_api.ChannelClosed, "channel-closed", ExitCode.CONNECTION),
    (transport_api.ProtocolError, "protocol", ExitCode.CONNECTION),
    (transport_api.TransportError, "transport", ExitCode.CONNECTION),
    (KeyboardInterrupt, "interrupted", ExitCode.INTERRUPTED),
)
INTERNAL_CODE = "internal-error"
_EXIT_OF_CODE = {name: exit_code for _class, name, exit_code in CODES}
_NO_ROOM_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM})
_MISSING_ERRNOS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP})


@dataclass(frozen=True, kw_only=True)
class ErrorText:
    """An error as it is told: ``code`` for programs, the rest for people. ``exit_code`` 125 to 127 are as docker's."""

    code: str
    exit_code: int
    what: str
    hint: str = ""
    log_lines: tuple[str, ...] = ()
    blockers: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The one JSON line of an error; empty lists are left out."""
        line: dict[str, Any] = {
            "type": "error",
            "code": self.code,
            "exit_code": self.exit_code,
            "what": self.what,
            "hint": self.hint,
        }
        if self.log_lines:
            line["log_lines"] = list(self.log_lines)
        if self.blockers:
            line["blockers"] = list(self.blockers)
        return line


def exit_code_for(error: BaseException) -> int:
    """What the process should end with after ``error``."""
    own = getattr(error, "exit_code", None)
    # A program that did not come up (LaunchFailed) says itself which of 125, 126 and 127 it is, as docker has them.
    if isinstance(error, runtime_errors.RuntimeFault) and isinstance(own, int):
        return own
    return int(_classify(error)[1])


def code_for(error: BaseException) -> str:
    """The name of the error for programs, one of ``CODES``."""
    return _classify(error)[0]


def name_peer(error: BaseException, peer: str) -> None:
    """Make an error of the link, or one that the peer told, say which host it is about: "the peer" is nobody."""
    if not isinstance(error, (transport_api.TransportError, ProtocolViolation, NoCommonProtocol, PeerFailed)):
        return
    if peer not in error.what:
        error.what = f"{peer}: {error.what}"
        error.args = (error.what, *error.args[1:])


def describe(error: BaseException) -> ErrorText:
    """Everything there is to tell about an error, whatever raised it."""
    what = getattr(error, "what", None)
    if not isinstance(what, str):
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
    code, _exit = _classify(error)
    if code == INTERNAL_CODE and not isinstance(error, (runtime_errors.RuntimeFault, MigrateError, OSError)):
        what = f"{type(error).__name__}: {what}"
    hint = getattr(error, "hint", "")
    return ErrorText(
        code=code,
        exit_code=exit_code_for(error),
        what=what,
        hint=hint if isinstance(hint, str) else "",
        log_lines=tuple(str(line) for line in getattr(error, "log_lines", ())),
        blockers=tuple(getattr(error, "blockers", ())),
    )


@contextlib.contextmanager
def full_disk_is_no_room(path: Path) -> Iterator[None]:
    """An OSError that says there is no room becomes NoRoom, which names ``path``; one of a disk that has failed, or is
    read-only for that reason, ReadOnly."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "make room in the state directory"
            raise runtime_errors.NoRoom(f"{path}: the disk is full", hint=hint) from error
        if error.errno in (errno.EIO, errno.EROFS):
            hint = "the kernel's log (dmesg) says what is wrong with the disk"
            raise runtime_errors.ReadOnly(f"{path} can not be written: {error.strerror}", hint=hint) from error
        raise


def _classify(error: BaseException) -> tuple[str, ExitCode]:
    if isinstance(error, PeerFailed):
        return (error.code, _EXIT_OF_CODE[error.code]) if error.code in _EXIT_OF_CODE else (INTERNAL_CODE, ExitCode(1))
    for kind, name, exit_code in CODES:
        if isinstance(error, kind):
            return name, exit_code
    number = getattr(error, "errno", None)
    if isinstance(error, (OSError, runtime_errors.KernelCallFailed)):
        if number in _NO_ROOM_ERRNOS:
            return "no-room", ExitCode.NO_ROOM
        if number == errno.EROFS:
            return "read-only", ExitCode.NO_ROOM
        if number in _MISSING_ERRNOS:
            return "missing-feature", ExitCode.MISSING_FEATURE
    return INTERNAL_CODE, ExitCode.INTERNAL
