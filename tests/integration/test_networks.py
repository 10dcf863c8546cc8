"""User-defined networks: containers on one find each other by name, before and after a move."""

import json
from collections.abc import Iterator

import pytest

from tests.support.lab import HOSTS, Running, TwoHosts, nothing_left_on
from tests.support.routed import Connector

pytestmark = pytest.mark.timeout(300)

SUBNET = "10.90.1.0/24"


@pytest.fixture
def blue(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    """A network of both hosts, joined by a link."""
    with nothing_left_on(two_hosts, *HOSTS):
        for host in HOSTS:
            two_hosts.cmigrate(host, "network", "create", "blue", "--subnet", SUBNET)
        bridge = json.loads(two_hosts.cmigrate("host1", "network", "inspect", "blue").stdout)["bridge"]
        pid = str(two_hosts.lab.host("host2").holder.pid)
        join = ["ip", "link", "add", "blue0", "type", "veth", "peer", "name", "blue0", "netns", pid]
        two_hosts.lab.exec("host1", join, check=True, timeout=10)
        for host in HOSTS:
            two_hosts.lab.exec(host, ["ip", "link", "set", "blue0", "master", bridge, "up"], check=True, timeout=10)
        try:
            yield two_hosts
        finally:
            two_hosts.lab.exec("host1", ["ip", "link", "del", "blue0"], timeout=10)
            for host in HOSTS:
                two_hosts.cmigrate(host, "network", "rm", "blue")


class Inside(Connector):
    """Taken orders from by a neighbour: nobody outside the network connects to it."""

    def open(self, place: object) -> None:
        pass

    def close(self) -> None:
        pass


ASK = """
import socket, sys, time
for attempt in range(100):
    try:
        with socket.create_connection((sys.argv[1], 8001), 5) as connection:
            connection.sendall(b"hello"); print(connection.recv(100).decode()); break
    except ConnectionRefusedError:
        time.sleep(0.1)
"""


def asks(container: Running, name: str) -> str:
    return container.exec("python3", "-c", ASK, name).strip()


def test_containers_of_a_network_find_each_other_by_name_wherever_they_move(blue: TwoHosts) -> None:
    one = blue.run(Inside(), "--network", "blue", name="one")
    try:
        two = blue.run(Inside(), "--network", "blue", name="two")
        try:
            assert asks(one, "two") == asks(two, "one") == "hello"
            far = blue.run(Inside(), "--network", "blue", name="far", host="host2")
            try:
                one.move("diskless", "stream")
                for here, there in ((one, "two"), (two, "one"), (one, "far"), (far, "one"), (far, "two")):
                    assert asks(here, there) == "hello"
                members = json.loads(blue.cmigrate("host2", "network", "inspect", "blue").stdout)["containers"]
                assert sorted(members) == ["far", "one"]
                refused = blue.cmigrate("host2", "network", "rm", "blue", check=False)
                assert (refused.returncode, "far" in refused.stderr) == (4, True)
            finally:
                far.remove()
            assert " far" not in one.exec("cat", "/etc/hosts")
        finally:
            two.remove()
    finally:
        one.remove()


def test_a_host_without_the_network_refuses_the_move(blue: TwoHosts) -> None:
    blue.cmigrate("host1", "network", "create", "green", "--subnet", "10.90.2.0/24")
    try:
        container = blue.run(Inside(), "--network", "green", name="alone")
        try:
            words = ("move", container.name, "--to", "host2", "--dry-run")
            done = blue.cmigrate("host1", *words, check=False)
            assert done.returncode == 4
            assert "there is no network green" in done.stderr
        finally:
            container.remove()
    finally:
        blue.cmigrate("host1", "network", "rm", "green")
