"""Connections in every state move: those that nobody has accepted yet, half closed ones, datagrams, unix sockets."""

import errno
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.support.lab import HOSTS, Probe, Running, TwoHosts, nothing_left_on
from tests.support.netns import in_netns
from tests.support.services import Redis, Service

pytestmark = pytest.mark.timeout(120)

ODD_SOCKETS = """
import os, select, socket, threading
tcp, udp = socket.create_server(("0.0.0.0", 8000), backlog=64), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 8001))
deaf = socket.create_server(("0.0.0.0", 8002), backlog=1)
one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
unix = socket.socket(socket.AF_UNIX); unix.bind("/tmp/u"); unix.listen(4)
near = socket.socket(socket.AF_UNIX); near.connect("/tmp/u"); far, _ = unix.accept()
queued = socket.socket(socket.AF_UNIX); queued.connect("/tmp/u")
one.send(b"datagram in the queue"); near.send(b"bytes in the queue")
def serve(connection):
    # An echo that goes on after its client has closed one half, and takes the words "unix" and "listen" for more.
    with connection:
        while data := connection.recv(65536):
            if data == b"listen":
                threading.Thread(target=accept, args=(deaf,)).start()
            if data == b"unix":
                data = two.recv(100) + b"," + far.recv(100)
                other, _ = unix.accept(); other.send(b"x"); data += b"," + queued.recv(1)
            connection.sendall(data)
        connection.sendall(b"after your end")
def accept(server):
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],)).start()
threading.Thread(target=accept, args=(tcp,)).start()
while True:
    data, peer = udp.recvfrom(2000); udp.sendto(data, peer)
"""


class Program:
    """A Python program in a container, waited for on its port."""

    name = "odd"
    options: tuple[str, ...] = ()

    def __init__(self, text: str, port: int) -> None:
        self._text, self._port = text, port

    def command(self, client: object) -> tuple[str, ...]:
        return ("/usr/bin/python3", "-c", self._text)

    def open(self, place: Any) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                place.connect(self._port).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def running(hosts: TwoHosts, service: Service, *options: str) -> Iterator[Running]:
    with nothing_left_on(hosts, *HOSTS):
        container = hosts.run(service, *options)
        try:
            yield container
        finally:
            service.close()
            container.remove()


def asked(connection: socket.socket, word: bytes) -> bytes:
    connection.sendall(word)
    return connection.recv(65536)


def test_sockets_in_odd_states_move_and_work_on(two_hosts: TwoHosts) -> None:
    with running(two_hosts, Program(ODD_SOCKETS, 8000)) as container, ExitStack() as stack:
        echo = stack.enter_context(container.connect(8000))
        half = stack.enter_context(container.connect(8000))
        udp: socket.socket = stack.enter_context(
            container.client.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        )
        for connection in (echo, half, udp):
            connection.settimeout(10)
        udp.connect((container.address, 8001))
        assert asked(echo, b"one") == b"one"
        assert asked(half, b"last") == b"last"
        for mode in ("diskless", "precopy"):
            container.move(mode, "stream")
            assert asked(echo, b"two") == b"two"
            assert asked(udp, b"datagram") == b"datagram"
        half.shutdown(socket.SHUT_WR)
        assert half.recv(100) == b"after your end"
        assert asked(echo, b"unix") == b"datagram in the queue,bytes in the queue,x"


def test_a_listener_whose_queue_is_full_loses_what_is_in_it_and_tells_and_takes_those_that_did_not_get_in(
    two_hosts: TwoHosts,
) -> None:
    with running(two_hosts, Program(ODD_SOCKETS, 8000)) as container, ExitStack() as stack:
        echo, *unheard = [stack.enter_context(container.connect(port)) for port in (8000, 8002, 8002)]
        late: socket.socket = stack.enter_context(
            container.client.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        )
        late.setblocking(False)
        assert late.connect_ex((container.address, 8002)) == errno.EINPROGRESS
        for connection in (echo, *unheard):
            connection.settimeout(60)
        assert asked(echo, b"one") == b"one"
        assert late.connect_ex((container.address, 8002)) == errno.EALREADY, "there was room in the queue"
        source, target = container.host, container.other
        lines = two_hosts.lines(source, "move", container.name, "--to", target, "--mode", "diskless", "--json")
        container.host = target
        assert lines[-1]["outcome"] == "migrated"
        assert any("2 connections wait to be accepted" in line.get("what", "") for line in lines)
        ended = {f"{container.address}:8002 - {two_hosts.client.address}:{one.getsockname()[1]}" for one in unheard}
        assert set(lines[-1]["closed_connections"]) == ended
        for connection in unheard:  # they wait for the other side to begin
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        assert asked(echo, b"listen") == b"listen"
        late.settimeout(60)
        assert select.select([], [late], [], 60)[1] == [late], "it asks again and again"
        assert asked(late, b"late") == b"late"
        new = stack.enter_context(container.connect(8002))
        assert asked(new, b"new") == b"new"


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_new_connections_all_the_time_are_all_answered_and_nearly_all_datagrams(two_hosts: TwoHosts, kind: str) -> None:
    service: Callable[[], Service] = Redis if kind == "tcp" else lambda: Program(ODD_SOCKETS, 8000)
    with running(two_hosts, service()) as container:
        probe = Probe(two_hosts.lab, kind, f"{container.address}:{6379 if kind == 'tcp' else 8001}")
        try:
            time.sleep(0.3)
            for _ in range(3):
                container.move("diskless", "stream")
                time.sleep(0.2)
        finally:
            seen = probe.end()
        # What is held during a long blackout may be more than a socket's buffer takes at once.
        lost = 0 if kind == "tcp" else 300
        assert seen["failed"] <= lost, json.dumps(seen)
        assert seen["resets"] == 0
        assert seen["requests"] > 100


ECHO6 = """
import socket, threading
server = socket.create_server(("::", 8000), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
def serve(connection):
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],)).start()
"""
ADDRESS6, CLIENT6 = "fd00:88::5", "fd00:88::9/64"


@pytest.fixture
def client6(two_hosts: TwoHosts) -> Iterator[None]:
    """An IPv6 address for the lab's client."""
    link = ("ip", "address", "add", CLIENT6, "dev", "lab0", "nodad")
    two_hosts.lab.exec("client", list(link), check=True, timeout=10)
    yield
    two_hosts.lab.exec("client", ["ip", "address", "del", CLIENT6, "dev", "lab0"], check=True, timeout=10)


def test_an_ipv6_connection_moves_with_its_address_and_its_client_waits_no_longer_than_the_blackout(
    two_hosts: TwoHosts, client6: None
) -> None:
    with running(two_hosts, Program(ECHO6, 8000), "--ip6", ADDRESS6) as container:
        assert container.inspect()["spec"]["network"]["address6"] == f"{ADDRESS6}/64"
        probe = Probe(two_hosts.lab, "echo", f"[{ADDRESS6}]:8000")
        try:
            time.sleep(0.3)
            probe.mark()
            for mode in ("diskless", "precopy", "stopcopy"):
                report = container.move(mode, "stream")
                time.sleep(0.5)
                seen = probe.mark()
                assert (seen["failed"], seen["resets"], seen["out_of_sequence"]) == (0, 0, 0)
                # A neighbour that had to be asked for again after its time would cost a second.
                assert seen["downtime_ms"] < report["blackout_ms"] + 800
        finally:
            total = probe.end()
        assert (total["failed"], total["last"]) == (0, total["requests"])


def test_who_knew_an_earlier_container_by_this_address_learns_of_the_new_one_at_once(
    two_hosts: TwoHosts, client6: None
) -> None:
    own, earlier = "10.88.77.8", "02:00:00:00:00:99"

    def neighbours(*words: str) -> str:
        done = two_hosts.lab.exec(
            "client", ["ip", "neighbour", *words], check=True, timeout=10, capture_output=True, text=True
        )
        return str(done.stdout)

    for address in (own, ADDRESS6):
        neighbours("replace", address, "lladdr", earlier, "dev", "lab0", "nud", "stale")
    words = ("-d", "--name", "heir", "--ip", own, "--ip6", ADDRESS6, "--rootfs", "host", "--", "sleep", "1000")
    with nothing_left_on(two_hosts, *HOSTS):
        two_hosts.cmigrate("host1", "run", *words)
        try:
            found = json.loads(two_hosts.cmigrate("host1", "inspect", "heir").stdout)
            mac = found["spec"]["network"]["mac"]
            assert [mac in neighbours("show", address) for address in (own, ADDRESS6)] == [True, True]
        finally:
            two_hosts.cmigrate("host1", "rm", "-f", "heir")


def test_a_container_moves_away_from_its_neighbour_and_back_and_their_connection_holds(two_hosts: TwoHosts) -> None:
    """The neighbour asks a line a few milliseconds apart, over one connection, and says how far it came."""
    asks = (
        "import socket, sys, time\n"
        "s = socket.create_connection((sys.argv[1], 8000)); s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
        "n = 0\n"
        "while True:\n"
        "    s.sendall(b'%d' % n); assert s.recv(100) == b'%d' % n; n += 1\n"
        "    open('/var/tmp/n', 'w').write(str(n)); time.sleep(0.003)\n"
    )

    class Asks(Program):
        name = "asks"

        def command(self, client: object) -> tuple[str, ...]:
            return ("/usr/bin/python3", "-c", asks, server.address)

        def open(self, place: Any) -> None:
            time.sleep(0.5)

    with running(two_hosts, Program(ODD_SOCKETS, 8000)) as server, ExitStack() as stack:
        neighbour = two_hosts.run(Asks("", 0))
        stack.callback(neighbour.remove)
        assert server.host == neighbour.host
        before = 0
        for container in (server, neighbour, server, server):
            container.move("diskless", "stream")
            deadline = time.monotonic() + 10
            # The file is empty for the moment in which it is written anew.
            while (count := int(neighbour.exec("sh", "-c", "cat /var/tmp/n || true") or "0")) <= before:
                assert time.monotonic() < deadline, f"the connection stands still after a move of {container.name}"
                time.sleep(0.1)
            before = count
            assert neighbour.inspect()["state"]["status"] == "running"


def test_published_ports_lead_to_the_container_from_the_host_it_left_and_connections_through_it_hold(
    two_hosts: TwoHosts,
) -> None:
    ports = ("-p", "18000:8000", "-p", "18001:8001/udp")
    with running(two_hosts, Program(ODD_SOCKETS, 8000), *ports) as container, ExitStack() as stack:

        def through(host: str, kind: int, port: int) -> socket.socket:
            def connect() -> socket.socket:
                connection = socket.socket(socket.AF_INET, kind)
                connection.settimeout(5)
                connection.connect(("127.0.0.1", port))
                return connection

            made: socket.socket = stack.enter_context(in_netns(two_hosts.lab.host(host).holder.pid, connect))
            return made

        kept = through("host1", socket.SOCK_STREAM, 18000)
        assert asked(kept, b"before") == b"before"
        for _ in range(3):
            container.move("diskless", "stream")
            assert asked(kept, b"after") == b"after"
            for host in HOSTS:
                assert asked(through(host, socket.SOCK_STREAM, 18000), b"new") == b"new"
                assert asked(through(host, socket.SOCK_DGRAM, 18001), b"datagram") == b"datagram"
