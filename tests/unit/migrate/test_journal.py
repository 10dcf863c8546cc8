import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import ProtocolViolation, full_disk_is_no_room
from migrate.journal import COMPLETE, RELEASING, ROOM_BYTES, Journal, read_all, read_one
from runtime.errors import NoRoom, ReadOnly, RuntimeFault


def write(directory: Path, *phases: str, move_id: str = "abc") -> Path:
    with Journal(directory, move_id, side="source", epoch=7) as journal:
        for phase in phases:
            journal.append(phase, {"n": phase.lower()})
        return journal.path


def test_records_come_back_in_order(tmp_path: Path) -> None:
    write(tmp_path / "new" / "deep", "PREPARED", "COMMITTED")
    (found,) = read_all(tmp_path / "new" / "deep")
    assert (found.move_id, found.side, found.damage) == ("abc", "source", "")
    assert [record.phase for record in found.records] == ["PREPARED", "COMMITTED"]
    assert found.phase == "COMMITTED"
    assert found.reached("PREPARED")
    assert not found.reached("DONE")
    assert found.records[0].epoch == 7
    assert found.records[0].details == {"n": "prepared"}


def test_both_sides_of_a_move_on_one_host_do_not_meet(tmp_path: Path) -> None:
    with Journal(tmp_path, "abc", side="source") as source, Journal(tmp_path, "abc", side="target") as target:
        source.append("PREPARED")
        target.append("RESERVED")
    assert [(found.side, found.phase) for found in read_all(tmp_path)] == [
        ("source", "PREPARED"),
        ("target", "RESERVED"),
    ]


def test_no_directory_means_no_moves(tmp_path: Path) -> None:
    assert read_all(tmp_path / "none") == []
    assert read_one(tmp_path, "abc", "source") is None


def test_a_move_id_can_not_lead_out_of_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ProtocolViolation):
        Journal(tmp_path, "../abc", side="source")


@pytest.mark.parametrize("torn", [b"{", b'{"move_id":"abc","epoch"', b"\xff\xfe", b"\0" * 100])
def test_a_torn_last_line_is_ignored_and_written_over(tmp_path: Path, torn: bytes) -> None:
    path = write(tmp_path, "PREPARED", "FROZEN")
    text = path.read_bytes().rstrip(b" ")
    path.write_bytes(text + torn)
    assert read_all(tmp_path)[0].phase == "FROZEN"
    assert read_all(tmp_path)[0].damage == ""
    write(tmp_path, "COMMITTED")
    (found,) = read_all(tmp_path)
    assert [record.phase for record in found.records] == ["PREPARED", "FROZEN", "COMMITTED"]
    assert found.damage == ""


@settings(max_examples=60)
@given(cut=st.integers(min_value=0, max_value=400))
def test_a_file_cut_anywhere_loses_only_whole_records_from_its_end(cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = write(directory, "PREPARED", "FROZEN", "COMMITTED")
        text = path.read_bytes().rstrip(b" ")
        path.write_bytes(text[: max(0, len(text) - cut)])
        (found,) = read_all(directory)
        phases = [record.phase for record in found.records]
        assert phases == ["PREPARED", "FROZEN", "COMMITTED"][: len(phases)]
        assert found.damage == ""
        assert len(phases) == text[: max(0, len(text) - cut)].count(b"\n")


@pytest.mark.parametrize(
    "line",
    [b"garbage", b"{}", b"[]", b'{"move_id":"other","epoch":1,"side":"source","phase":"X","at":"","details":{}}'],
)
def test_damage_before_the_end_is_named_and_what_follows_is_not_believed(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path, "PREPARED", "COMMITTED")
    first, rest = path.read_bytes().rstrip(b" ").split(b"\n", 1)
    path.write_bytes(first + b"\n" + line + b"\n" + rest)
    (found,) = read_all(tmp_path)
    assert found.phase == "PREPARED"
    assert str(path) in found.damage
    assert ":2:" in found.damage


def test_a_damaged_journal_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path, "PREPARED", move_id="a").write_bytes(b"x\n")
    write(tmp_path, "DONE", move_id="b")
    assert [(found.move_id, found.phase) for found in read_all(tmp_path)] == [("a", ""), ("b", "DONE")]


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("x")
    (tmp_path / "abc.source.jsonl.bak").write_text("x")
    assert read_all(tmp_path) == []


def test_room_is_taken_when_the_file_is_made_and_not_in_the_blackout(tmp_path: Path) -> None:
    with Journal(tmp_path, "abc", side="source") as journal:
        journal.open()
        assert journal.path.stat().st_size == ROOM_BYTES
        blocks = journal.path.stat().st_blocks
        for number in range(20):
            journal.append(f"P{number}")
        assert journal.path.stat().st_size == ROOM_BYTES
        assert journal.path.stat().st_blocks == blocks


def test_more_records_than_there_is_room_for_are_kept_too(tmp_path: Path) -> None:
    write(tmp_path, *(f"P{number}" for number in range(200)))
    (found,) = read_all(tmp_path)
    assert len(found.records) == 200
    assert found.damage == ""


def test_a_record_is_in_the_file_when_append_returns_though_the_process_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from migrate.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 'abc', side='target')\n"
        "journal.append('COMMIT_LOGGED'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=30, check=False)
    assert ended.returncode == -9
    assert read_all(tmp_path)[0].phase == "COMMIT_LOGGED"


def test_a_note_tells_more_of_a_phase_and_is_none_itself(tmp_path: Path) -> None:
    with Journal(tmp_path, "abc", side="target") as journal:
        journal.append("COMMIT_LOGGED", {"restarts": 3})
        journal.note(RELEASING)
        (seen,) = read_all(tmp_path)
        assert (seen.phase, seen.reached(RELEASING)) == ("COMMIT_LOGGED", True)
        assert (seen.details_of("COMMIT_LOGGED"), seen.details_of("RESUMED")) == ({"restarts": 3}, {})
        journal.append("RESUMED")
    assert read_all(tmp_path)[0].phase == "RESUMED"


def test_file_and_directory_are_synced_before_append_returns(tmp_path: Path) -> None:
    """The calls themselves are watched: only they tell a durable record from one in the page cache."""
    program = (
        "import sys; from pathlib import Path; from migrate import journal\n"
        "seen = []\n"
        "real = journal.os\n"
        "class Watch:\n"
        "    def __getattr__(self, name):\n"
        "        value = getattr(real, name)\n"
        "        if name not in ('fsync', 'fdatasync', 'pwrite'): return value\n"
        "        def call(fd, *rest):\n"
        "            seen.append((name, real.path.isdir(f'/proc/self/fd/{fd}')))\n"
        "            return value(fd, *rest)\n"
        "        return call\n"
        "journal.os = Watch()\n"
        "journal.Journal(Path(sys.argv[1]) / 'j', 'abc', side='target').append('COMMIT_LOGGED')\n"
        "print(seen)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=30, check=True, capture_output=True)
    assert eval(ended.stdout) == [
        ("fsync", True),  # the new directory's own entry
        ("pwrite", False),
        ("fsync", False),  # room
        ("fsync", True),  # the new file's entry
        ("pwrite", False),
        ("fdatasync", False),
    ]


def test_appending_costs_little(tmp_path: Path) -> None:
    """Generous, for a busy machine: the median is 0.1 to 0.3 ms on a virtual disk."""
    with Journal(tmp_path, "abc", side="source") as journal:
        journal.open()
        times = []
        for number in range(21):
            begin = time.perf_counter()
            journal.append(f"P{number}")
            times.append(time.perf_counter() - begin)
    median_ms = sorted(times)[10] * 1000
    print(f"append: median {median_ms:.3f} ms, worst {max(times) * 1000:.3f} ms")
    assert median_ms < 100


def test_only_root_reads_a_journal(tmp_path: Path) -> None:
    path = write(tmp_path / "journal", "PREPARED")
    assert os.stat(path).st_mode & 0o077 == 0
    assert os.stat(path.parent).st_mode & 0o077 == 0


def test_a_record_that_may_fail_says_why_and_leaves_no_trace(tmp_path: Path) -> None:
    with Journal(tmp_path, "m1", side="source") as journal:
        journal.append("PREPARED")
        before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            problem = journal.try_append("ROLLED_BACK")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)
        assert "ROLLED_BACK of move m1 is not on the disk" in problem
        (found,) = read_all(tmp_path)
        assert (found.phase, found.damage) == ("PREPARED", "")
        assert journal.try_append("ROLLED_BACK") == ""
    (found,) = read_all(tmp_path)
    assert found.phase == "ROLLED_BACK"


def test_notes_are_no_phases(tmp_path: Path) -> None:
    with Journal(tmp_path, "m1", side="target") as journal:
        journal.append("RESUMED")
        journal.note(COMPLETE)
    (found,) = read_all(tmp_path)
    assert found.phase == "RESUMED"
    assert found.reached(COMPLETE)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, NoRoom), (errno.EIO, ReadOnly), (errno.EROFS, ReadOnly)])
def test_an_error_of_the_disk_names_the_file_and_a_way_out(number: int, kind: type[RuntimeFault]) -> None:
    with pytest.raises(kind) as caught, full_disk_is_no_room(Path("/some/journal")):
        raise OSError(number, os.strerror(number))
    assert "/some/journal" in caught.value.what
    assert caught.value.hint
