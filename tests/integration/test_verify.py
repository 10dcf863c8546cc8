"""``move --verify``: every page is compared before anything runs on the target, and a wrong one is found."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.lab import HOSTS, TOP, TwoHosts, nothing_left_on
from tests.support.oracle import Churn, Sharing

MODES = ("stopcopy", "precopy", "postcopy")
# What the programs of the oracle hold at least, in pages.
MOST_OF_IT = 5000

pytestmark = pytest.mark.timeout(150)


def corrupted(hosts: TwoHosts, container: str, mode: str, when: str) -> tuple[int, dict[str, Any], str]:
    """A move over a link that changes memory: exit code, report, error."""
    done = hosts.lab.exec(
        "host1",
        [sys.executable, "-m", "tests.support.corrupting_move", container, "host2", mode, when],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=100,
        cwd=TOP,
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_all_memory_is_compared(two_hosts: TwoHosts) -> None:
    oracle = Sharing()
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(oracle)
        try:
            for mode in MODES:
                report = container.move(mode, "stream", "--allow-postcopy", "--verify")
                oracle.check()
                assert report["outcome"] == "migrated"
                assert report["verify"]["pages"] + report["verify"]["pages_later"] > MOST_OF_IT
                assert report["verify"]["differing"] == 0
                assert {"hash", "verify"} <= {phase["name"] for phase in report["phases"]}
                assert (report["verify"]["pages_later"] > 0) == (mode == "postcopy")
        finally:
            container.remove()


@pytest.mark.parametrize("mode", ["precopy", "hybrid"])
def test_a_page_that_arrives_changed_rolls_the_move_back(two_hosts: TwoHosts, mode: str) -> None:
    oracle = Churn(40)
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(oracle)
        try:
            code, report, error = corrupted(two_hosts, container.name, mode, "before")
            assert (code, report["outcome"]) == (5, "rolled_back"), error
            assert "pages are not on the target what they were on the source, the first at 0x" in error
            oracle.check()
            assert two_hosts.cmigrate("host2", "ps", "-aq").stdout == ""
        finally:
            container.remove()


def test_a_page_that_arrives_changed_after_the_switch_is_told(two_hosts: TwoHosts) -> None:
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(Churn(40))
        try:
            code, report, error = corrupted(two_hosts, container.name, "postcopy", "after")
            assert (code, report["outcome"]) == (10, "migrated"), error
            assert report["verify"]["differing"] > 0
            assert "pages that came after the switch are not what they were" in error
        finally:
            container.remove()
