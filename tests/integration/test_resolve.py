"""Moves that break off for good, or are called off: what `resolve` and `cancel` make of them."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.journal import Journal
from runtime.handover import begin_handover
from tests.support.lab import HOSTS, Running, TwoHosts, nothing_left_on
from tests.support.services import Memory

NAME = "stays"
IN_DOUBT, REFUSED, NOT_FOUND, INTERRUPTED = 6, 4, 3, 130


@pytest.fixture
def container(two_hosts: TwoHosts) -> Iterator[Running]:
    service = Memory(mib=64)
    with nothing_left_on(two_hosts, *HOSTS):
        running = two_hosts.run(service, name=NAME)
        try:
            yield running
        finally:
            service.close()
            running.remove()


def moving(hosts: TwoHosts, *options: str) -> contextlib.AbstractContextManager["subprocess.Popen[str]"]:
    return hosts.moving(NAME, "--mode", "diskless", "--transport", "stream", *options)


def last_phase(hosts: TwoHosts, host: str) -> str:
    """Of the newest journal there."""
    directory = hosts.lab.directory / host / "state" / "journal"
    files = sorted(directory.glob("*"), key=lambda file: file.stat().st_mtime_ns) if directory.exists() else []
    lines = files[-1].read_text(errors="replace").split("\n") if files else []
    phases = [json.loads(line)["phase"] for line in lines if line.strip("\0 ").startswith("{")]
    return str(phases[-1]) if phases else ""


def link(hosts: TwoHosts, state: str) -> None:
    hosts.lab.exec("host2", ["ip", "link", "set", "uplink", state], check=True)


def in_doubt(hosts: TwoHosts) -> bool:
    """Kill the mover right after COMMITTED is on its disk, with the link cut. False: it was quicker than we are."""
    with moving(hosts) as going:
        while going.poll() is None and last_phase(hosts, "host1") != "COMMITTED":
            time.sleep(0.0002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(going.pid, signal.SIGKILL)
        link(hosts, "down")
        going.wait()
    return last_phase(hosts, "host1") == "COMMITTED"


def make_doubt(hosts: TwoHosts, container: Running) -> None:
    for _attempt in range(10):
        if in_doubt(hosts):
            return
        link(hosts, "up")
        hosts.cmigrate("host1", "resolve", container.id, check=False)
        hosts.cmigrate("host2", "move", NAME, "--to", "host1", "--mode", "diskless", check=False)
    raise AssertionError("the mover was never killed between COMMITTED and DONE")


def test_a_doubt_stays_frozen_while_the_link_is_cut_and_is_settled_when_it_is_back(
    two_hosts: TwoHosts, container: Running
) -> None:
    make_doubt(two_hosts, container)
    try:
        done = two_hosts.cmigrate("host1", "resolve", NAME, check=False)
        assert done.returncode == IN_DOUBT, done.stdout + done.stderr
        assert "stays frozen" in done.stdout
        refused = two_hosts.cmigrate("host1", "resolve", NAME, "--keep", "source", check=False)
        assert refused.returncode == IN_DOUBT
        assert "--other-side-is-fenced" in refused.stderr
    finally:
        link(two_hosts, "up")
    deadline = time.monotonic() + 60
    while two_hosts.cmigrate("host1", "resolve", container.id, check=False).returncode == IN_DOUBT:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert sum(running_on(two_hosts, host) for host in HOSTS) == 1


def test_a_copy_in_doubt_that_is_killed_is_not_started_again_by_policy_or_person(two_hosts: TwoHosts) -> None:
    service = Memory(mib=16)
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(service, "--restart", "always", name=NAME)
        try:
            make_doubt(two_hosts, container)
            try:
                (line,) = two_hosts.lines("host1", "inspect", container.id, "--json")
                # As the kernel would in want of memory: the freezer does not keep a task from that.
                os.kill(line["state"]["init_pid"], signal.SIGKILL)
                deadline = time.monotonic() + 30
                while two_hosts.lines("host1", "ps", "-a", "--json")[0]["status"] != "exited":
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                refused = two_hosts.cmigrate("host1", "start", NAME, check=False)
                assert refused.returncode == REFUSED, refused.stdout + refused.stderr
                assert "may run on another host" in refused.stderr
                time.sleep(1)  # several times the policy's first delay
                assert two_hosts.lines("host1", "ps", "-a", "--json")[0]["status"] == "exited"
            finally:
                link(two_hosts, "up")
            deadline = time.monotonic() + 60
            while two_hosts.cmigrate("host1", "resolve", container.id, check=False).returncode == IN_DOUBT:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            if not running_on(two_hosts, "host2"):
                # The target never had the right to run it: it is this host's again, from its files.
                two_hosts.cmigrate("host1", "start", NAME)
            assert sum(running_on(two_hosts, host) for host in HOSTS) == 1
        finally:
            service.close()
            container.remove()


def running_on(hosts: TwoHosts, host: str) -> int:
    return sum(line["name"] == NAME for line in hosts.lines(host, "ps", "--json"))


def test_a_copy_that_was_reclaimed_by_who_died_before_the_thaw_runs_again(
    two_hosts: TwoHosts, container: Running
) -> None:
    (line,) = two_hosts.lines("host1", "inspect", container.id, "--json")
    host = two_hosts.config("host1")
    inside = f"{host.cgroup_parent}/{container.id}/cgroup.freeze"
    (freezer,) = [*Path("/sys/fs/cgroup").glob(inside), *Path("/sys/fs/cgroup").glob(f"*/{inside}")]
    journals = two_hosts.lab.directory / "host1" / "state" / "journal"
    # As RECLAIMED on the disk, a later move's journal beside it, and nothing after it.
    with Journal(journals, "reclaimed01", side="source") as journal:
        journal.append("PREPARED", {"container": container.id, "target": "host2", "came_by": ""})
        journal.append("RECLAIMED", {})
    begin_handover(journals.parent / "containers" / container.id, "another0001")
    freezer.write_text("1")
    assert "runs on here" not in two_hosts.cmigrate("host1", "resolve", "reclaimed01").stdout
    assert freezer.read_text() == "1\n"
    begin_handover(journals.parent / "containers" / container.id, "reclaimed01")
    told = two_hosts.cmigrate("host1", "resolve", "reclaimed01").stdout
    assert f"{line['spec']['name']} runs on here" in told
    assert freezer.read_text() == "0\n"
    container.move("precopy", "stream")


def test_a_person_may_decide_once_the_other_side_is_fenced(two_hosts: TwoHosts, container: Running) -> None:
    make_doubt(two_hosts, container)
    try:
        # Fenced: whatever host2 has of it is removed, by hand, on its own console.
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not two_hosts.lines("host2", "ps", "-a", "--json"):
            time.sleep(0.5)
        two_hosts.cmigrate("host2", "rm", "-f", NAME, check=False)
        two_hosts.cmigrate("host1", "resolve", NAME, "--keep", "source", "--other-side-is-fenced")
        (line,) = two_hosts.lines("host1", "ps", "--json")
        assert (line["name"], line["status"]) == (NAME, "running")
    finally:
        link(two_hosts, "up")
    assert two_hosts.cmigrate("host1", "resolve", NAME).stdout.startswith("nothing is open")


def test_a_move_under_way_is_called_off(two_hosts: TwoHosts, container: Running) -> None:
    container.exec("sh", "-c", "head -c 100000000 /dev/urandom >/var/tmp/large")
    with moving(two_hosts, "--bandwidth", "2m") as going:
        deadline = time.monotonic() + 40
        while (done := two_hosts.cmigrate("host1", "cancel", NAME, check=False)).returncode == REFUSED:
            assert time.monotonic() < deadline, done.stderr
        assert done.returncode == 0, done.stderr
        assert "runs on here" in done.stdout
        assert going.wait(20) == INTERRUPTED
    (line,) = two_hosts.lines("host1", "ps", "--json")
    assert (line["name"], line["status"]) == (NAME, "running")


def test_where_nothing_is_open_it_is_said(two_hosts: TwoHosts, container: Running) -> None:
    done = two_hosts.cmigrate("host1", "cancel", NAME, check=False)
    assert done.returncode == REFUSED
    assert "no move" in done.stderr
    assert "nothing is open" in two_hosts.cmigrate("host1", "resolve", NAME).stdout
    done = two_hosts.cmigrate("host1", "resolve", NAME, "--keep", "target", "--other-side-is-fenced", check=False)
    assert done.returncode == REFUSED
    assert two_hosts.cmigrate("host1", "resolve", "nobody", check=False).returncode == NOT_FOUND


def put_clock_back(hosts: TwoHosts, host: str, years: int) -> None:
    """What this host has written so far bears later times than what it will write."""
    for file in (hosts.lab.directory / host / "state" / "journal").glob("*.source.jsonl"):
        text = file.read_text()
        year = text.partition('"at":"')[2][:4]
        file.write_text(text.replace(f'"at":"{year}-', f'"at":"{int(year) + years}-'))


def test_a_container_that_came_back_is_kept_though_the_clock_was_put_back(
    two_hosts: TwoHosts, container: Running
) -> None:
    container.move("diskless", "stream")
    put_clock_back(two_hosts, "host1", 1)
    container.move("diskless", "stream")
    two_hosts.cmigrate("host1", "stop", "-t", "1", NAME)
    # Its files are not what the first move has left here.
    assert two_hosts.cmigrate("host1", "resolve", NAME).stdout.startswith("nothing is open")
    (line,) = two_hosts.lines("host1", "ps", "-a", "--json")
    assert (line["name"], line["status"]) == (NAME, "exited")
