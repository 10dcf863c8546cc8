"""What a container wrote is what is read back: in order, whole, once, whatever cut it into pieces."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.logs import MAX_ENTRY_BYTES, LogWriter, parse_entry, read_log, rotated

TOP = Path(__file__).resolve().parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def write(path: Path, *pieces: tuple[str, bytes], max_bytes: int = 1 << 20) -> None:
    writer = LogWriter(path, max_bytes=max_bytes)
    for stream, data in pieces:
        writer.write(stream, data)
    writer.close()


def texts(path: Path, stream: str = "stdout", tail: int | None = None) -> list[str]:
    return [line.text for line in read_log(path, tail=tail) if line.stream == stream]


def test_lines_come_back_in_order_with_stream_and_time(path: Path) -> None:
    write(path, ("stdout", b"one\ntwo\n"), ("stderr", b"oops\n"), ("stdout", b"three\n"))
    lines = list(read_log(path))
    assert [(line.stream, line.text) for line in lines] == [
        ("stdout", "one"),
        ("stdout", "two"),
        ("stderr", "oops"),
        ("stdout", "three"),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", line.at) for line in lines)
    assert [line.at for line in lines] == sorted(line.at for line in lines)


def test_an_entry_is_one_json_object_a_line_that_anybody_can_read(path: Path) -> None:
    write(path, ("stdout", "grüße\tund \u2028 mehr\r\n".encode()))
    (entry,) = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    assert entry.pop("t").endswith("Z")
    assert entry == {"s": "stdout", "l": "grüße\tund \u2028 mehr\r"}


def test_a_line_in_pieces_is_whole_and_streams_do_not_mix(path: Path) -> None:
    write(
        path, ("stdout", b"pass"), ("stderr", b"warn"), ("stdout", b"word: "), ("stderr", b"ing\n"), ("stdout", b"\n")
    )
    assert [(line.stream, line.text) for line in read_log(path)] == [("stderr", "warning"), ("stdout", "password: ")]


def test_what_is_written_is_in_the_file_at_once_even_without_a_line_feed(path: Path) -> None:
    writer = LogWriter(path)
    writer.write("stdout", b"prompt> ")
    assert texts(path) == ["prompt> "]
    writer.close()


def test_a_line_that_began_on_one_host_ends_on_another(path: Path) -> None:
    write(path, ("stdout", b"half "))
    write(path, ("stdout", b"whole\n"))
    assert texts(path) == ["half whole"]


def test_a_character_cut_in_two_is_whole_again_and_bytes_that_are_none_are_marked(path: Path) -> None:
    data = "日本\n".encode()
    write(path, *(("stdout", data[index : index + 1]) for index in range(len(data))), ("stdout", b"a\xffb\n"))
    assert texts(path) == ["日本", "a\ufffdb"]


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_any_bytes_cut_anywhere_come_back(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    write(path, *(("stdout", data[begin:end]) for begin, end in itertools.pairwise(places)))
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert texts(path) == [line.decode(errors="replace") for line in expected]


# Choosing


def test_the_last_lines_can_be_asked_for(path: Path) -> None:
    write(path, ("stdout", b"".join(b"%d\n" % number for number in range(10))), ("stdout", b"unfinished"))
    assert texts(path, tail=3) == ["8", "9", "unfinished"]
    assert texts(path, tail=0) == []
    assert len(texts(path, tail=100)) == 11


def test_lines_since_a_time_can_be_asked_for(path: Path) -> None:
    times = ["2026-01-31T12:00:00.000000001Z", "2026-01-31T12:00:00.500000000Z", "2026-01-31T12:00:01.000000000Z"]
    path.write_text("".join(json.dumps({"t": at, "s": "stdout", "l": at}) + "\n" for at in times))
    assert [line.at for line in read_log(path, since="2026-01-31T12:00:00.5Z")] == times[1:]
    assert [line.at for line in read_log(path, since="2026-01-31T12:00:00Z")] == times
    assert [line.at for line in read_log(path, since="2026-01-31T12:00:00Z", tail=1)] == times[2:]
    assert list(read_log(path, since="2027-01-01T00:00:00Z")) == []


def test_a_log_that_is_not_there_is_empty(path: Path) -> None:
    assert list(read_log(path)) == []


# Rotation


def test_a_full_file_is_set_aside_once_and_read_before_the_new_one(path: Path) -> None:
    writer = LogWriter(path, max_bytes=600)
    for number in range(15):
        writer.write("stdout", b"%d\n" % number)
    writer.close()
    assert rotated(path).exists()
    assert texts(path) == [str(number) for number in range(15)]
    assert path.stat().st_size < 1200


def test_of_a_log_without_end_the_newest_part_is_kept(path: Path) -> None:
    write(path, *(("stdout", b"%d\n" % number) for number in range(200)), max_bytes=600)
    kept = texts(path)
    assert kept == [str(number) for number in range(200 - len(kept), 200)]
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 2400


def test_a_line_that_crosses_a_rotation_is_whole(path: Path) -> None:
    write(path, ("stdout", b"x" * 700), ("stdout", b"y\n"), max_bytes=600)
    assert rotated(path).exists()
    assert texts(path) == ["x" * 700 + "y"]


# Following


def test_following_gives_what_is_added_until_told_that_no_more_comes(path: Path) -> None:
    writer = LogWriter(path, max_bytes=700)
    writer.write("stdout", b"first\n")
    numbers = iter(range(8))

    def more() -> bool:
        number = next(numbers, None)
        if number is None:
            writer.write("stdout", b"last")
            return False
        writer.write("stdout", b"%d" % number)
        writer.write("stdout", b"\n")
        return True

    found = [line.text for line in read_log(path, follow=more)]
    writer.close()
    assert rotated(path).exists()
    assert found == ["first", *map(str, range(8)), "last"]


def test_following_begins_with_the_tail_and_waits_for_a_log_that_is_not_there_yet(path: Path) -> None:
    answers = iter([True, True, False])

    def more() -> bool:
        answer = next(answers)
        if not path.exists():
            write(path, ("stdout", b"a\nb\n"))
        return answer

    assert [line.text for line in read_log(path, tail=0, follow=more)] == ["a", "b"]


def test_a_reader_beside_a_writer_sees_every_line_once(path: Path) -> None:
    done = threading.Event()

    def fill() -> None:
        writer = LogWriter(path, max_bytes=1 << 30)
        for number in range(3000):
            writer.write("stdout", b"%d\n" % number)
        writer.close()
        done.set()

    thread = threading.Thread(target=fill)
    thread.start()
    found = [line.text for line in read_log(path, follow=lambda: not done.is_set())]
    thread.join(10)
    assert found == [str(number) for number in range(3000)]


def test_a_reader_that_is_given_up_closes_its_files(path: Path) -> None:
    write(path, ("stdout", b"a\nb\n"))
    lines = read_log(path)
    assert next(lines).text == "a"
    lines.close()  # type: ignore[attr-defined]


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        b"\n",
        b"garbage\n",
        b"[]\n",
        b'{"t": 1, "s": "stdout", "l": "x"}\n',
        b'{"t": "2026", "s": "stdin", "l": "x"}\n',
        b'{"t": "2026", "s": ["stdout"], "l": "x"}\n',
        b'{"t": "2026", "s": "stdout", "l": null}\n',
        b'{"t": "2026", "s": "stdout"}\n',
        b'{"t": "2026", "s": "stdout", "l": "x", "d": "many"}\n',
        b'{"t": "2026-01-31T12:00:00.000Z", "s": "stdo',
        b"[" * 50_000 + b"\n",
        b"\x00\xff\n",
        b"x" * (3 * MAX_ENTRY_BYTES + 5) + b"\n",
    ],
)
def test_damage_is_passed_over_and_does_not_tear_what_follows(path: Path, damage: bytes) -> None:
    write(path, ("stdout", b"before\n"))
    with path.open("ab") as file:
        file.write(damage)
    write(path, ("stdout", b"after\n"))
    assert texts(path) == ["before", "after"]


def test_half_a_surrogate_pair_from_a_peer_does_no_harm() -> None:
    entry = parse_entry(b'{"t": "2026", "s": "stdout", "l": "\\ud83d"}')
    assert entry is not None


def test_a_line_without_end_does_not_fill_the_memory(path: Path) -> None:
    write(path, *[("stdout", b"x" * 60_000)] * 40, max_bytes=1 << 30)
    found = texts(path)
    assert "".join(found) == "x" * 60_000 * 40
    assert max(map(len, found)) < 1_200_000


# No room


def test_lines_for_which_there_is_no_room_are_counted_and_told_of_later(path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = LogWriter(path)
    writer.write("stdout", b"kept\n")
    # A limit on file sizes fails a write half way as a full disk does. (Python ignores SIGXFSZ.)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, before[1]))
    try:
        writer.write("stdout", b"lost\nlost too\n")
        writer.write("stderr", b"lost as well")
        assert writer.dropped_lines == 3
        assert texts(path) == ["kept"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.write("stdout", b"there is room\n")
    assert writer.dropped_lines == 0
    writer.close()
    assert texts(path) == ["kept", "there is room"]
    assert texts(path, "stderr") == ["cmigrate: 3 lines are missing here: there was no room for them"]


def test_the_module_runs_in_a_monitor_that_has_the_standard_library_only(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from runtime.logs import LogWriter\n"
        "w = LogWriter(Path(sys.argv[2])); w.write('stdout', b'hello\\n'); w.close()"
    )
    argv = [sys.executable, "-I", "-S", "-B", "-c", program, str(TOP), str(path)]
    subprocess.run(argv, check=True, timeout=20, env={})
    assert texts(path) == ["hello"]
    assert os.stat(path).st_mode & 0o777 == 0o600
