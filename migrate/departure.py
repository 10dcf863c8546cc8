"""What stays on the source of a container that runs on the target: a record until that is complete there, or its frozen
copy, for as long as the operator wants to be able to have it back."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from migrate.journal import Journal, MoveJournal, boot_id
from migrate.observe import Observer, Silent, Warning
from runtime.api import Container, Status
from runtime.container import Containers
from runtime.errors import MissingFeature, RuntimeFault
from runtime.host import HostConfig
from runtime.kept import keep, lead_ports_away, lives
from runtime.wire import WireSpec

# The alarm of a window must not find it open still.
ALARM_GRACE_S = 0.2
_RESOLVE = "import sys; from migrate.cli import main; sys.exit(main())"


@dataclass(frozen=True, kw_only=True)
class UndoWindow:
    """How long the frozen copy is kept once the mover is gone; 0: only for as long as the mover looks after it."""

    seconds: float = 0.0

    def begin(self) -> dict[str, Any]:
        """For the journal. Not by the time of day: a clock may be put back meanwhile."""
        return {"until_s": time.clock_gettime(time.CLOCK_BOOTTIME) + self.seconds, "boot": boot_id()}


def is_open(details: Mapping[str, Any]) -> bool:
    """Of ``UndoWindow.begin``: whether it is not over yet. A copy does not outlive its boot."""
    until_s = details.get("until_s")
    same_boot = details.get("boot") == boot_id()
    return same_boot and isinstance(until_s, (int, float)) and time.clock_gettime(time.CLOCK_BOOTTIME) < until_s


def must_give_back(gives_back: bool, window: UndoWindow | None) -> None:
    """Raises MissingFeature where a window was asked for and the target does not know of such."""
    if window is not None and not gives_back:
        raise MissingFeature("the target can not give a container back", hint="install the same version on both hosts")


def leave_record(
    containers: Containers, container: Container, target: str, observer: Observer, wire: WireSpec | None = None
) -> None:
    """Nothing of it runs here any more. Its files stay until the target is complete, for whoever has to find out what
    became of it; its published ports lead to the target for a while."""
    _lead_ports(lambda: containers.forward_ports(container.spec, wire), observer)
    gone = dataclasses.replace(container.state, status=Status.MOVED, init_pid=0, init_start_ticks=0, moved_to=target)
    try:
        containers.store.write_state(container.id, gone)
    except (RuntimeFault, OSError) as error:
        # What is left here is removed when the target is complete, or by whoever looks after open moves next.
        observer.on_event(Warning(what=f"it could not be noted here that it has left: {error}"))


def keep_copy(
    containers: Containers,
    container: Container,
    target: str,
    move_id: str,
    window: UndoWindow,
    observer: Observer,
    wire: WireSpec | None = None,
) -> None:
    """It is frozen here, and stays so."""
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=window.seconds)
    until = end.isoformat(timespec="seconds").replace("+00:00", "Z")
    # Any command that looks after what is open closes a window that is over.
    argv = [sys.executable, "-P", "-c", _RESOLVE, "resolve", container.id]
    after_s = window.seconds + ALARM_GRACE_S if window.seconds else 0.0
    keep(containers, container, moved_to=target, move_id=move_id, until=until, after_s=after_s, argv=argv)
    _lead_ports(lambda: lead_ports_away(containers, container, wire), observer)


def keep_of_lost(
    host: HostConfig, journal: MoveJournal, containers: Containers, container: Container, target: str
) -> bool:
    """Of a move whose mover is gone, and whose container was lost on the target: whether its copy here is kept now, as
    the operator wanted. The window begins only here. Raises RuntimeFault or OSError, and may be called again then."""
    seconds = journal.records[0].details.get("undo_window_s")
    alive = lives(container) and containers.cgroup(container.id).frozen()
    if not isinstance(seconds, (int, float)) or seconds <= 0 or not alive:
        return False
    window = UndoWindow(seconds=seconds)
    # Not the other way round: with the record the next contact would not come here again.
    keep_copy(containers, container, target, journal.move_id, window, Silent())
    with Journal(host.journal_dir, journal.move_id, side="source", epoch=journal.records[-1].epoch) as file:
        file.append("KEEPING", window.begin())
    return True


def note_rolled_back(journal: Journal, observer: Observer) -> None:
    """It runs on here, and thawing has not waited for this record: what fails here is told, no more."""
    if problem := journal.try_append("ROLLED_BACK"):
        observer.on_event(Warning(what=problem))


def _lead_ports(lead: Callable[[], object], observer: Observer) -> None:
    try:
        lead()
    except RuntimeFault as error:
        observer.on_event(Warning(what=f"published ports do not lead to the target from here: {error}"))
