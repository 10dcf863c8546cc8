from pathlib import Path

from migrate.errors import ContainerLost
from migrate.journal import Journal, read_one
from migrate.losses import report_loss, report_loss_of
from migrate.report import Outcome
from migrate.reports import ReportStore
from runtime.errors import RuntimeFault
from runtime.host import HostConfig


def test_a_loss_that_only_the_journal_knows_of_is_reported_as_one(tmp_path: Path) -> None:
    host = HostConfig(name="host2", state_dir=tmp_path)
    with Journal(tmp_path / "journal", "abc", side="target") as journal:
        journal.append("RESERVED", {"mode": "postcopy"})
    found = read_one(tmp_path / "journal", "abc", "target")
    assert found is not None
    report_loss_of(host, found, "web1", source="host1", target="host2", why="the agent died")
    (report,), warnings = ReportStore(host).list()
    assert not warnings
    assert (report.id, report.outcome, report.mode) == ("abc", Outcome.LOST, "postcopy")
    assert (report.container, report.source, report.target) == ("web1", "host1", "host2")
    assert report.started_at == found.records[0].at
    assert report.error is not None
    assert report.error.code == "lost"
    assert report.error.what.endswith("the agent died")
    assert report.error.hint


def test_a_report_that_can_not_be_kept_hides_no_loss(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    report_loss(
        HostConfig(name="host2", state_dir=tmp_path / "file"),
        ContainerLost.because(RuntimeFault("the pager died")),
        move_id="abc",
        container="web1",
        source="host1",
        target="host2",
        mode="postcopy",
        started_at="2026-01-01T12:00:00.000Z",
    )
