"""The report of a move: what was done, how long it took, what was sent. Values only; docs/report.md has every field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from runtime.errors import CorruptData

REPORT_SCHEMA = 1


class Outcome(StrEnum):
    """How a move ended. Only ``migrated`` means that the container runs on the target."""

    MIGRATED = "migrated"
    ROLLED_BACK = "rolled_back"
    IN_DOUBT = "in_doubt"
    LOST = "lost"
    REFUSED = "refused"
    RETURNED = "returned"
    """It ran on the target, and runs on the source again, as it was at the freeze."""


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """One phase on the source's clock."""

    name: str
    ms: float


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """Bytes the source sent, by kind, before encryption."""

    images: int = 0
    pages: int = 0
    files: int = 0
    control: int = 0

    @property
    def total(self) -> int:
        return self.images + self.pages + self.files + self.control


@dataclass(frozen=True, kw_only=True)
class Fill:
    """Memory that came to its place after the container ran on the target; times in ms on the target's clock.

    ``pages_after`` are bytes that the source sent after the switch, ``remote_faults`` pages it was asked for.
    """

    ms: float = 0.0
    filled_bytes: int = 0
    faults: int = 0
    remote_faults: int = 0
    longest_wait_ms: float = 0.0
    pages_after: int = 0


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What ``--verify`` compared: ``pages`` before anything ran on the target, in ``ms`` there, and ``pages_later``
    when they arrived after the switch. Of these alone some may be ``differing``: before it, that rolls back."""

    pages: int = 0
    ms: float = 0.0
    pages_later: int = 0
    differing: int = 0


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """Shared memory that went apart from CRIU's images: ``before_bytes`` of it were copied while the container ran,
    ``after_bytes`` in the blackout. ``place_ms``: what it took the target to put it where it is mapped."""

    segments: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    place_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a command in the container said after the move. ``exit_code`` None: it could not be run, ``output`` says
    why. ``ms`` is all attempts together."""

    healthy: bool
    exit_code: int | None = None
    attempts: int = 0
    ms: float = 0.0
    output: str = ""


@dataclass(frozen=True, kw_only=True)
class Versions:
    """What ran where; empty where it is not known."""

    cmigrate: str = ""
    criu_source: str = ""
    criu_target: str = ""
    kernel_source: str = ""
    kernel_target: str = ""
    python: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportedError:
    """Why a move did not end well; ``code`` as in docs/exit-codes.md."""

    code: str
    what: str
    hint: str = ""
    log_lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MoveReport:
    """One move. Times in milliseconds, sizes in bytes, ``started_at`` RFC 3339 in UTC.

    ``blackout_ms`` runs from frozen on the source to running on the target, or on the source again, on the source's
    clock; None when the move ended before anything froze. ``downtime_ms`` is the longest time without an answer
    that a probe saw, if one ran. ``direct``: over a direct connection that came about over SSH. ``memory_bytes`` is
    what the container had in memory. ``packed`` is memory that our reader sent, in bytes before it was packed, by the
    way it went: none, lz4, zstd. ``shared`` is None where no shared memory did. ``rounds`` counts passes of pre-copy,
    so it is 0 without pre-copy. ``network`` is how the container is reached: l2 in a segment of both hosts, forward or
    vxlan over a wire between them; empty without a network. ``why`` the mode was taken; ``predicted_blackout_ms`` by
    the last round, else by the plan, None without either; ``slowed_to_cpus`` None when it ran at its own speed.
    ``closed_connections`` are TCP connections of the container that were ended when it froze: "LOCAL:PORT -
    REMOTE:PORT". ``resumed``: how often the link broke before the freeze, or after the switch while memory followed,
    and the move went on where it was; ``kept_bytes``: what the target had at the last of those before the freeze, and
    was not sent again; ``begun_again``: how often nothing was left there to go on from, in which case all other figures
    are of the last attempt. ``blockers`` are preflight's, as mappings with check, what and remedy.
    """

    id: str
    container: str
    source: str
    target: str
    mode: str
    transport: str
    outcome: Outcome
    started_at: str
    total_ms: float
    blackout_ms: float | None = None
    downtime_ms: float | None = None
    memory_bytes: int = 0
    sent_bytes: SentBytes = field(default_factory=SentBytes)
    packed: Mapping[str, int] = field(default_factory=dict)
    shared: SharedMemory | None = None
    direct: bool = False
    rounds: int = 0
    fill: Fill | None = None
    verify: Verification | None = None
    phases: tuple[PhaseTime, ...] = ()
    network: str = ""
    why: str = ""
    predicted_blackout_ms: float | None = None
    slowed_to_cpus: float | None = None
    closed_connections: tuple[str, ...] = ()
    resumed: int = 0
    kept_bytes: int = 0
    begun_again: int = 0
    health: Health | None = None
    versions: Versions = field(default_factory=Versions)
    error: ReportedError | None = None
    blockers: tuple[Mapping[str, Any], ...] = ()
    schema: int = REPORT_SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ``report_from_json`` gives the same value back. Nothing is left out."""
        data = dataclasses.asdict(self)
        data["outcome"] = str(self.outcome)
        for name in ("blackout_ms", "downtime_ms", "total_ms", "predicted_blackout_ms"):
            data[name] = None if data[name] is None else round(data[name], 3)
        data["phases"] = [{"name": phase.name, "ms": round(phase.ms, 3)} for phase in self.phases]
        data["closed_connections"] = list(self.closed_connections)
        data["blockers"] = [dict(blocker) for blocker in self.blockers]
        if self.error is not None:
            data["error"]["log_lines"] = list(self.error.log_lines)
        order = ("schema", *(name for name in data if name != "schema"))
        return {name: data[name] for name in order}


def report_from_json(data: Mapping[str, Any]) -> MoveReport:
    """The inverse of ``MoveReport.to_json``; fields of a newer version are ignored. Raises CorruptData."""
    try:
        if data["schema"] != REPORT_SCHEMA:
            raise CorruptData(f"report has schema {data['schema']!r}, this version knows {REPORT_SCHEMA}")
        fields = _known(MoveReport, dict(data))
        fields["outcome"] = Outcome(fields["outcome"])
        fields["sent_bytes"] = SentBytes(**_known(SentBytes, fields["sent_bytes"]))
        fields["versions"] = Versions(**_known(Versions, fields["versions"]))
        fields["phases"] = tuple(PhaseTime(**_known(PhaseTime, phase)) for phase in fields["phases"])
        fields["closed_connections"] = tuple(map(str, fields.get("closed_connections", ())))
        fields["blockers"] = tuple(dict(blocker) for blocker in fields["blockers"])
        if fields.get("fill") is not None:
            fields["fill"] = Fill(**_known(Fill, fields["fill"]))
        if fields.get("verify") is not None:
            fields["verify"] = Verification(**_known(Verification, fields["verify"]))
        if fields.get("shared") is not None:
            fields["shared"] = SharedMemory(**_known(SharedMemory, fields["shared"]))
        if fields.get("health") is not None:
            fields["health"] = Health(**_known(Health, fields["health"]))
        if fields["error"] is not None:
            error = _known(ReportedError, fields["error"])
            fields["error"] = ReportedError(**{**error, "log_lines": tuple(error.get("log_lines", ()))})
        fields["packed"] = {str(way): int(size) for way, size in dict(fields.get("packed", {})).items()}
        for name in ("id", "container", "source", "target", "mode", "transport", "started_at"):
            if not isinstance(fields[name], str):
                raise CorruptData(f"report: {name} is no text")
        return MoveReport(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"report does not fit: {error!r}") from error


def _known(kind: Any, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise CorruptData(f"report: {kind.__name__} is no map")
    return {name: data[name] for name in kind.__dataclass_fields__ if name in data}
