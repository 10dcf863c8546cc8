"""Moves between hosts that share no segment: a wire leads to the container, and everything goes on."""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from migrate.lab.lab import Lab
from tests.support.lab import HOSTS, Running, TwoHosts, disk_directory, nothing_left_on
from tests.support.netns import in_netns
from tests.support.routed import Connector, EchoServer

pytestmark = pytest.mark.timeout(300)

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
PUBLISHED = ("-p", "18000:8000", "-p", "18001:8001", "-p", "18002:8002/udp")


@pytest.fixture(scope="module")
def routed() -> Iterator[TwoHosts]:
    """Each host in a segment of its own, and the way out of its containers; the client routes between them."""
    directory = disk_directory()
    lab = Lab(directory / "lab")
    try:
        lab.up(routed=True)
        route = ["ip", "route", "add", "10.88.0.0/16", "via", lab.host("host1").address]
        lab.exec("client", route, check=True, timeout=10)
        yield TwoHosts(lab)
    finally:
        lab.down()
        shutil.rmtree(directory, ignore_errors=True)


class Published(Connector):
    """Takes its orders by a port that host1 publishes for it."""

    def __init__(self, port: int = 18000) -> None:
        self._port = port

    def open(self, place: Any) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self._orders = connected(place.hosts, "client", TCP, address_of(place.hosts, "host1"), self._port)
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def address_of(hosts: TwoHosts, host: str) -> str:
    return hosts.lab.host(host).address


def connected(hosts: TwoHosts, place: str, kind: int, address: str, port: int) -> socket.socket:
    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_INET, kind)
        connection.settimeout(30)
        connection.connect((address, port))
        return connection

    return in_netns(hosts.lab.host(place).holder.pid, connect)


def moved(container: Running, *options: str) -> dict[str, Any]:
    """Wires stay where it was: the hosts are not as before."""
    there = container.other
    words = ("move", container.name, "--to", there, "--mode", "diskless", "--json", *options)
    lines = container.hosts.lines(container.host, *words)
    assert [line for line in lines if line["type"] == "warning"] == []
    container.host = there
    return lines[-1]


def rolled_back(container: Running) -> None:
    """Frozen for longer than it may be: everything is as it was."""
    words = ("move", container.name, "--to", container.other, "--mode", "diskless", "--max-blackout", "1")
    assert container.hosts.cmigrate(container.host, *words, check=False).returncode == 5
    # The target may wait for the source to come back before it undoes what it has made.
    deadline = time.monotonic() + 90
    again = (*words[:4], "--dry-run")
    while container.hosts.cmigrate(container.host, *again, check=False).returncode:
        assert time.monotonic() < deadline, "the target does not undo it"
        time.sleep(1)


def links(hosts: TwoHosts) -> dict[str, list[bool]]:
    """Of each host: whether its wires lead to where the container went."""
    return {host: [line["toward"] for line in hosts.lines(host, "network", "wires", "--json")] for host in HOSTS}


def test_every_connection_goes_on_through_the_host_it_was_made_on_there_and_back(routed: TwoHosts) -> None:
    connector, neighbour = Published(), Published(19000)
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(routed, *HOSTS))
        container = routed.run(connector, *PUBLISHED)
        stack.callback(container.remove)
        stack.callback(connector.close)
        beside = routed.run(neighbour, "-p", "19000:8000", name="beside")
        stack.callback(beside.remove)
        stack.callback(neighbour.close)
        far = stack.enter_context(EchoServer(routed.lab.host("client").holder.pid, routed.client.address))
        kept: dict[str, socket.socket] = {}

        def open_all(number: int) -> None:
            """Out of the container, in by the ports of both hosts, straight to its address, and from both hosts."""
            assert connector.order("open", f"out{number}", routed.client.address, far.port) == "ok"
            assert connector.order("ask", f"out{number}", "new") == "new"
            assert connector.order("open", f"beside{number}", beside.address, 8001) == "ok"
            assert neighbour.order("open", f"in{number}", container.address, 8001) == "ok"
            ways = {"straight": ("client", TCP, container.address, 8001)}
            for host in HOSTS if number else (container.host,):
                ways[f"by {host}"] = ("client", TCP, address_of(routed, host), 18001)
            if number:
                ways["of old host"] = ("host1", TCP, "127.0.0.1", 18001)
                ways["of new host"] = ("host2", TCP, address_of(routed, "host1"), 18001)
            ways[f"datagrams by {container.host}"] = ("client", UDP, address_of(routed, container.host), 18002)
            for name, (place, kind, address, port) in ways.items():
                kept[f"{name} {number}"] = stack.enter_context(connected(routed, place, kind, address, port))
            ask_all()

        def ask_all() -> None:
            for number in range(1 + ("straight 1" in kept)):
                assert neighbour.order("ask", f"in{number}", "word") == "word"
                assert connector.order("ask", f"beside{number}", "word") == "word"
            for name, connection in kept.items():
                connection.sendall(name.encode())
                assert connection.recv(100) == name.encode()

        open_all(0)
        assert moved(container)["network"] == "forward"
        assert connector.order("ask", "out0", "after") == "after"
        ask_all()
        assert links(routed) == {"host1": [True], "host2": [False]}
        open_all(1)
        # What a host is one end of itself ends: its address is the other host's as well.
        for name in [name for name in kept if name.startswith("of ")]:
            kept.pop(name).close()
        assert moved(container)["network"] == "forward"
        assert links(routed) == {"host1": [False], "host2": [True]}
        for name in ("out0", "out1"):
            assert connector.order("ask", name, "back") == "back"
        ask_all()
        assert far.resets == 0
        for host in HOSTS:
            routed.cmigrate(host, "network", "cut", container.name)


def test_beside_a_shared_segment_no_wire_is_made(two_hosts: TwoHosts) -> None:
    connector = Connector()
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(two_hosts, *HOSTS))
        container = two_hosts.run(connector)
        stack.callback(container.remove)
        stack.callback(connector.close)
        words = ("move", container.name, "--to", "host2", "--network", "forward", "--dry-run")
        done = two_hosts.cmigrate("host1", *words, check=False)
        assert (done.returncode, "circles" in done.stderr) == (4, True)


def test_a_wire_survives_moves_that_are_rolled_back_and_ends_when_it_is_idle(routed: TwoHosts) -> None:
    connector = Published()
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(routed, *HOSTS))
        container = routed.run(connector, *PUBLISHED)
        stack.callback(container.remove)
        stack.callback(connector.close)
        refused = routed.cmigrate("host1", "network", "cut", container.name, check=False)
        assert (refused.returncode, "no wire" in refused.stderr) == (3, True)
        rolled_back(container)
        assert links(routed) == {"host1": [], "host2": []}
        assert connector.order("open", "inside", "127.0.0.1", 8001) == "ok"
        moved(container, "--forward-for", "500")
        rolled_back(container)
        assert links(routed) == {"host1": [True], "host2": [False]}
        deadline = time.monotonic() + 60
        while True:  # the time that is left goes down, and up again with each answer
            time.sleep(3)
            idle_s = seconds_left(routed)
            assert 0 < idle_s <= 500
            assert connector.order("open", "inside", "127.0.0.1", 8001) == "ok"
            if seconds_left(routed) > idle_s:
                break
            assert time.monotonic() < deadline
        moved(container, "--forward-for", "1")
        deadline = time.monotonic() + 60
        while links(routed) != {"host1": [], "host2": []}:
            assert time.monotonic() < deadline
            time.sleep(1)


def seconds_left(hosts: TwoHosts) -> int:
    (line,) = hosts.lines("host1", "network", "wires", "--json")
    return int(line["seconds_left"])


def echo(connection: socket.socket) -> bytes:
    connection.sendall(b"word")
    return connection.recv(100)


def test_what_is_taken_back_leaves_no_wire_and_its_connections_end_with_a_reset(routed: TwoHosts) -> None:
    connector = Published()
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(routed, *HOSTS))
        container = routed.run(connector, *PUBLISHED)
        stack.callback(container.remove)
        stack.callback(connector.close)
        here, there = (address_of(routed, host) for host in HOSTS)
        ways = [(container.address, 8001), (here, 18001)]
        kept = [stack.enter_context(connected(routed, "client", TCP, *way)) for way in ways]
        moved(container, "--undo-window", "600")
        kept += [stack.enter_context(connected(routed, "client", TCP, *way)) for way in (*ways, (there, 18001))]
        assert [echo(connection) for connection in kept] == [b"word"] * len(kept)
        routed.cmigrate("host1", "undo", container.name)
        container.host = "host1"
        for connection in kept:
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                echo(connection)
        assert links(routed) == {"host1": [], "host2": []}
        for way in ways:
            assert echo(stack.enter_context(connected(routed, "client", TCP, *way))) == b"word"
