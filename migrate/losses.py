"""The report of a container that was lost after the switch, by whoever is left to tell of it."""

from __future__ import annotations

from migrate.errors import ContainerLost, describe
from migrate.journal import MoveJournal
from migrate.report import MoveReport, Outcome, ReportedError
from migrate.reports import ReportStore
from runtime.errors import RuntimeFault
from runtime.host import HostConfig


def report_loss(
    host: HostConfig,
    lost: ContainerLost,
    *,
    move_id: str,
    container: str,
    source: str,
    target: str,
    mode: str,
    started_at: str,
    transport: str = "",
) -> None:
    """Kept on ``host``. Where it can not be, nothing is raised: what it tells of has happened all the same."""
    told = describe(lost)
    ReportStore(host).try_to_save(
        MoveReport(
            id=move_id,
            container=container,
            source=source,
            target=target,
            mode=mode,
            transport=transport,
            outcome=Outcome.LOST,
            started_at=started_at,
            total_ms=0.0,
            error=ReportedError(code=told.code, what=told.what, hint=told.hint),
        )
    )


def report_loss_of(host: HostConfig, journal: MoveJournal, name: str, *, source: str, target: str, why: str) -> None:
    """Of a move of which only the journal is left: nobody lived who could tell it."""
    first = journal.records[0]
    report_loss(
        host,
        ContainerLost.because(RuntimeFault(why)),
        move_id=journal.move_id,
        container=name,
        source=source,
        target=target,
        mode=str(first.details.get("mode", "")),
        started_at=first.at,
    )
