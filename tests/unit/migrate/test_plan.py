import pytest

from migrate.plan import MODES, choose_mode
from runtime.errors import BadInput


def test_auto_takes_the_mode_without_disks_and_says_why() -> None:
    plan = choose_mode("auto")
    assert plan.mode == "diskless"
    assert plan.reason


@pytest.mark.parametrize("mode", MODES)
def test_what_was_asked_for_is_done(mode: str) -> None:
    assert choose_mode(mode).mode == mode


def test_an_unknown_mode_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadInput) as caught:
        choose_mode("teleport")
    assert "stopcopy" in caught.value.hint
