"""What follows a move whose copy is kept: a health check's verdict, `cmigrate undo`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from migrate.departure import UndoWindow
from migrate.errors import ContainerLost, MigrateError, StillInDoubt, TakenBack, describe
from migrate.guards import signals_ignored
from migrate.health import HealthCheck, look_there
from migrate.kept_copy import KeptCopy, kept_copy
from migrate.observe import Observer, Warning
from migrate.recover import recover
from migrate.report import MoveReport, Outcome, ReportedError
from migrate.reports import ReportStore
from runtime.api import Status
from runtime.container import Containers
from runtime.errors import RuntimeFault, WrongState
from runtime.host import HostConfig
from transport.api import TransportError

OnUnhealthy = Literal["report", "return"]


@dataclass(frozen=True, kw_only=True)
class WayBack:
    """For how long, and because of what, a container can come back to its freeze."""

    undo_window_s: float = 0.0
    on_unhealthy: OnUnhealthy = "report"
    health: HealthCheck | None = None

    @property
    def window(self) -> UndoWindow | None:
        """None where nothing is to be kept."""
        if not self.undo_window_s and self.on_unhealthy == "report":
            return None
        return UndoWindow(seconds=self.undo_window_s)


def with_a_way_back(
    host: HostConfig, container_id: str, moving: Callable[[], MoveReport], wanted: WayBack, observer: Observer
) -> MoveReport:
    """Move it, under its lock, and do what follows where its copy is kept. Raises as ``moving`` does, StillInDoubt."""
    if wanted.window is None:
        return moving()
    try:
        report = moving()
    except ContainerLost as lost:
        raise _after_the_loss(host, container_id, lost, wanted) from None
    return _after_the_move(host, container_id, report, wanted, observer)


def _after_the_move(
    host: HostConfig, container_id: str, report: MoveReport, wanted: WayBack, observer: Observer
) -> MoveReport:
    """Look whether it is well where it is to come back if not, and give the copy up where
    no time was asked for. The report as it is then, with outcome ``returned`` and the error where it was taken back.

    A health command that could not be run says nothing of the container: it stays on the target. So it does where the
    target is not reached any more. Raises StillInDoubt where it was asked and did not answer.
    """
    ReportStore(host).try_to_save(report)
    containers = Containers(host)
    try:
        copy = kept_copy(host, containers.get(container_id))
    except WrongState:
        return report  # it could not be kept; why was told
    if wanted.health is not None and wanted.on_unhealthy == "return":
        report = replace(report, health=look_there(host, report, wanted.health))
        ReportStore(host).try_to_save(report)
        seen = report.health
        if seen is not None and seen.exit_code not in (None, 0):
            return _taken_back(copy, report, observer)
    if not wanted.undo_window_s:
        copy.accept()
    return report


def _after_the_loss(host: HostConfig, container_id: str, lost: ContainerLost, wanted: WayBack) -> MigrateError:
    """It died on the target before all of its memory was there, and its copy is kept here.
    What to tell then: TakenBack, where it was to come back if it is not well, and does. Raises StillInDoubt."""
    containers = Containers(host)
    container = containers.get(container_id)
    try:
        copy = kept_copy(host, container)
        if wanted.on_unhealthy == "return":
            with signals_ignored():
                copy.take_back()
            return TakenBack.lost(lost, container.name)
    except StillInDoubt:
        raise
    except (TransportError, MigrateError, RuntimeFault) as error:
        lost.hint = f"it could not be taken back: {describe(error).what}"
    else:
        lost.hint = f"its copy here is kept: `cmigrate undo {container.name}` brings it back as it was at the freeze"
    return lost


def _taken_back(copy: KeptCopy, report: MoveReport, observer: Observer) -> MoveReport:
    assert report.health is not None
    try:
        with signals_ignored():
            copy.take_back()
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
