"""A link that breaks before the freeze: the move goes on where it was, or begins again, and nobody has to do anything.

The rounds are slowed down so that the fault can not miss them, on whatever machine.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.chaos_faults import VICTIMS, Going, fault, processes
from tests.support.lab import HOSTS, TwoHosts, nothing_left_on
from tests.support.services import Memory

pytestmark = pytest.mark.timeout(300)

MIB = 1 << 20
MEMORY_MIB = 16
SLOW = ("--bandwidth", f"{6 * MIB}")
"""Round 0, of this memory and of what Python has itself, takes four seconds."""


class Busy:
    """A container with memory that is written to and knows what must be in it."""

    def __init__(self, hosts: TwoHosts) -> None:
        self._service = Memory(mib=MEMORY_MIB, hot_mib=1)
        self.running = hosts.run(self._service)

    def must_be_well(self) -> None:
        self._service.check()
        self.running.networks_are_as_before()

    def move_and_break(self, transport: str, what: str, *options: str) -> tuple[int, list[dict[str, Any]]]:
        """The exit code and the events of a move in whose first round ``what`` happens."""
        running = self.running
        words = ("move", running.name, "--to", running.other, "--mode", "precopy", "--transport", transport, "--verify")
        going = Going(running.hosts, running.host, running.other, (*words, "--json", *SLOW, *options))
        assert going.wait_for("rounds"), "".join(going.errors)
        time.sleep(0.5)  # a part of the memory is there by then
        with fault(running.hosts, going, what) as hit:
            assert hit
        assert going.wait(120)
        return going.process.returncode, [json.loads(line) for line in going.lines]

    def close(self) -> None:
        self._service.close()
        self.running.remove()


@pytest.fixture
def busy(two_hosts: TwoHosts) -> Iterator[Busy]:
    with nothing_left_on(two_hosts, *HOSTS), contextlib.closing(Busy(two_hosts)) as busy:
        yield busy


@pytest.mark.parametrize(
    ("transport", "what", "direct"), [("stream", "reset", "auto"), ("ssh", "reset", "auto"), ("ssh", "sshd", "never")]
)
def test_what_has_arrived_is_not_sent_again(busy: Busy, transport: str, what: str, direct: str) -> None:
    code, events = busy.move_and_break(transport, what, "--direct", direct)
    report = events[-1]
    assert (code, report["outcome"]) == (0, "migrated"), report
    busy.running.host = busy.running.other
    assert (report["resumed"], report["begun_again"]) == (1, 0)
    assert report["kept_bytes"] > MIB
    assert [event["resumed"] for event in events if event["type"] == "link-back"] == [True]
    busy.must_be_well()


def test_a_target_that_has_lost_everything_gets_it_again(busy: Busy) -> None:
    code, events = busy.move_and_break("stream", "agent")
    report = events[-1]
    assert (code, report["outcome"]) == (0, "migrated"), report
    busy.running.host = busy.running.other
    assert (report["resumed"], report["begun_again"]) == (0, 1)
    busy.must_be_well()


@pytest.mark.parametrize(("transport", "direct"), [("stream", "auto"), ("ssh", "never")])
def test_a_link_that_breaks_while_the_target_reserves(busy: Busy, transport: str, direct: str) -> None:
    """The session there is stopped for a moment, so that the source is back while it is at it still."""
    running = busy.running
    words = ("move", running.name, "--to", running.other, "--mode", "precopy", "--transport", transport)
    going = Going(running.hosts, running.host, running.other, (*words, "--direct", direct, "--json"))
    assert going.wait_for("RESERVED"), "".join(going.errors)
    sessions = [pid for pid, _argv in processes(running.hosts, running.other, VICTIMS["agent"][1])]
    for pid in sessions:
        os.kill(pid, signal.SIGSTOP)
    try:
        with fault(running.hosts, going, "reset") as hit:
            assert hit
        while not any('"type":"link-lost"' in line for line in going.lines):
            assert not going.over(), "".join(going.errors)
            time.sleep(0.01)
        time.sleep(0.5)  # it is back, and asks
    finally:
        for pid in sessions:
            os.kill(pid, signal.SIGCONT)
    assert going.wait(120)
    report = json.loads(going.lines[-1])
    assert (going.process.returncode, report["outcome"]) == (0, "migrated"), report
    running.host = running.other
    # Where the session was quicker than the one who stops it, the move goes on instead.
    assert (report["resumed"], report["begun_again"]) in ((0, 1), (1, 0))
    busy.must_be_well()


def test_a_target_that_waits_for_a_mover_that_was_killed_is_in_nobodys_way(busy: Busy) -> None:
    """It would wait for half a minute and more; the next move does not."""
    code, _events = busy.move_and_break("stream", "mover")
    assert code == -signal.SIGKILL
    running = busy.running
    running.hosts.cmigrate(running.host, "move", running.name, "--to", running.other, "--mode", "precopy")
    running.host = running.other
    busy.must_be_well()
