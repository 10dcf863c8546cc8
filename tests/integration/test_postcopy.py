"""Moves whose memory follows after the switch: exact, there and back, over both transports."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from scripts.chaos_faults import Going, reset_connections, set_link
from tests.support.lab import HOSTS, CommandFailed, Running, TwoHosts, nothing_left_on
from tests.support.oracle import Churn
from tests.support.services import Memory, Redis, Service

# Between them each mode goes over each transport, and each service in each mode.
WAYS = {
    Redis: (("hybrid", "stream"), ("postcopy", "ssh")),
    Churn: (("postcopy", "stream"), ("hybrid", "ssh")),
}

PATIENCE_S = 60.0

pytestmark = pytest.mark.timeout(150)


@contextmanager
def running(hosts: TwoHosts, service: Service) -> Iterator[Running]:
    with nothing_left_on(hosts, *HOSTS):
        container = hosts.run(service)
        try:
            yield container
        finally:
            service.close()
            container.remove()


@pytest.mark.parametrize("service", [Redis(), Churn(96)], ids=["redis", "churn"])
def test_memory_that_follows_after_the_switch_is_exact(two_hosts: TwoHosts, service: Redis | Churn) -> None:
    with running(two_hosts, service) as container:
        service.check()
        for mode, transport in WAYS[type(service)]:
            report = container.move(mode, transport, "--allow-postcopy")
            service.check()
            assert (report["outcome"], report["mode"], report["transport"]) == ("migrated", mode, transport)


def test_without_consent_it_is_refused_and_told_why(two_hosts: TwoHosts) -> None:
    for mode in ("postcopy", "hybrid"):
        with pytest.raises(CommandFailed, match="--allow-postcopy") as caught:
            two_hosts.cmigrate("host1", "move", "web1", "--to", "host2", "--mode", mode)
        assert f"in mode {mode} the death of either host" in str(caught.value)
        assert ": 2\n" in str(caught.value)


def test_a_link_that_breaks_after_the_switch_comes_back_and_the_fill_goes_on(two_hosts: TwoHosts) -> None:
    service = Memory(mib=200, hot_mib=2)
    with running(two_hosts, service) as container:
        # Ten seconds of filling, however fast the machine is.
        slowly = ("--bandwidth", "20m", "--compress", "none", "--transport", "stream")
        options = ("--mode", "postcopy", "--allow-postcopy", "--verify", "--json", *slowly)
        going = Going(two_hosts, "host1", "host2", ("move", container.name, "--to", "host2", *options))
        assert going.wait_for("RESUMED"), "".join(going.errors)
        gone_for_two_seconds(two_hosts, going)
        assert going.wait(100)
        events = [json.loads(line) for line in going.lines]
        report = events[-1]
        assert (going.process.returncode, report["outcome"]) == (0, "migrated"), report
        container.host = "host2"
        assert report["resumed"] == 1
        assert [event["resumed"] for event in events if event["type"] == "link-back"] == [True]
        # Each page was compared with what it was on the source, and what had come was not sent again.
        came_bytes = report["verify"]["pages_later"] * 4096
        assert report["verify"]["differing"] == 0
        assert came_bytes > 190 << 20
        assert report["fill"]["pages_after"] < came_bytes + (32 << 20)
        service.check()


def gone_for_two_seconds(hosts: TwoHosts, going: Going) -> None:
    """Neither side has a connection any more, nor can the source make another one."""
    os.kill(going.process.pid, signal.SIGSTOP)  # or all could have come until that is done
    set_link(hosts, going.target, up=False)
    try:
        assert all(reset_connections(hosts, host) for host in HOSTS)
        os.kill(going.process.pid, signal.SIGCONT)
        time.sleep(2)
    finally:
        set_link(hosts, going.target, up=True)


def test_the_movers_death_in_mid_fill_ends_the_container_and_is_reported(two_hosts: TwoHosts) -> None:
    with running(two_hosts, Churn(192)) as container:
        journals = two_hosts.lab.directory / "host2" / "state" / "journal"
        known = set(journals.glob("*"))
        # 24 s of filling, however fast the machine is.
        slowly = ("--bandwidth", "8m", "--compress", "none")
        command = ("move", container.name, "--to", "host2", "--mode", "postcopy", "--allow-postcopy", *slowly)
        mover = two_hosts.lab.popen(
            "host1", ["cmigrate", *command], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            # It runs there from this record on, and most of its memory is still on its way.
            until(lambda: any("RESUMED" in new.read_text() for new in set(journals.glob("*")) - known))
        finally:
            mover.kill()
            mover.wait(10)
        # The target would wait for it to come back. Whoever looks next on the source knows that nobody will, and the
        # frozen copy never runs again: it is thrown away.
        two_hosts.cmigrate("host1", "move", container.name, "--to", "host2", "--dry-run", check=False)
        until(lambda: not runs_on(two_hosts, "host2", container.name))
        moves = {new.name.split(".")[0] for new in set(journals.glob("*")) - known}
        (report,) = [
            report
            for report in two_hosts.lines("host2", "history", "--json")
            if report["outcome"] == "lost" and report["id"] in moves
        ]
        assert report["error"]["code"] == "lost"
        assert not runs_on(two_hosts, "host1", container.name)


def runs_on(hosts: TwoHosts, host: str, name: str) -> bool:
    found = hosts.lines(host, "ps", "-a", "--json")
    return any(line["name"] == name and line["status"] == "running" for line in found)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)
