"""Hosts on which something is wrong before a move begins: a clear error, and the container runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.test_bad_input import CONNECTION, NO_ROOM, fake_peer, move, must_fail, serving
from tests.support.lab import TwoHosts

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


def test_a_peer_of_a_newer_protocol_is_told_with_both_versions(two_hosts: TwoHosts) -> None:
    with serving(two_hosts), fake_peer(two_hosts, "newer"):
        done = move(two_hosts, "stays", "--to", "host2", "--transport", "stream")
        must_fail(done, CONNECTION, "99.0", "host2", "install the same version")
