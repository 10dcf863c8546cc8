"""move --tcp: which connections survive, and how those end that do not."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.lab import HOSTS, TwoHosts, nothing_left_on
from tests.support.netns import in_netns
from tests.support.routed import FAR, GATEWAY, WAN, Connector, EchoServer, hosts_as_gateways

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def gateways(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    with hosts_as_gateways(two_hosts):
        yield two_hosts


def test_auto_closes_what_can_not_survive_and_keeps_the_rest(gateways: TwoHosts) -> None:
    hosts = gateways
    connector = Connector()
    client, host1 = (hosts.lab.host(name).holder.pid for name in ("client", "host1"))
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(hosts, *HOSTS))
        container = hosts.run(connector)
        stack.callback(container.remove)
        stack.callback(connector.close)
        near = stack.enter_context(EchoServer(client, hosts.client.address))
        far = stack.enter_context(EchoServer(client, FAR))
        own = stack.enter_context(EchoServer(host1, GATEWAY))
        places = {"inside": ("127.0.0.1", 8001), "near": (hosts.client.address, near.port)}
        places |= {"far": (FAR, far.port), "own": (GATEWAY, own.port)}
        for name, (address, port) in places.items():
            assert connector.order("open", name, address, port) == "ok"
            assert connector.order("ask", name, "before") == "before"
        assert far.peers[0][0] == WAN["host1"]  # the host's address, not the container's
        words = ("move", container.name, "--to", "host2", "--mode", "diskless", "--json")
        told = [line["what"] for line in hosts.lines("host1", *words, "--dry-run") if line["type"] == "warning"]
        assert not [line for line in told if f"{FAR}:{far.port}" in line]
        assert [line for line in told if f"{GATEWAY}:{own.port}" in line]
        assert not [line for line in told if hosts.client.address in line]
        assert connector.order("ask", "own", "still") == "still"  # a dry run closes nothing
        report = container.move("diskless", "stream")
        closed = sorted(name.rpartition(" ")[2] for name in report["closed_connections"])
        assert closed == [f"{GATEWAY}:{own.port}"]
        assert connector.order("ask", "own", "after") in ("EPIPE", "ECONNABORTED", "ECONNRESET", "ENOTCONN")
        deadline = time.monotonic() + 30
        while own.resets != 1:
            assert time.monotonic() < deadline, "the peer was not told"
            time.sleep(0.05)
        for name in ("inside", "near", "far"):
            assert connector.order("ask", name, "after") == "after"


def test_connections_under_the_hosts_address_go_on_through_it_wherever_the_container_moves(gateways: TwoHosts) -> None:
    """Out of the container, and in by a published port, TCP and UDP: each made on the host the container is on."""
    hosts, connector = gateways, Connector()
    client = hosts.lab.host("client").holder.pid

    def connected(host: str, kind: int, port: int) -> socket.socket:
        def connect() -> socket.socket:
            connection = socket.socket(socket.AF_INET, kind)
            connection.settimeout(20)
            connection.connect((WAN[host], port))
            return connection

        return in_netns(client, connect)

    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(hosts, *HOSTS))
        container = hosts.run(connector, "-p", "18001:8001", "-p", "18002:8002/udp")
        stack.callback(container.remove)
        stack.callback(connector.close)
        far = stack.enter_context(EchoServer(client, FAR))
        through: dict[str, socket.socket] = {}
        for number in range(4):
            host = container.host
            assert connector.order("open", f"far{number}", FAR, far.port) == "ok"
            assert connector.order("ask", f"far{number}", "new") == "new"
            assert far.peers[number][0] == WAN[host]
            for name, kind, port in (("tcp", socket.SOCK_STREAM, 18001), ("udp", socket.SOCK_DGRAM, 18002)):
                through[f"{name}{number}"] = stack.enter_context(connected(host, kind, port))
            report = container.move("diskless", "stream")
            assert report["closed_connections"] == []
            for earlier in range(number + 1):
                assert connector.order("ask", f"far{earlier}", f"after{number}") == f"after{number}"
            for name, connection in through.items():
                connection.sendall(f"{name} {number}".encode())
                assert connection.recv(100) == f"{name} {number}".encode()
        assert far.resets == 0


def test_keep_closes_nothing_and_mptcp_is_off_wherever_the_container_is(gateways: TwoHosts) -> None:
    connector = Connector()
    client, host1 = (gateways.lab.host(name).holder.pid for name in ("client", "host1"))
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(gateways, *HOSTS))
        container = gateways.run(connector)
        stack.callback(container.remove)
        stack.callback(connector.close)
        near = stack.enter_context(EchoServer(client, gateways.client.address))
        own = stack.enter_context(EchoServer(host1, GATEWAY))
        for name, address, port in (("near", gateways.client.address, near.port), ("own", GATEWAY, own.port)):
            assert connector.order("open", name, address, port) == "ok"
        assert container.exec("cat", "/proc/sys/net/mptcp/enabled").strip() == "0"
        report = container.move("diskless", "stream", "--tcp", "keep")
        assert report["closed_connections"] == []
        assert (near.resets, own.resets) == (0, 0)
        assert connector.order("ask", "near", "after") == "after"
        assert container.exec("cat", "/proc/sys/net/mptcp/enabled").strip() == "0"


def test_close_ends_all_connections_but_those_inside_the_container(two_hosts: TwoHosts) -> None:
    connector = Connector()
    client = two_hosts.lab.host("client").holder.pid
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(two_hosts, *HOSTS))
        container = two_hosts.run(connector)
        stack.callback(container.remove)
        near = stack.enter_context(EchoServer(client, two_hosts.client.address))
        assert connector.order("open", "inside", "127.0.0.1", 8001) == "ok"
        assert connector.order("open", "near", two_hosts.client.address, near.port) == "ok"
        report = container.move("precopy", "stream", "--tcp", "close")
        assert len(report["closed_connections"]) == 2  # that to the echo, and the one that brings the orders
        connector.close()
        connector.open(container)
        stack.callback(connector.close)
        assert connector.order("ask", "inside", "after") == "after"
        assert connector.order("ask", "near", "after") in ("EPIPE", "ECONNABORTED", "ECONNRESET", "ENOTCONN")


@pytest.mark.parametrize("probe", ["auto", "echo"])
def test_a_probe_beside_the_move_puts_the_downtime_into_the_report(two_hosts: TwoHosts, probe: str) -> None:
    connector = Connector()
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(two_hosts, *HOSTS))
        container = two_hosts.run(connector)
        stack.callback(container.remove)
        stack.callback(connector.close)
        asked = probe if probe == "auto" else f"echo://{container.address}:8001"
        for transport in ("stream", "ssh"):
            source = container.host
            report = container.move("diskless", transport, "--probe", asked)
            # On a busy machine either end of the gap may be seen late; that it is seen at all is what counts here.
            assert report["downtime_ms"] >= report["blackout_ms"] * 0.5
            assert report["downtime_ms"] < report["blackout_ms"] + 5000
            kept = two_hosts.lines(source, "report", report["id"], "--json")[0]
            assert kept["downtime_ms"] == report["downtime_ms"]
            assert "downtime" in two_hosts.cmigrate(source, "report", report["id"]).stdout


def test_a_probe_that_nothing_answers_refuses_the_move_before_it_begins(two_hosts: TwoHosts) -> None:
    connector = Connector()
    with ExitStack() as stack:
        stack.enter_context(nothing_left_on(two_hosts, *HOSTS))
        container = two_hosts.run(connector)
        stack.callback(container.remove)
        stack.callback(connector.close)
        words = ("move", container.name, "--to", "host2", "--mode", "diskless", "--probe", f"{container.address}:9")
        done = two_hosts.cmigrate("host1", *words, check=False)
        assert done.returncode != 0
        assert "--probe tcp://" in done.stderr
        assert container.inspect()["state"]["status"] == "running"
