import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import UnknownReport, full_disk_is_no_room
from migrate.report import (
    Health,
    MoveReport,
    Outcome,
    PhaseTime,
    ReportedError,
    SentBytes,
    Verification,
    Versions,
    report_from_json,
)
from migrate.reports import ReportStore
from runtime.errors import BadInput, CorruptData, NoRoom
from runtime.host import HostConfig

REPORT = MoveReport(
    id="0123abcd",
    container="web1",
    source="host1",
    target="host2",
    mode="diskless",
    transport="stream",
    outcome=Outcome.MIGRATED,
    started_at="2026-01-01T12:00:00.000Z",
    total_ms=812.34567,
    blackout_ms=61.5,
    memory_bytes=64 << 20,
    sent_bytes=SentBytes(images=1000, pages=64 << 20, files=5, control=7),
    phases=(PhaseTime(name="prepare", ms=700.0), PhaseTime(name="freeze", ms=61.5)),
    health=Health(healthy=False, exit_code=3, attempts=3, ms=2.5, output="sick"),
    verify=Verification(pages=5, ms=1.5, pages_later=3, differing=1),
    versions=Versions(cmigrate="0.1.0", criu_source="4.2", criu_target="4.2", python="3.11.2"),
)
FAILED = dataclasses.replace(
    REPORT,
    id="ffff0000",
    outcome=Outcome.ROLLED_BACK,
    blackout_ms=None,
    started_at="2026-01-02T12:00:00.000Z",
    error=ReportedError(code="rolled-back", what="no", hint="do", log_lines=("Error (x): y",)),
    blockers=({"level": "blocker", "check": "name", "what": "taken", "remedy": "rename"},),
)

# The list, and what it may have beside it.
FIELDS = [
    "schema",
    "id",
    "container",
    "source",
    "target",
    "mode",
    "transport",
    "outcome",
    "started_at",
    "total_ms",
    "blackout_ms",
    "downtime_ms",
    "memory_bytes",
    "sent_bytes",
    "packed",
    "shared",
    "direct",
    "rounds",
    "fill",
    "verify",
    "phases",
    "network",
    "why",
    "predicted_blackout_ms",
    "slowed_to_cpus",
    "closed_connections",
    "resumed",
    "kept_bytes",
    "begun_again",
    "health",
    "versions",
    "error",
    "blockers",
]
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "report.md"


@pytest.fixture
def store(tmp_path: Path) -> ReportStore:
    return ReportStore(HostConfig(name="host1", state_dir=tmp_path))


@pytest.mark.parametrize("report", [REPORT, FAILED])
def test_a_report_comes_back_from_json_as_it_was(report: MoveReport) -> None:
    rounded = dataclasses.replace(report, total_ms=round(report.total_ms, 3))
    assert report_from_json(json.loads(json.dumps(report.to_json()))) == rounded


def test_the_json_has_exactly_these_fields() -> None:
    data = REPORT.to_json()
    assert list(data) == FIELDS
    assert list(data["sent_bytes"]) == ["images", "pages", "files", "control"]
    assert data["phases"] == [{"name": "prepare", "ms": 700.0}, {"name": "freeze", "ms": 61.5}]
    assert data["outcome"] == "migrated"
    assert data["total_ms"] == 812.346
    assert list(data["versions"]) == [
        "cmigrate",
        "criu_source",
        "criu_target",
        "kernel_source",
        "kernel_target",
        "python",
    ]


def test_every_field_is_documented() -> None:
    text = DOCUMENT.read_text()
    names = [*FIELDS, *REPORT.to_json()["sent_bytes"], *REPORT.to_json()["versions"], *(str(o) for o in Outcome)]
    assert not [name for name in names if f"`{name}`" not in text]


def test_a_field_of_a_newer_version_is_ignored() -> None:
    data = {**REPORT.to_json(), "prediction": {"x": 1}}
    data["sent_bytes"] = {**data["sent_bytes"], "deltas": 5}
    assert report_from_json(data).container == "web1"


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"outcome": "flown"},
        {"phases": [1]},
        {"sent_bytes": None},
        {"container": 5},
        {"versions": []},
        {"blockers": 1},
        {"error": "x"},
    ],
)
def test_a_report_that_does_not_fit_is_corrupt_data(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptData):
        report_from_json({**REPORT.to_json(), **changes})


def test_the_store_lists_newest_first(store: ReportStore) -> None:
    store.save(REPORT)
    store.save(FAILED)
    reports, warnings = store.list()
    assert [report.id for report in reports] == [FAILED.id, REPORT.id]
    assert warnings == []
    assert [report.id for report in store.list(limit=1)[0]] == [FAILED.id]


def test_a_report_is_found_by_the_beginning_of_its_id(store: ReportStore) -> None:
    store.save(REPORT)
    store.save(dataclasses.replace(REPORT, id="01ff"))
    assert store.get("0123").id == REPORT.id
    with pytest.raises(BadInput, match="fits 2 reports"):
        store.get("01")
    for unknown in ("9", "", "../0123abcd"):
        with pytest.raises(UnknownReport):
            store.get(unknown)


def test_an_id_that_begins_another_one_is_still_found(store: ReportStore) -> None:
    store.save(dataclasses.replace(REPORT, id="aa"))
    store.save(dataclasses.replace(REPORT, id="aabb"))
    assert store.get("aa").id == "aa"


def test_saving_again_replaces(store: ReportStore) -> None:
    store.save(REPORT)
    store.save(dataclasses.replace(REPORT, outcome=Outcome.IN_DOUBT))
    assert [report.outcome for report in store.list()[0]] == [Outcome.IN_DOUBT]


def test_a_damaged_report_is_a_warning_and_hides_nothing(store: ReportStore, tmp_path: Path) -> None:
    store.save(REPORT)
    for name, text in (("bad1", "{"), ("bad2", "[]"), ("bad3", "{}")):
        (tmp_path / "reports" / f"{name}.json").write_text(text)
    reports, warnings = store.list()
    assert len(reports) == 1
    assert len(warnings) == 3
    assert all("bad" in warning for warning in warnings)
    with pytest.raises(CorruptData, match=r"bad1\.json"):
        store.get("bad1")


def test_an_id_can_not_lead_out_of_the_directory(store: ReportStore) -> None:
    with pytest.raises(BadInput):
        store.save(dataclasses.replace(REPORT, id="../x"))


def test_a_report_that_can_not_be_written_leaves_nothing(store: ReportStore, tmp_path: Path) -> None:
    """A file-size limit stands for a full disk: writing fails in the middle."""
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from migrate.reports import ReportStore; from runtime.host import HostConfig\n"
        "from tests.unit.migrate.test_report import REPORT\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: ReportStore(HostConfig(name='h', state_dir=Path(sys.argv[1]))).save(REPORT)\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    top = Path(__file__).resolve().parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=top, timeout=60, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "OSError"
    assert list((tmp_path / "reports").iterdir()) == []


def test_a_full_disk_has_its_own_error() -> None:
    """/dev/full is a disk without room: what is written there fails as on one."""
    with pytest.raises(NoRoom), full_disk_is_no_room(Path("/dev/full")), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def test_what_others_have_written_meanwhile_is_kept(store: ReportStore, tmp_path: Path) -> None:
    store.save(REPORT)
    (tmp_path / "reports" / ".new-half").write_text("{")
    assert len(store.list()[0]) == 1
    assert store.list()[1] == []
