"""What follows a move whose copy is kept: a health check's verdict, `cmigrate undo`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from migrate.departure import UndoWindow
from migrate.errors import MigrateError, StillInDoubt, TakenBack, describe
from migrate.guards import signals_ignored
from migrate.health import HealthCheck, look_there
from migrate.kept_copy import kept_copy
from migrate.observe import Observer, Warning
from migrate.recover import recover
from migrate.report import MoveReport, Outcome, ReportedError
from migrate.reports import ReportStore
from runtime.api import Container, Status
from runtime.container import Containers
from runtime.errors import RuntimeFault, WrongState
from runtime.host import HostConfig
from transport.api import TransportError

OnUnhealthy = Literal["report", "return"]


def window_for(undo_window_s: float, on_unhealthy: OnUnhealthy) -> UndoWindow | None:
    """None where nothing is to be kept."""
    if not undo_window_s and on_unhealthy == "report":
        return None
    return UndoWindow(seconds=undo_window_s)


def after_the_move(
    host: HostConfig,
    container_id: str,
    report: MoveReport,
    window: UndoWindow,
    *,
    health: HealthCheck | None,
    on_unhealthy: OnUnhealthy,
    observer: Observer,
) -> MoveReport:
    """Under the container's lock: look whether it is well where it is to come back if not, and give the copy up where
    no time was asked for. The report as it is then, with outcome ``returned`` and the error where it was taken back.

    A health command that could not be run says nothing of the container: it stays on the target. So it does where the
    target is not reached any more. Raises StillInDoubt where it was asked and did not answer.
    """
    ReportStore(host).save(report)
    containers = Containers(host)
    if health is not None and on_unhealthy == "return":
        report = replace(report, health=look_there(host, report, health))
        ReportStore(host).save(report)
        seen = report.health
        if seen is not None and seen.exit_code not in (None, 0):
            return _taken_back(host, containers.get(container_id), report, observer)
    if not window.seconds:
        kept_copy(host, containers.get(container_id)).accept()
    return report


def _taken_back(host: HostConfig, container: Container, report: MoveReport, observer: Observer) -> MoveReport:
    assert report.health is not None
    try:
        with signals_ignored():
            kept_copy(host, container).take_back()
    except StillInDoubt:
        raise
    except (TransportError, MigrateError, RuntimeFault) as error:
        observer.on_event(Warning(what=f"it could not be taken back: {describe(error).what}"))
        return report
    exit_code, output = report.health.exit_code, report.health.output
    told = describe(TakenBack.unwell(output, exit_code, report.container, report.target))
    error_told = ReportedError(code=told.code, what=told.what, hint=told.hint)
    return replace(report, outcome=Outcome.RETURNED, error=error_told)


def undo(host: HostConfig, reference: str, *, forget: bool = False) -> str:
    """Take a container back whose copy is kept here, or give that copy up; what was done.

    Raises WrongState where none is kept (any more), and as KeptCopy.take_back does.
    """
    containers = Containers(host)
    told = recover(host)
    container = containers.get(reference)
    if container.state.status is not Status.KEPT and any(container.name in line for line in told):
        return "\n".join(told)  # it was open, and is not any more
    with containers.locked(container.id, "undo") as locked:
        if locked.state.status is not Status.KEPT:
            raise WrongState(
                f"no copy of {locked.name} is kept here: it is {locked.state.status}",
                hint="`cmigrate move --undo-window SECONDS` keeps one for so long",
            )
        copy = kept_copy(host, locked)
        return copy.accept() if forget else copy.take_back()
