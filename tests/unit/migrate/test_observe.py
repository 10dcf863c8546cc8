import contextlib
import io
import json

from migrate.observe import (
    Event,
    Held,
    JsonLines,
    MoveEnded,
    MoveStarted,
    PhaseEnded,
    PhaseStarted,
    Progress,
    Silent,
    Terminal,
    Warning,
    progress_text,
)
from tests.unit.migrate.test_report import FAILED, REPORT

STARTED = MoveStarted(
    move_id="abc", container="web1", source="host1", target="host2", mode="diskless", transport="stream"
)
EVENTS: list[Event] = [
    STARTED,
    PhaseStarted(name="prepare"),
    Progress(phase="prepare", kind="files", sent_bytes=1 << 20, total_bytes=4 << 20, rate_Bps=float(1 << 20)),
    PhaseEnded(name="prepare", ms=12.34567),
    Warning(what="slow link", remedy="use a faster one"),
    MoveEnded(report=REPORT),
]


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_every_event_is_one_json_line_and_the_report_is_last() -> None:
    stream = io.StringIO()
    observer = JsonLines(stream)
    for event in EVENTS:
        observer.on_event(event)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["type"] for line in lines] == [
        "move-started",
        "phase-started",
        "progress",
        "phase-ended",
        "warning",
        "report",
    ]
    assert lines[-1] == {"type": "report", **REPORT.to_json()}
    assert lines[3] == {"type": "phase-ended", "name": "prepare", "ms": 12.346}


def test_progress_is_shown_ten_times_a_second_at_most() -> None:
    stream = io.StringIO()
    now = [0.0]
    observer = JsonLines(stream, now=lambda: now[0])
    for tick in range(1000):
        now[0] = tick / 1000
        observer.on_event(Progress(phase="copy", kind="pages", sent_bytes=tick))
    assert 9 <= len(stream.getvalue().splitlines()) <= 11


def test_a_reader_that_goes_away_does_not_end_the_move() -> None:
    for observer in (JsonLines(Broken()), Terminal(Broken())):
        for event in EVENTS:
            observer.on_event(event)


def test_nothing_reaches_the_observer_in_a_blackout_and_everything_afterwards() -> None:
    recorder = Recorder()
    held = Held(recorder)
    held.on_event(STARTED)
    with held.blackout():
        held.on_event(EVENTS[1])
        held.on_event(EVENTS[3])
        assert recorder.events == [STARTED]
    held.on_event(EVENTS[5])
    assert recorder.events == [STARTED, EVENTS[1], EVENTS[3], EVENTS[5]]


def test_what_happened_in_a_blackout_is_shown_though_it_failed() -> None:
    recorder = Recorder()
    held = Held(recorder)
    with contextlib.suppress(RuntimeError), held.blackout():
        held.on_event(EVENTS[1])
        raise RuntimeError
    assert recorder.events == [EVENTS[1]]


def test_without_a_terminal_there_is_one_line_at_the_end_and_warnings() -> None:
    stream = io.StringIO()
    observer = Terminal(stream)
    for event in EVENTS:
        observer.on_event(event)
    assert stream.getvalue().splitlines() == [
        "warning: slow link (use a faster one)",
        "web1 runs on host2: diskless by stream, blackout 61.5 ms, total 812 ms, 64.0 MiB sent",
    ]


def test_a_failed_move_leaves_the_words_to_the_error() -> None:
    stream = io.StringIO()
    Terminal(stream).on_event(MoveEnded(report=FAILED))
    assert stream.getvalue() == ""


def test_a_terminal_shows_phases_and_ends_with_the_summary() -> None:
    stream = Tty()
    observer = Terminal(stream)
    for event in EVENTS:
        observer.on_event(event)
    text = stream.getvalue()
    assert "web1: host1 -> host2 (diskless, stream)" in text
    assert "prepare" in text
    assert "12.3 ms" in text
    assert text.rstrip().splitlines()[-1].endswith("64.0 MiB sent")


def test_a_terminal_is_given_back_when_the_move_fails() -> None:
    stream = Tty()
    observer = Terminal(stream)
    observer.on_event(STARTED)
    assert "\x1b[?25l" in stream.getvalue()
    observer.on_event(MoveEnded(report=FAILED))
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_nobody_watching_is_fine() -> None:
    for event in EVENTS:
        Silent().on_event(event)


def test_progress_says_as_much_as_is_known() -> None:
    assert progress_text(None) == "…"
    assert progress_text(Progress(phase="x", kind="pages", sent_bytes=1 << 20)) == "1.0 MiB"
    known = Progress(phase="x", kind="pages", sent_bytes=1 << 20, total_bytes=3 << 20, rate_Bps=float(4 << 20))
    assert progress_text(known) == "1.0 MiB of 3.0 MiB, 4.0 MiB/s, 0.5 s left"
