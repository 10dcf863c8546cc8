"""The course of one move as it becomes known, and the reports that are made of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from migrate.errors import ContainerLost, InDoubt, RolledBack, StillInDoubt, TakenBack, describe
from migrate.observe import Observer, Warning
from migrate.report import (
    Fill,
    MoveReport,
    Outcome,
    PhaseTime,
    ReportedError,
    SentBytes,
    SharedMemory,
    Verification,
    Versions,
)
from migrate.reports import ReportStore
from migrate.source import SourceMove
from runtime.container import utc_now
from runtime.host import HostConfig


@dataclass(kw_only=True)
class Course:
    """What is known of a move so far, for the report."""

    move_id: str
    container: str
    source: str
    target: str
    mode: str
    transport: str = ""
    direct: bool = False
    started_at: str = field(default_factory=utc_now)
    begin: float = field(default_factory=time.monotonic)
    memory_bytes: int = 0
    network: str = ""
    why: str = ""
    predicted_ms: float | None = None
    link_Bps: float | None = None
    frozen_ms: float | None = None
    began: bool = False
    unreachable: bool = False
    """The target was tried for as long as the operator wants."""
    versions: Versions = field(default_factory=Versions)


def moved_report(course: Course, source: SourceMove) -> MoveReport:
    """The report of a move that has reached RUNNING on the target."""
    clock = source.clock
    running_at = clock.at("finish")
    sent = source.out.sent_bytes
    last = source.rounds.last if source.rounds is not None else None
    return replace(
        report_of(course, Outcome.MIGRATED),
        rounds=source.rounds.count if source.rounds is not None else 0,
        predicted_blackout_ms=last.blackout_ms if last is not None else course.predicted_ms,
        slowed_to_cpus=source.rounds.throttled_cpus if source.rounds is not None else None,
        total_ms=(running_at - course.begin) * 1000,
        blackout_ms=(running_at - clock.at("freeze")) * 1000,
        sent_bytes=SentBytes(images=sent["images"], pages=sent["pages"], files=sent["files"], control=sent["control"]),
        packed=dict(source.out.pace.packer.memory_bytes),
        phases=tuple(PhaseTime(name=name, ms=ms) for name, ms in clock.phases(running_at)),
        shared=_shared(source),
        fill=_fill(source),
        verify=_verification(source),
        closed_connections=source.closed,
        resumed=source.line.resumed,
        kept_bytes=source.out.kept_bytes,
        begun_again=source.line.beginnings - 1,
    )


def _shared(source: SourceMove) -> SharedMemory | None:
    found = source.shared
    if found is None or not found.places:
        return None
    return SharedMemory(
        segments=len(found.places),
        before_bytes=found.sent_before_bytes,
        after_bytes=found.sent_after_bytes,
        place_ms=round(source.running.marks_ms.get("shared", 0.0), 3) if source.running is not None else 0.0,
    )


def _fill(source: SourceMove) -> Fill | None:
    """None as long as the target has not said that it is complete."""
    done = source.complete
    if done is None:
        return None
    return Fill(
        ms=round(done.fill_ms, 3),
        filled_bytes=done.filled_bytes,
        faults=done.faults,
        remote_faults=done.remote_faults,
        longest_wait_ms=round(done.longest_wait_ms, 3),
        pages_after=source.kept.pages_after if source.kept is not None else 0,
    )


def _verification(source: SourceMove) -> Verification | None:
    """What is compared later is not in it as long as the target has not said that it is complete."""
    found, done = source.verified, source.complete
    if found is None:
        return None
    return Verification(
        pages=found.pages,
        ms=round(found.ms, 3),
        pages_later=done.verified_pages if done is not None else 0,
        differing=done.differing_pages if done is not None else 0,
    )


def failed_report(course: Course, error: BaseException) -> MoveReport:
    told = describe(error)
    if isinstance(error, (InDoubt, StillInDoubt)):
        outcome = Outcome.IN_DOUBT
    elif isinstance(error, TakenBack):
        outcome = Outcome.RETURNED
    elif isinstance(error, ContainerLost):
        outcome = Outcome.LOST
    elif isinstance(error, RolledBack) or (isinstance(error, KeyboardInterrupt) and course.began):
        outcome = Outcome.ROLLED_BACK
    else:
        outcome = Outcome.REFUSED
    return replace(
        report_of(course, outcome),
        blackout_ms=course.frozen_ms,
        error=ReportedError(code=told.code, what=told.what, hint=told.hint, log_lines=told.log_lines),
        blockers=told.blockers,
    )


def report_of(course: Course, outcome: Outcome) -> MoveReport:
    return MoveReport(
        id=course.move_id,
        container=course.container,
        source=course.source,
        target=course.target,
        mode=course.mode,
        transport=course.transport,
        direct=course.direct,
        outcome=outcome,
        started_at=course.started_at,
        total_ms=(time.monotonic() - course.begin) * 1000,
        memory_bytes=course.memory_bytes,
        network=course.network,
        why=course.why,
        predicted_blackout_ms=course.predicted_ms,
        versions=course.versions,
    )


def keep_report(host: HostConfig, report: MoveReport, observer: Observer) -> None:
    """What became of the container is what it is; that the report is lost is told."""
    if problem := ReportStore(host).try_to_save(report):
        observer.on_event(Warning(what=problem))
