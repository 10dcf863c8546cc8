"""Events of a move, and who watches them: a terminal, a script, or nobody.

Between freeze and resume an observer must not print, log or block: every microsecond there is blackout. ``Held`` wraps
any observer and keeps what happens meanwhile for later; the wiring always puts it in front.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TextIO, TypeAlias

from migrate.plan import Prediction
from migrate.report import MoveReport, Outcome

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

PROGRESS_INTERVAL_S = 0.1
"""Progress more often than this is not shown: neither eyes nor scripts gain by it."""


@dataclass(frozen=True, kw_only=True)
class MoveStarted:
    """``move_id`` names the report that will be kept."""

    KIND: ClassVar[str] = "move-started"
    move_id: str
    container: str
    source: str
    target: str
    mode: str
    transport: str


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What each mode is predicted to take, the chosen ``mode``, and ``why``."""

    KIND: ClassVar[str] = "plan"
    mode: str
    why: str
    predictions: tuple[Prediction, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    KIND: ClassVar[str] = "phase-started"
    name: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """``total_bytes`` is 0 where nobody knows it; ``kind`` is what is sent: files, images or pages."""

    KIND: ClassVar[str] = "progress"
    phase: str
    kind: str
    sent_bytes: int
    total_bytes: int = 0
    rate_Bps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RoundEnded:
    """One round of pre-copy. ``dirty_bytes`` is what the target lacks now; ``decision`` continue, freeze, throttle or
    stop, for ``reasons``; ``cpus`` what the container is slowed to; ``remaining_s`` until it runs on the target."""

    KIND: ClassVar[str] = "round"
    round: int
    ms: float
    sent_bytes: int
    rate_Bps: float
    dirty_bytes: int
    dirty_rate_Bps: float
    predicted_blackout_ms: float
    remaining_s: float
    decision: str
    cpus: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PhaseEnded:
    KIND: ClassVar[str] = "phase-ended"
    name: str
    ms: float


@dataclass(frozen=True, kw_only=True)
class Warning:
    """Something the operator should know that does not stop the move."""

    KIND: ClassVar[str] = "warning"
    what: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class LinkLost:
    """The link to the target broke, or another attempt to bring it back begins; ``limit_s`` is for all of them."""

    KIND: ClassVar[str] = "link-lost"
    why: str
    waited_s: float
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class LinkBack:
    """``resumed``: the move goes on where it was. Otherwise it begins again, for the target has lost what it had."""

    KIND: ClassVar[str] = "link-back"
    after_s: float
    resumed: bool
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class MoveEnded:
    """The last event of every move, however it ended."""

    KIND: ClassVar[str] = "report"
    report: MoveReport


Event: TypeAlias = (
    MoveStarted
    | Planned
    | PhaseStarted
    | Progress
    | RoundEnded
    | PhaseEnded
    | Warning
    | LinkLost
    | LinkBack
    | MoveEnded
)


class Observer(Protocol):
    def on_event(self, event: Event) -> None:
        """Must not raise: a move does not fail because nobody can watch it."""
        ...


def event_to_json(event: Event) -> dict[str, Any]:
    """One line of ``--json``: ``type`` and the event's fields; of a report, its own fields."""
    if isinstance(event, MoveEnded):
        return {"type": event.KIND, **event.report.to_json()}
    if isinstance(event, Planned):
        predictions = [rounded(dataclasses.asdict(prediction)) for prediction in event.predictions]
        return {"type": event.KIND, "mode": event.mode, "why": event.why, "predictions": predictions}
    return {"type": event.KIND, **rounded(dict(_fields(event)))}


def rounded(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}


def _fields(event: Event) -> Iterator[tuple[str, Any]]:
    return ((entry.name, getattr(event, entry.name)) for entry in dataclasses.fields(event))


class Silent:
    """Nobody watches."""

    def on_event(self, event: Event) -> None:
        pass


class Held:
    """In front of another observer: passes events on, but keeps those of a blackout until it is over."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._kept: list[Event] = []
        self._holding = False

    def on_event(self, event: Event) -> None:
        if self._holding:
            self._kept.append(event)
        else:
            self._observer.on_event(event)

    @contextlib.contextmanager
    def blackout(self) -> Iterator[None]:
        """Within this block nothing reaches the observer; afterwards everything does, in order."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            kept, self._kept = self._kept, []
            for event in kept:
                self._observer.on_event(event)


class JsonLines:
    """One JSON object a line on ``stream`` (stdout), the report last."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO | None = stream
        self._now = now
        self._shown_at = -PROGRESS_INTERVAL_S

    def on_event(self, event: Event) -> None:
        if self._stream is None:
            return
        if isinstance(event, Progress):
            if self._now() - self._shown_at < PROGRESS_INTERVAL_S:
                return
            self._shown_at = self._now()
        try:
            self._stream.write(json.dumps(event_to_json(event), separators=(",", ":")) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            # The reader went away (head, a closed pipe). The move goes on, the report is kept on disk.
            self._stream = None


class Terminal:
    """For people: on a terminal a live display on stderr, else one line on stderr at the end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._display = _LiveDisplay(self._stream) if self._stream.isatty() else None

    def on_event(self, event: Event) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._display is not None:
                self._display.on_event(event)
            if isinstance(event, Warning):
                remedy = f" ({event.remedy})" if event.remedy else ""
                self._say(f"warning: {event.what}{remedy}")
            if isinstance(event, (LinkLost, LinkBack)):
                self._say(link_text(event))
            # A refused report without an error is a dry run's; of a failure the error tells.
            if isinstance(event, MoveEnded) and event.report.outcome is Outcome.MIGRATED:
                self._say(summary(event.report))

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class _LiveDisplay:
    """rich's live display; it stands still in a blackout because no event comes then and nothing refreshes itself."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console: Console = Console(file=stream, highlight=False, markup=False)
        self._live: Live | None = None
        self._done: list[tuple[str, float]] = []
        self._phase = ""
        self._progress: Progress | None = None
        self._round: RoundEnded | None = None
        self._title = ""
        self._shown_at = 0.0

    def on_event(self, event: Event) -> None:
        match event:
            case MoveStarted():
                self._title = f"{event.container}: {event.source} -> {event.target} ({event.mode}, {event.transport})"
                self._start()
            case PhaseStarted():
                self._phase, self._progress, self._round = event.name, None, None
            case PhaseEnded():
                self._done.append((event.name, event.ms))
                self._phase, self._progress = "", None
            case RoundEnded():
                self._round = event
            case Progress():
                self._progress = event
                if time.monotonic() - self._shown_at < PROGRESS_INTERVAL_S:
                    return
            case MoveEnded():
                self._stop()
                return
            case _:
                return
        self._show()

    def _start(self) -> None:
        from rich.live import Live

        # Refreshing itself would mean a thread that prints in the blackout.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._text(), refresh=True)
            self._shown_at = time.monotonic()

    def _text(self) -> str:
        lines = [self._title]
        lines += [f"  {name:<12} {ms:>10.1f} ms" for name, ms in self._done]
        if self._phase:
            text = progress_text(self._progress) if self._round is None else round_text(self._round)
            lines.append(f"  {self._phase:<12} {text}")
        return "\n".join(lines)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def round_text(done: RoundEnded) -> str:
    """ "3: 12.0 MiB at 850.1 MiB/s, dirtied at 20.0 MiB/s, blackout now 110 ms, 0.1 s left" """
    parts = [
        f"{done.round}: {mebibytes(done.sent_bytes)} at {mebibytes(done.rate_Bps)}/s",
        f"dirtied at {mebibytes(done.dirty_rate_Bps)}/s",
        f"blackout now {done.predicted_blackout_ms:.0f} ms",
    ]
    if done.cpus is not None:
        parts.append(f"slowed to {done.cpus:.2f} processors")
    return ", ".join([*parts, f"{done.remaining_s:.1f} s left"])


def progress_text(progress: Progress | None) -> str:
    """ "12.0 MiB of 64.0 MiB, 850.1 MiB/s, 0.1 s left", as much of it as is known."""
    if progress is None:
        return "…"
    parts = [mebibytes(progress.sent_bytes)]
    if progress.total_bytes:
        parts[0] += f" of {mebibytes(progress.total_bytes)}"
    if progress.rate_Bps > 0:
        parts.append(f"{mebibytes(progress.rate_Bps)}/s")
        if progress.total_bytes > progress.sent_bytes:
            parts.append(f"{(progress.total_bytes - progress.sent_bytes) / progress.rate_Bps:.1f} s left")
    return ", ".join(parts)


def link_text(event: LinkLost | LinkBack) -> str:
    """ "link lost: host2 closed the connection; trying again (2 of 30 s)" """
    if isinstance(event, LinkLost):
        return f"link lost: {event.why}; trying again ({event.waited_s:.0f} of {event.limit_s:g} s)"
    if event.resumed:
        return f"link back after {event.after_s:.1f} s: going on"
    return f"link back: beginning again, for {event.why}"


def mebibytes(count: float) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def summary(report: MoveReport) -> str:
    """One line: what became of the move."""
    blackout = "" if report.blackout_ms is None else f", blackout {report.blackout_ms:.1f} ms"
    if report.downtime_ms is not None:
        blackout += f", downtime {report.downtime_ms:.1f} ms"
    what = {
        Outcome.MIGRATED: f"{report.container} runs on {report.target}",
        Outcome.ROLLED_BACK: f"{report.container} runs on, on {report.source}",
        Outcome.IN_DOUBT: f"{report.container} is in doubt between {report.source} and {report.target}",
        Outcome.LOST: f"{report.container} was lost on {report.target}",
        Outcome.REFUSED: f"{report.container} was not moved",
    }[report.outcome]
    sent = mebibytes(report.sent_bytes.total)
    way = f"{report.transport}, direct" if report.direct else report.transport
    return f"{what}: {report.mode} by {way}{blackout}, total {report.total_ms:.0f} ms, {sent} sent"
