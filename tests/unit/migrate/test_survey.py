"""Measuring the link, between two ends in one process."""

import threading
from contextlib import suppress
from pathlib import Path

import pytest

from migrate.errors import ProtocolViolation
from migrate.messages import Hello
from migrate.session import Asked
from migrate.survey import MAX_PROBE_BYTES, answer_measure, measure_rate_Bps
from runtime.host import HostConfig
from transport.api import Channel, ChannelClosed, Deadline, Frame
from transport.testing.memory import memory_pair


def asked(channel: Channel, tmp_path: Path) -> Asked:
    host = HostConfig(name="host2", state_dir=tmp_path)
    return Asked(host=host, channel=channel, peer_hello=Hello(version="0", host="host1"))


def test_a_link_is_measured_by_what_the_other_end_took_in(tmp_path: Path) -> None:
    ours, theirs = memory_pair()

    def answer() -> None:
        for _ in range(2):
            message = theirs.receive(deadline=Deadline.after(10)).message()
            answer_measure(asked(theirs, tmp_path), message)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with ours, theirs:
        assert measure_rate_Bps(ours) > 1e6
        assert not ours.readable(0)


@pytest.mark.parametrize(("most_bytes", "sent"), [(0, [256 << 10]), (1 << 20, [256 << 10, 1 << 20])])
def test_a_measurement_sends_no_more_than_it_may(tmp_path: Path, most_bytes: int, sent: list[int]) -> None:
    ours, theirs = memory_pair()
    heard: list[object] = []

    def answer() -> None:
        with suppress(ChannelClosed):
            for _ in sent:
                message = theirs.receive(deadline=Deadline.after(60)).message()
                heard.append(message["bytes"])
                answer_measure(asked(theirs, tmp_path), message)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with ours, theirs:
        measure_rate_Bps(ours, most_bytes)
        # A probe that took long ends a measurement early.
        assert heard == sent[: len(heard)]
        assert not ours.readable(0)
    thread.join(1)


@pytest.mark.parametrize("count", [0, -1, MAX_PROBE_BYTES + 1, "many", None])
def test_a_measurement_that_is_none_is_refused(tmp_path: Path, count: object) -> None:
    ours, theirs = memory_pair()
    with ours, theirs, pytest.raises(ProtocolViolation):
        answer_measure(asked(theirs, tmp_path), {"type": "measure", "bytes": count})


def test_a_peer_that_answers_something_else_is_named() -> None:
    ours, theirs = memory_pair()

    def answer_wrongly() -> None:
        for _ in range(2):  # the announcement and its data
            theirs.receive(deadline=Deadline.after(10))
        theirs.send(Frame.control({"type": "pong", "token": 1}), deadline=Deadline.after(10))

    thread = threading.Thread(target=answer_wrongly, daemon=True)
    thread.start()
    with ours, theirs, pytest.raises(ProtocolViolation):
        measure_rate_Bps(ours)
    thread.join(10)
