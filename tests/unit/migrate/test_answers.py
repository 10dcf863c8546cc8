"""What an agent answers about a move that another session of this host is at: here, another thread."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate import messages
from migrate.answers import answer_ask, answer_offer
from migrate.errors import MoveRefused
from migrate.journal import Journal, boot_id, read_one
from migrate.session import Asked
from migrate.waiting import WaitingRoom
from runtime.host import HostConfig
from runtime.store import process_start_ticks
from tests.unit.migrate.preflight_values import SPEC
from transport.api import Deadline
from transport.renewable import RenewableChannel
from transport.testing.memory import memory_pair

MOVE = "abc"


def host_at(directory: Path) -> HostConfig:
    return HostConfig(name="host2", config_dir=directory, state_dir=directory / "state", run_dir=directory / "run")


def told(host: HostConfig, answering: Callable[[Asked], None]) -> dict[str, object]:
    ours, theirs = memory_pair()
    with ours, theirs:
        answering(Asked(host=host, channel=theirs, peer_hello=messages.Hello(version="1", host="host1")))
        return ours.receive(deadline=Deadline.after(30)).message()


def test_a_session_that_reserves_still_when_its_source_asks_undoes_it_before_the_answer(tmp_path: Path) -> None:
    """Its link broke while it was at that: it waits for nobody yet, and would be in the next attempt's way."""
    host = host_at(tmp_path)
    ours, theirs = memory_pair()
    session = RenewableChannel(theirs)
    room = WaitingRoom(host.run_dir, MOVE, session, reconnect_s=600.0, output=(), notice_s=0.0)
    reserved, has_asked = threading.Event(), threading.Event()

    def reserve_and_wait() -> None:
        with Journal(host.journal_dir, MOVE, side="target") as journal:
            who = {"pid": os.getpid(), "pid_start": process_start_ticks(os.getpid()), "boot": boot_id()}
            journal.append("RESERVED", {"container": SPEC.id, "source": "host1", **who})
            reserved.set()
            has_asked.wait(30)
            room.open()
            with pytest.raises(MoveRefused, match="given it up"):
                room.through(lambda: session.receive(deadline=Deadline.after(30)), lambda: 0)
            journal.append("REFUSED")
            room.close()

    reserving = threading.Thread(target=reserve_and_wait)
    reserving.start()
    reserved.wait(30)
    threading.Timer(0.1, has_asked.set).start()
    question = messages.Ask(move_id=MOVE, epoch=1).to_message()
    answer = told(host, lambda asked: answer_ask(asked, question))
    reserving.join(30)
    ours.close()
    session.close()
    assert answer["state"] == "refused"


def test_an_offer_that_comes_after_the_question_about_it_is_refused(tmp_path: Path) -> None:
    """Otherwise a reservation would stand that its source believes to be refused for good."""
    host = host_at(tmp_path)
    question = messages.Ask(move_id=MOVE, epoch=1).to_message()
    assert told(host, lambda asked: answer_ask(asked, question))["state"] == "refused"
    offer = messages.Offer(move_id=MOVE, epoch=1, mode="precopy", spec=SPEC).to_message()
    with pytest.raises(MoveRefused, match="before its offer came"):
        told(host, lambda asked: answer_offer(asked, offer))
    journal = read_one(host.journal_dir, MOVE, "target")
    assert journal is not None
    assert [record.phase for record in journal.records] == ["REFUSED"]
