"""What is made of a wait for the target's last word that ends otherwise."""

import pytest

from migrate.asking import not_seen_complete
from migrate.errors import ContainerLost, PeerFailed, exit_code_for


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConnectionError("gone"), PeerFailed("disk", code="no-room")])
def test_a_container_that_runs_there_was_moved_and_its_files_here_are_told_of(error: BaseException) -> None:
    warning = not_seen_complete(error, "web1")
    assert "not seen" in warning.what
    assert "cmigrate resolve web1" in warning.remedy


def test_one_that_the_target_lost_is_lost() -> None:
    with pytest.raises(ContainerLost, match="pager") as raised:
        not_seen_complete(PeerFailed("the pager died", code="lost"), "web1")
    assert exit_code_for(raised.value) == exit_code_for(ContainerLost("x"))
    with pytest.raises(ContainerLost):
        not_seen_complete(ContainerLost("x"), "web1")
