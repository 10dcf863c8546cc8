"""What is made of a wait for the target's last word that ends otherwise."""

from pathlib import Path

import pytest

from migrate.asking import not_seen_complete, what_became
from migrate.errors import ContainerLost, InDoubt, PeerFailed, exit_code_for
from migrate.inventory import HostEntry
from migrate.links import Session
from migrate.messages import Hello
from runtime.host import HostConfig
from transport.api import Channel, ChannelClosed
from transport.testing.memory import memory_pair


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


def session_with_nobody() -> tuple[Session, Channel]:
    """A host that is not in the inventory any more; the other end of the session is for the test to close."""
    ours, theirs = memory_pair()
    entry = HostEntry(name="nobody", ssh_host="", stream_host="")
    return Session(entry=entry, channel=ours, peer_hello=Hello(version="1", host="nobody")), theirs


def test_somebody_who_does_not_wait_is_left_in_doubt(tmp_path: Path) -> None:
    host = HostConfig(name="host1", config_dir=tmp_path, state_dir=tmp_path)
    session, far_end = session_with_nobody()
    learnt = what_became(host, session, "abc", ChannelClosed("gone"), limit_s=0.0)
    far_end.close()
    assert isinstance(learnt, InDoubt)
    assert "gone" in learnt.what


def test_what_is_in_doubt_already_is_not_asked_again(tmp_path: Path) -> None:
    doubt = InDoubt("it is")
    session, far_end = session_with_nobody()
    assert what_became(HostConfig(name="host1", config_dir=tmp_path), session, "abc", doubt, limit_s=60.0) is doubt
    far_end.close()
