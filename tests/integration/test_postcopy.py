"""Moves whose memory follows after the switch: exact, there and back, over both transports."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.lab import HOSTS, CommandFailed, Running, TwoHosts, nothing_left_on
from tests.support.oracle import Churn
from tests.support.services import Redis, Service

WAYS = (("postcopy", "stream"), ("hybrid", "stream"), ("postcopy", "ssh"), ("hybrid", "ssh"))

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


@pytest.mark.parametrize("make", [Redis, lambda: Churn(96)], ids=["redis", "churn"])
def test_memory_that_follows_after_the_switch_is_exact(two_hosts: TwoHosts, make: type[Redis]) -> None:
    service = make()
    with running(two_hosts, service) as container:
        service.check()
        for mode, transport in WAYS:
            report = container.move(mode, transport, "--allow-postcopy")
            service.check()
            assert (report["outcome"], report["mode"], report["transport"]) == ("migrated", mode, transport)


def test_without_consent_it_is_refused_and_told_why(two_hosts: TwoHosts) -> None:
    for mode in ("postcopy", "hybrid"):
        with pytest.raises(CommandFailed, match="--allow-postcopy") as caught:
            two_hosts.cmigrate("host1", "move", "web1", "--to", "host2", "--mode", mode)
        assert f"in mode {mode} the death of either host" in str(caught.value)
        assert ": 2\n" in str(caught.value)


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
        until(lambda: not runs_on(two_hosts, "host2", container.name))
        moves = {new.name.split(".")[0] for new in set(journals.glob("*")) - known}
        (report,) = [
            report
            for report in two_hosts.lines("host2", "history", "--json")
            if report["outcome"] == "lost" and report["id"] in moves
        ]
        assert report["error"]["code"] == "lost"
        # The source's frozen copy never runs again: whoever looks next throws it away.
        two_hosts.cmigrate("host1", "move", container.name, "--to", "host2", "--dry-run", check=False)
        assert not runs_on(two_hosts, "host1", container.name)


def runs_on(hosts: TwoHosts, host: str, name: str) -> bool:
    found = hosts.lines(host, "ps", "-a", "--json")
    return any(line["name"] == name and line["status"] == "running" for line in found)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)
