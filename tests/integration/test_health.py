"""A command in the moved container tells whether it is well."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.lab import HOSTS, TwoHosts, nothing_left_on

NAME = "checked"
UNHEALTHY = 14

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def hosts(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    with nothing_left_on(two_hosts, *HOSTS):
        two_hosts.cmigrate("host1", "run", "-d", "--name", NAME, "--rootfs", "host", "--", "sleep", "1000")
        try:
            yield two_hosts
        finally:
            for host in HOSTS:
                two_hosts.cmigrate(host, "rm", "-f", NAME, check=False)


def move(hosts: TwoHosts, source: str, target: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ("move", NAME, "--to", target, "--mode", "diskless", "--json", *options)
    return hosts.cmigrate(source, *arguments, check=False, timeout_s=100)


def test_a_container_that_is_well_is_reported_so_and_one_that_is_not_stays_where_it_is(hosts: TwoHosts) -> None:
    # Only there after the second try.
    well = "test -e /tmp/tried || { touch /tmp/tried; exit 1; }; echo $HOSTNAME is well"
    done = move(hosts, "host1", "host2", "--health-cmd", well, "--health-interval", "0", "--transport", "stream")
    assert done.returncode == 0, done.stdout + done.stderr
    health = json.loads(done.stdout.splitlines()[-1])["health"]
    assert (health["healthy"], health["exit_code"], health["attempts"]) == (True, 0, 2)
    assert "is well" in health["output"]

    sick = ("--health-cmd", "echo too slow; sleep 97", "--health-timeout", "1", "--health-retries", "1")
    done = move(hosts, "host2", "host1", *sick, "--transport", "ssh")
    assert done.returncode == UNHEALTHY, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["outcome"] == "migrated"
    assert (report["health"]["healthy"], report["health"]["exit_code"]) == (False, 124)
    assert "too slow" in report["health"]["output"]
    # It runs where it was moved, and nothing of the command is left in it.
    assert [line["name"] for line in hosts.lines("host1", "ps", "--json")] == [NAME]
    assert "sleep 97" not in hosts.cmigrate("host1", "exec", NAME, "ps", "ax").stdout
