"""Hosts on which something is wrong before a move begins: a clear error, and the container runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.test_bad_input import CONNECTION, NO_ROOM, fake_peer, move, must_fail, serving
from tests.support.lab import HOSTS, TwoHosts, nothing_left_on

pytestmark = pytest.mark.timeout(150)


@contextmanager
def read_only(hosts: TwoHosts, host: str, directory: str) -> Iterator[str]:
    """As the kernel makes a file system after an error of its disk."""
    config = hosts.config(host)
    path = str(config.state_dir if directory == "state" else config.run_dir)
    hosts.lab.exec(host, ["mkdir", "-p", path], check=True)  # the first container makes it
    hosts.lab.exec(host, ["mount", "--bind", path, path], check=True)
    try:
        hosts.lab.exec(host, ["mount", "-o", "remount,bind,ro", path], check=True)
        yield path
    finally:
        hosts.lab.exec(host, ["umount", "--lazy", path], check=True)


@pytest.mark.parametrize("directory", ["state", "run"])
@pytest.mark.parametrize("host", ["host1", "host2"])
def test_a_directory_that_can_not_be_written_is_told_before_anything_happens(
    two_hosts: TwoHosts, host: str, directory: str
) -> None:
    with serving(two_hosts), read_only(two_hosts, host, directory) as path:
        done = move(two_hosts, "stays", "--to", "host2", "--mode", "diskless", "--transport", "stream")
        must_fail(done, NO_ROOM, path, "hint: ", *(["host2"] if host == "host2" else []))


# Leaves so many pages of 4 KiB free.
FILL = """
cd "$1"; rm -f filler; free=$(df --output=avail -B4096 . | tail -1)
head -c $(( (free - $2) * 4096 )) /dev/zero >filler
"""


@contextmanager
def small_source(hosts: TwoHosts) -> Iterator[str]:
    """host1's state directory on a file system of its own."""
    state = str(hosts.config("host1").state_dir)
    hosts.lab.exec("host1", ["mkdir", "-p", state], check=True)
    hosts.lab.exec("host1", ["mount", "-t", "tmpfs", "-o", "size=40m,mode=700", "small", state], check=True)
    try:
        yield state
    finally:
        hosts.lab.exec("host1", ["umount", "--lazy", state], check=True)


def fill(hosts: TwoHosts, directory: str, pages_left: int) -> None:
    hosts.lab.exec("host1", ["sh", "-c", FILL, "fill", directory, str(pages_left)], check=True)


def test_what_makes_room_needs_none(two_hosts: TwoHosts) -> None:
    with small_source(two_hosts) as state, nothing_left_on(two_hosts, *HOSTS):
        names = ("stopped", "removed", "restarting")
        for name in names:
            policy = ("--restart", "always") if name == "restarting" else ()
            two_hosts.cmigrate("host1", "run", "-d", "--name", name, *policy, "--rootfs", "host", "--", "sleep", "1000")
        fill(two_hosts, state, 0)
        two_hosts.cmigrate("host1", "stop", "--time", "1", "stopped")
        two_hosts.cmigrate("host1", "rm", "-f", *names)
        assert not two_hosts.lines("host1", "ps", "-a", "--json")
        two_hosts.lab.exec("host1", ["rm", f"{state}/filler"], check=True)


def test_a_source_without_room_is_told_and_one_that_runs_out_of_it_moves_all_the_same(two_hosts: TwoHosts) -> None:
    # A journal takes two pages when a move begins, the mark before the freeze one; what is decided later needs no more.
    words = ("stays", "--to", "host2", "--mode", "diskless", "--transport", "stream")
    with small_source(two_hosts) as state, nothing_left_on(two_hosts, *HOSTS):
        two_hosts.cmigrate("host1", "run", "-d", "--name", "stays", "--rootfs", "host", "--", "sleep", "1000")
        try:
            fill(two_hosts, state, 0)
            must_fail(move(two_hosts, *words), NO_ROOM, "the disk is full", state, "hint: ")
            assert [line["status"] for line in two_hosts.lines("host1", "ps", "--json")] == ["running"]
            # Only what is kept about it is lost, and that is said.
            fill(two_hosts, state, 3)
            done = move(two_hosts, *words)
            assert done.returncode == 0, done.stderr
            assert "could not be" in done.stderr
            assert [line["name"] for line in two_hosts.lines("host2", "ps", "--json")] == ["stays"]
            assert not two_hosts.lines("host1", "ps", "-a", "--json")
            two_hosts.lab.exec("host1", ["rm", f"{state}/filler"], check=True)
        finally:
            for host in HOSTS:
                two_hosts.cmigrate(host, "rm", "-f", "stays", check=False)


def test_a_peer_of_a_newer_protocol_is_told_with_both_versions(two_hosts: TwoHosts) -> None:
    with serving(two_hosts), fake_peer(two_hosts, "newer"):
        done = move(two_hosts, "stays", "--to", "host2", "--transport", "stream")
        must_fail(done, CONNECTION, "99.0", "host2", "install the same version")
