"""A container that was moved comes back as it was at the freeze: asked for, or because it was not well."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.journal import Journal, Side, read_all
from runtime.api import Status
from runtime.store import ContainerStore
from tests.support.lab import HOSTS, Running, TwoHosts, nothing_left_on

pytestmark = pytest.mark.timeout(300)

NAME = "undone"
PORT = 7077
WAIT_S = 60.0
ROLLED_BACK, REFUSED = 5, 4
# Counts what it is asked, in memory and in a file.
COUNTER = f"""
import socket
listener, count = socket.create_server(("", {PORT})), 0
while True:
    connection, _ = listener.accept()
    with connection:
        try:
            while connection.recv(100):
                count += 1
                with open("/tmp/count", "w") as file:
                    print(count, file=file)
                connection.sendall(b"%d\\n" % count)
        except OSError:
            pass
"""


class Counter:
    """What tests start: a service of tests.support.lab without checks of its own."""

    name = NAME
    options: tuple[str, ...] = ()

    def command(self, client: Any) -> tuple[str, ...]:
        return ("python3", "-c", COUNTER)

    def open(self, place: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def check(self) -> None:
        pass


_EARLIER: set[str] = set()


@pytest.fixture(autouse=True)
def _earlier_moves(two_hosts: TwoHosts) -> None:
    """Some tests make moves while a clock is wrong, so that times do not tell which is the youngest of all."""
    _EARLIER.clear()
    _EARLIER.update(journal.move_id for host in HOSTS for journal in read_all(state_of(two_hosts, host) / "journal"))


@pytest.fixture
def counter(two_hosts: TwoHosts) -> Iterator[Running]:
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(Counter(), name=NAME)
        try:
            yield container
        finally:
            container.remove()


def move_and_keep(container: Running, mode: str, window_s: int = 600) -> None:
    """From host1 to host2."""
    words = ("--mode", mode, "--transport", "stream", "--allow-postcopy", "--undo-window", str(window_s))
    container.hosts.cmigrate("host1", "move", NAME, "--to", "host2", *words)
    container.host = "host2"


def connected(container: Running) -> socket.socket:
    """It may only be starting."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return container.connect(PORT)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def ask(connection: socket.socket) -> int:
    connection.sendall(b"?")
    return int(connection.recv(100))


def count_in_file(container: Running) -> int:
    return int(container.exec("cat", "/tmp/count"))


def statuses(hosts: TwoHosts) -> list[str]:
    """Of the container, on host1 and host2; "" where it is not."""
    found = [hosts.lines(host, "ps", "-a", "--json") for host in HOSTS]
    return [next((str(line["status"]) for line in lines if line["name"] == NAME), "") for lines in found]


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state_of(hosts: TwoHosts, host: str) -> Path:
    """A host's state directory as it is seen from here."""
    return Path(hosts.lab.directory) / host / "state"


def pager() -> int:
    """Of the one move there is; its guard is its parent."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"/pager_main.py\0" in (directory / "cmdline").read_bytes():
                found[int(directory.name)] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
    (child,) = (pid for pid, parent in found.items() if parent in found)
    return child


def last_record(hosts: TwoHosts, host: str) -> tuple[str, Side, str]:
    """Move, side and phase of the youngest journal of this test; empty without one."""
    journals = read_all(state_of(hosts, host) / "journal")
    journals = [journal for journal in journals if journal.records and journal.move_id not in _EARLIER]
    if not journals:
        return "", "source", ""
    youngest = max(journals, key=lambda journal: journal.records[0].at)
    return youngest.move_id, youngest.side, youngest.phase


def write_record(hosts: TwoHosts, host: str, phase: str) -> None:
    """As a process that died right after it has left it."""
    move_id, side, _phase = last_record(hosts, host)
    with Journal(state_of(hosts, host) / "journal", move_id, side=side) as file:
        file.append(phase)


def test_undo_brings_back_memory_files_and_connections_of_the_freeze(two_hosts: TwoHosts, counter: Running) -> None:
    with contextlib.closing(connected(counter)) as before:
        assert [ask(before), ask(before)] == [1, 2]
        move_and_keep(counter, "diskless")
        assert statuses(two_hosts) == ["kept", "running"]
        assert ask(before) == 3
        assert count_in_file(counter) == 3
        # Nothing of the copy can be used, or started a second time.
        for words in (("exec", NAME, "true"), ("start", NAME), ("rm", NAME), ("stop", NAME)):
            done = two_hosts.cmigrate("host1", *words, check=False)
            assert done.returncode != 0 or words[0] == "stop", words
        assert statuses(two_hosts) == ["kept", "running"]

        two_hosts.cmigrate("host1", "undo", NAME)
        counter.host = "host1"
        # The peer has gone on with the other copy: it hears that this is over.
        with pytest.raises(ConnectionResetError):
            ask(before)
    assert statuses(two_hosts) == ["running", ""]
    assert count_in_file(counter) == 2
    with contextlib.closing(connected(counter)) as after:
        assert ask(after) == 3
    counter.networks_are_as_before()
    report = two_hosts.lines("host1", "history", "--json")[0]
    assert report["outcome"] == "returned"


def test_one_that_is_not_well_comes_back_and_one_whose_mover_dies_stays(two_hosts: TwoHosts, counter: Running) -> None:
    with contextlib.closing(connected(counter)) as connection:
        ask(connection)
    options = ("--mode", "precopy", "--on-unhealthy", "return", "--health-retries", "1", "--json")
    sick = ("--transport", "ssh", "--health-cmd", "echo 99 >/tmp/count; echo ill; exit 3")
    done = two_hosts.cmigrate("host1", "move", NAME, "--to", "host2", *options, *sick, check=False, timeout_s=100)
    assert done.returncode == ROLLED_BACK, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["outcome"], report["health"]["exit_code"]) == ("returned", 3)
    assert statuses(two_hosts) == ["running", ""]
    assert count_in_file(counter) == 1

    # The same container again: what the journal of the first move says must not be done to this one's copy.
    words = ["cmigrate", "move", NAME, "--to", "host2", *options, "--health-cmd", "sleep 1000"]
    mover = two_hosts.lab.popen("host1", words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: last_record(two_hosts, "host1")[2] == "KEEPING")
    two_hosts.cmigrate("host1", "ps")
    os.kill(mover.pid, signal.SIGKILL)
    mover.wait()
    # Nobody knows whether it is well: it stays where it runs.
    two_hosts.cmigrate("host1", "resolve", NAME)
    counter.host = "host2"
    assert statuses(two_hosts) == ["", "running"]


def test_what_dies_while_it_comes_back_is_finished_by_whoever_comes_next(two_hosts: TwoHosts, counter: Running) -> None:
    move_and_keep(counter, "postcopy")
    write_record(two_hosts, "host1", "RETURNING")
    forget = two_hosts.cmigrate("host1", "undo", "--forget", NAME, check=False)
    # Whatever was meant: that it was asked for is on the disk, so it comes back.
    assert statuses(two_hosts) == ["running", ""], forget.stdout + forget.stderr
    counter.host = "host1"

    move_and_keep(counter, "stopcopy")
    write_record(two_hosts, "host2", "RETURNING")
    two_hosts.cmigrate("host2", "resolve", NAME)
    assert statuses(two_hosts) == ["kept", ""]
    two_hosts.cmigrate("host1", "undo", NAME)
    counter.host = "host1"
    assert statuses(two_hosts) == ["running", ""]

    # An undo that was killed between the last record and the thaw.
    move_and_keep(counter, "diskless")
    write_record(two_hosts, "host1", "RETURNING")
    write_record(two_hosts, "host2", "RETURNING")
    two_hosts.cmigrate("host2", "resolve", NAME)
    write_record(two_hosts, "host1", "TAKEN_BACK")
    two_hosts.cmigrate("host1", "resolve", NAME)
    counter.host = "host1"
    assert statuses(two_hosts) == ["running", ""]
    with contextlib.closing(connected(counter)) as connection:
        assert ask(connection) == 1


def test_a_frozen_copy_that_a_mover_left_after_its_end_is_not_in_the_way_of_a_move_back(
    two_hosts: TwoHosts, counter: Running
) -> None:
    move_and_keep(counter, "diskless")
    with contextlib.closing(connected(counter)) as connection:
        assert ask(connection) == 1
    # Killed between DONE and the end of its copy.
    write_record(two_hosts, "host1", "DONE")
    store = ContainerStore(dataclasses.replace(two_hosts.config("host1"), state_dir=state_of(two_hosts, "host1")))
    left = store.get(NAME)
    running = dataclasses.replace(left.state, status=Status.RUNNING, moved_to="", kept_for="")
    store.write_state(left.id, running)
    counter.move("diskless", "stream")
    assert statuses(two_hosts) == ["running", ""]
    with contextlib.closing(connected(counter)) as connection:
        assert ask(connection) == 2


@pytest.mark.parametrize("killed", ["pager", "mover"])
def test_one_that_post_copy_would_lose_comes_back_where_its_copy_is_kept(two_hosts: TwoHosts, killed: str) -> None:
    program = "import os, time; kept = os.urandom(40 << 20); print(len(kept), flush=True); time.sleep(1000)"
    options = ("--mode", "postcopy", "--allow-postcopy", "--transport", "stream", "--compress", "none")
    # Memory takes half a minute to follow, of which nobody waits for more than a moment.
    slow = ("--bandwidth", "10mbit", "--on-unhealthy", "return", "--health-cmd", "true", "--undo-window", "600")
    with nothing_left_on(two_hosts, *HOSTS):
        words = ("--restart", "always", "--name", NAME, "--rootfs", "host", "--", "python3", "-c", program)
        two_hosts.cmigrate("host1", "run", "-d", *words)
        try:
            until(lambda: bool(two_hosts.cmigrate("host1", "logs", NAME).stdout))
            command = ["cmigrate", "move", NAME, "--to", "host2", *options, *slow]
            mover = two_hosts.lab.popen("host1", command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            until(lambda: last_record(two_hosts, "host2")[2] == "RESUMED")
            os.kill(mover.pid if killed == "mover" else pager(), signal.SIGKILL)
            _, told = mover.communicate(timeout=WAIT_S)
            if killed == "mover":
                assert "undo" in two_hosts.cmigrate("host1", "resolve", NAME).stdout
                assert statuses(two_hosts)[0] == "kept"
                two_hosts.cmigrate("host1", "undo", NAME)
            else:
                assert mover.returncode == ROLLED_BACK, told
                assert "lost" in told
            assert statuses(two_hosts) == ["running", ""]
        finally:
            for host in HOSTS:
                two_hosts.cmigrate(host, "rm", "-f", NAME, check=False)


def test_a_window_that_is_over_is_closed_by_itself(two_hosts: TwoHosts, counter: Running) -> None:
    move_and_keep(counter, "diskless", 1)
    until(lambda: statuses(two_hosts) == ["", "running"])
    done = two_hosts.cmigrate("host1", "undo", NAME, check=False)
    assert done.returncode == 3, done.stderr
    assert last_record(two_hosts, "host1")[2] == "DONE"
