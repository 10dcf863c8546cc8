"""The host's switch for short grace periods."""

from pathlib import Path

import pytest

from runtime.linux.rcu import ExpeditedGracePeriods, turn_off_what_is_left


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    path = tmp_path / "rcu_expedited"
    path.write_text("0\n")
    return path


def value(switch: Path) -> str:
    return switch.read_text().strip()


def left(tmp_path: Path, switch: Path) -> list[Path]:
    return [path for path in tmp_path.iterdir() if path != switch]


def test_it_is_on_from_begin_to_end_and_each_can_be_said_twice(tmp_path: Path, switch: Path) -> None:
    grace = ExpeditedGracePeriods(tmp_path, switch)
    grace.end()
    assert value(switch) == "0"
    grace.begin()
    grace.begin()
    assert value(switch) == "1"
    grace.end()
    grace.end()
    assert value(switch) == "0"
    assert left(tmp_path, switch) == []


def test_what_somebody_else_has_turned_on_stays_on(tmp_path: Path, switch: Path) -> None:
    switch.write_text("1\n")
    grace = ExpeditedGracePeriods(tmp_path, switch)
    grace.begin()
    grace.end()
    assert value(switch) == "1"
    assert left(tmp_path, switch) == []


def test_where_there_is_no_such_switch_nothing_happens(tmp_path: Path) -> None:
    grace = ExpeditedGracePeriods(tmp_path, tmp_path / "not" / "there")
    grace.begin()
    grace.end()
    assert list(tmp_path.iterdir()) == []


def test_after_a_process_that_was_killed_it_is_turned_off_and_a_living_one_keeps_it(
    tmp_path: Path, switch: Path
) -> None:
    grace = ExpeditedGracePeriods(tmp_path, switch)
    grace.begin()
    turn_off_what_is_left(tmp_path, switch)
    assert value(switch) == "1"
    (marker,) = left(tmp_path, switch)
    marker.write_text(str(2**22 + 1))
    turn_off_what_is_left(tmp_path, switch)
    turn_off_what_is_left(tmp_path, switch)
    assert value(switch) == "0"
    assert left(tmp_path, switch) == []
