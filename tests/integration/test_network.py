"""Networks of containers on a bridge, in network namespaces of their own: who reaches whom, and what is left.

Every test runs in a thread that has made itself a new network namespace and plays the host.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.api import NetworkSpec, PortMapping
from runtime.errors import KernelCallFailed
from runtime.host import HostConfig
from runtime.inside import SYSCTLS
from runtime.linux import calls
from runtime.network import (
    ContainerNetwork,
    allocate_address,
    ensure_bridge,
    in_network_namespace,
    link_name,
)

HOST = HostConfig(name="h")
FIRST, SECOND = "aa0000000001", "aa0000000002"
OUTSIDE, US = "192.0.2.2", "192.0.2.1"
WAIT_S = 5.0
# Long enough for a packet on this machine, short enough for a test that waits for none.
SILENCE_S = 0.3


def in_new_network(test: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def wrapper(*arguments: object, **named: object) -> None:
        failure: list[BaseException] = []

        def body() -> None:
            try:
                calls.unshare(calls.CLONE_NEWNET)
                run("ip", "link", "set", "lo", "up")
                test(*arguments, **named)
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]

    return wrapper


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def inside(pid: int, *argv: str) -> str:
    return run("nsenter", "-t", str(pid), "-U", "--preserve-credentials", "-n", *argv)


@contextlib.contextmanager
def namespace(*options: str) -> Iterator[int]:
    """A process in a network namespace of its own."""
    own = os.readlink("/proc/thread-self/ns/net")
    with subprocess.Popen(["unshare", *options, "--net", "sleep", "120"], stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + WAIT_S
            while os.readlink(f"/proc/{process.pid}/ns/net") == own or b"sleep" not in _command(process.pid):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            yield process.pid
        finally:
            process.kill()


def _command(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()[:5]


@dataclass(frozen=True, kw_only=True)
class Guest:
    """A container's namespace and its network."""

    pid: int
    spec: NetworkSpec
    network: ContainerNetwork

    @property
    def address(self) -> str:
        return self.spec.address.partition("/")[0]


@contextlib.contextmanager
def guest(container_id: str, *, connect: bool = True) -> Iterator[Guest]:
    with (
        namespace("--user", "--map-root-user") as pid,
        ContainerNetwork(HOST, container_id) as network,
    ):
        spec = allocate_address(HOST, container_id, [])
        network.attach(pid, spec, connect=connect)
        try:
            yield Guest(pid=pid, spec=spec, network=network)
        finally:
            network.detach()


@contextlib.contextmanager
def outside() -> Iterator[int]:
    """Another machine, on a link that has nothing to do with the bridge; it knows no way to containers."""
    with namespace() as pid:
        run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        run("ip", "address", "add", f"{US}/24", "dev", "up0")
        run("ip", "link", "set", "up0", "up")
        run("nsenter", "-t", str(pid), "-n", "ip", "address", "add", f"{OUTSIDE}/24", "dev", "eth0")
        run("nsenter", "-t", str(pid), "-n", "ip", "link", "set", "eth0", "up")
        yield pid


@contextlib.contextmanager
def uplink() -> Iterator[int]:
    """Another machine in the containers' own segment: 10.88.255.9, by a foreign port of the bridge."""
    with namespace() as pid:
        run("ip", "link", "add", "lab0", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        run("ip", "link", "set", "lab0", "master", HOST.bridge, "up")
        run("nsenter", "-t", str(pid), "-n", "ip", "address", "add", "10.88.255.9/16", "dev", "eth0")
        run("nsenter", "-t", str(pid), "-n", "ip", "link", "set", "eth0", "up")
        yield pid


def listen(pid: int, address: str, port: int) -> socket.socket:
    return in_network_namespace(pid, lambda: socket.create_server((address, port)))


def dial(pid: int, address: str, port: int, timeout_s: float = WAIT_S) -> socket.socket:
    return in_network_namespace(pid, lambda: socket.create_connection((address, port), timeout=timeout_s))


def whom_it_reaches(pid: int, address: str, port: int, server: socket.socket) -> str:
    """Say a word from ``pid`` to address:port; the address from which ``server`` heard it."""
    server.settimeout(WAIT_S)
    with dial(pid, address, port) as client:
        answer, (peer, _port) = server.accept()
        with answer:
            client.sendall(b"word")
            assert answer.recv(10) == b"word"
            answer.sendall(b"answer")
            assert client.recv(10) == b"answer"
    return str(peer)


def ports_of_the_bridge() -> set[str]:
    return {link["ifname"] for link in json.loads(run("ip", "-j", "link", "show", "master", HOST.bridge))}


def read_sysctls() -> dict[str, str]:
    """Those of SYSCTLS that this kernel has."""
    files = {name: Path("/proc/sys/net", name) for name in SYSCTLS}
    return {name: " ".join(file.read_text().split()) for name, file in files.items() if file.exists()}


def links_and_rules() -> tuple[set[str], str]:
    return {name for _index, name in socket.if_nameindex()}, run("nft", "list", "ruleset")


# The bridge


@in_new_network
def test_the_bridge_has_the_gateways_address_and_making_it_again_changes_nothing() -> None:
    ensure_bridge(HOST)
    before = run("ip", "address", "show", HOST.bridge), run("nft", "list", "ruleset")
    assert "inet 10.88.0.1/16" in before[0]
    ensure_bridge(HOST)
    assert (run("ip", "address", "show", HOST.bridge), run("nft", "list", "ruleset")) == before


@in_new_network
def test_a_bridge_with_an_address_of_its_own_leaves_the_gateways_alone() -> None:
    ensure_bridge(HostConfig(name="h", bridge_address="10.88.255.2/16"))
    text = run("ip", "address", "show", HOST.bridge)
    assert "10.88.255.2/16" in text
    assert "10.88.0.1" not in text


@in_new_network
def test_the_bridges_mac_stays_while_ports_come_and_go_and_a_foreign_port_stays() -> None:
    ensure_bridge(HOST)
    first = json.loads(run("ip", "-j", "link", "show", HOST.bridge))[0]["address"]
    with uplink():
        for container_id in (FIRST, SECOND):
            with guest(container_id):
                assert json.loads(run("ip", "-j", "link", "show", HOST.bridge))[0]["address"] == first
        ensure_bridge(HOST)
        assert ports_of_the_bridge() == {"lab0"}


@in_new_network
def test_two_commands_at_once_make_one_bridge() -> None:
    pid = os.getpid()
    namespace_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    failures: list[BaseException] = []

    def make() -> None:
        try:
            calls.setns(namespace_fd, calls.CLONE_NEWNET)
            ensure_bridge(HOST)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    os.close(namespace_fd)
    assert failures == [], pid
    assert run("ip", "-4", "address", "show", HOST.bridge).count("inet ") == 1


# A container on it


@in_new_network
def test_a_container_gets_its_address_mac_way_out_and_sysctls() -> None:
    ensure_bridge(HOST)
    with guest(FIRST) as it:
        (link,) = [x for x in json.loads(inside(it.pid, "ip", "-j", "address")) if x["ifname"] == "eth0"]
        assert link["address"] == it.spec.mac
        assert [f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["family"] == "inet"] == [
            it.spec.address
        ]
        assert "default via 10.88.0.1 dev eth0" in inside(it.pid, "ip", "route")
        assert "LOOPBACK,UP" in inside(it.pid, "ip", "link", "show", "lo")
        values = in_network_namespace(it.pid, read_sysctls)
        assert values == {name: SYSCTLS[name] for name in values}
        assert values["ipv4/ip_unprivileged_port_start"] == "0"
        assert ports_of_the_bridge() == {link_name(FIRST)}


@in_new_network
def test_containers_reach_each_other_the_host_and_the_outside_under_the_hosts_address() -> None:
    ensure_bridge(HOST)
    with (
        outside() as machine,
        guest(FIRST) as first,
        guest(SECOND) as second,
        listen(second.pid, "0.0.0.0", 80) as neighbour,
        socket.create_server(("10.88.0.1", 81)) as host,
        listen(machine, "0.0.0.0", 82) as world,
    ):
        assert whom_it_reaches(first.pid, second.address, 80, neighbour) == first.address
        assert whom_it_reaches(first.pid, "10.88.0.1", 81, host) == first.address
        assert whom_it_reaches(first.pid, OUTSIDE, 82, world) == US


@in_new_network
def test_a_container_reaches_nothing_on_the_hosts_loopback() -> None:
    ensure_bridge(HOST)
    with guest(FIRST) as it, socket.create_server(("127.0.0.1", 83)):
        # What root in a container can do about its own loopback.
        inside(it.pid, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet")
        inside(it.pid, "ip", "address", "del", "127.0.0.1/8", "dev", "lo")
        inside(it.pid, "ip", "route", "add", "127.0.0.1", "via", "10.88.0.1", "src", it.address)
        with pytest.raises(TimeoutError):
            dial(it.pid, "127.0.0.1", 83, SILENCE_S)


@in_new_network
def test_a_firewall_that_drops_what_it_does_not_know_lets_containers_through_once() -> None:
    run("nft", "add", "table", "ip", "filter")
    run("nft", "add", "chain", "ip", "filter", "FORWARD", "{ type filter hook forward priority 0; policy drop; }")
    ensure_bridge(HOST)
    ensure_bridge(HOST)
    assert run("nft", "list", "chain", "ip", "filter", "FORWARD").count('iifname "cmigrate0" accept') == 1
    with outside() as machine, guest(FIRST) as it, listen(machine, "0.0.0.0", 82) as world:
        assert whom_it_reaches(it.pid, OUTSIDE, 82, world) == US
        with listen(it.pid, "0.0.0.0", 80):
            run("nsenter", "-t", str(machine), "-n", "ip", "route", "add", "10.88.0.0/16", "via", US)
            with pytest.raises(TimeoutError):
                dial(machine, it.address, 80, SILENCE_S)


# The moments of a move


@in_new_network
def test_a_link_that_is_not_connected_says_nothing_and_a_connected_one_answers() -> None:
    ensure_bridge(HOST)
    with guest(FIRST, connect=False) as it, listen(it.pid, "0.0.0.0", 80) as server:
        assert ports_of_the_bridge() == set()
        with pytest.raises(OSError, match="timed out|No route"):
            socket.create_connection((it.address, 80), timeout=SILENCE_S)
        it.network.connect()
        with socket.create_connection((it.address, 80), timeout=WAIT_S), server.accept()[0]:
            pass


@in_new_network
def test_a_connection_outlives_a_disconnect_and_gets_what_was_sent_meanwhile() -> None:
    ensure_bridge(HOST)
    with (
        guest(FIRST) as it,
        listen(it.pid, "0.0.0.0", 80) as server,
        socket.create_connection((it.address, 80), timeout=WAIT_S) as client,
        server.accept()[0] as answer,
        ContainerNetwork(HOST, FIRST) as another_command,
    ):
        another_command.look_up()
        another_command.disconnect()
        another_command.disconnect()
        client.sendall(b"held")
        answer.settimeout(SILENCE_S)
        with pytest.raises(TimeoutError):
            answer.recv(10)
        another_command.connect()
        answer.settimeout(WAIT_S)
        assert answer.recv(10) == b"held"


@in_new_network
def test_an_announcement_reaches_the_neighbours_three_times() -> None:
    ensure_bridge(HOST)
    with uplink() as machine, guest(FIRST) as it:

        def listener() -> socket.socket:
            packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
            packets.bind(("eth0", 0))
            packets.settimeout(WAIT_S)
            return packets

        with in_network_namespace(machine, listener) as packets, ContainerNetwork(HOST, FIRST) as another_command:
            for network in (it.network, another_command):
                if network is another_command:
                    network.open_inside(it.pid, it.spec)
                network.announce()
                mac, address = bytes.fromhex(it.spec.mac.replace(":", "")), socket.inet_aton(it.address)
                for _ in range(3):
                    frame = packets.recv(100)
                    assert (frame[:6], frame[6:12], frame[22:28], frame[28:32]) == (b"\xff" * 6, mac, mac, address)


@in_new_network
def test_announcements_come_again_later_and_nobody_waits_for_them() -> None:
    ensure_bridge(HOST)
    with uplink() as machine, guest(FIRST) as it:

        def listener() -> socket.socket:
            packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
            packets.bind(("eth0", 0))
            packets.settimeout(WAIT_S)
            return packets

        with in_network_namespace(machine, listener) as packets:
            begin = time.monotonic()
            it.network.announce_again((0.05, 0.1))
            for least_s in (0.05, 0.15):
                assert packets.recv(100)[28:32] == socket.inet_aton(it.address)
                assert time.monotonic() - begin >= least_s
        deadline = time.monotonic() + WAIT_S
        while any(thread.name == "announce" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        it.network.announce_again()


@in_new_network
def test_a_container_without_a_link_can_be_disconnected_and_detached() -> None:
    with ContainerNetwork(HOST, FIRST) as network:
        network.disconnect()
        network.detach()
        network.announce()
        assert network.statistics() is None


# Published ports


PORTS = (PortMapping(host_port=8080, container_port=80),)


@in_new_network
def test_a_published_port_answers_everybody_who_asks_this_host() -> None:
    ensure_bridge(HOST)
    with ExitStack() as stack:
        machine, segment = stack.enter_context(outside()), stack.enter_context(uplink())
        first, second = stack.enter_context(guest(FIRST)), stack.enter_context(guest(SECOND))
        server = stack.enter_context(listen(first.pid, "0.0.0.0", 80))
        first.network.publish(PORTS, first.spec)
        assert whom_it_reaches(machine, US, 8080, server) == OUTSIDE, "an outside client's address is kept"
        for pid, address in ((segment, "10.88.0.1"), (second.pid, US), (second.pid, "10.88.0.1"), (first.pid, US)):
            whom_it_reaches(pid, address, 8080, server)
        own = in_this_namespace()
        for address in ("127.0.0.1", "10.88.0.1", US):
            whom_it_reaches(own, address, 8080, server)
        with ContainerNetwork(HOST, FIRST) as another_command:
            another_command.look_up()
            another_command.disconnect()
            another_command.connect()
        whom_it_reaches(first.pid, US, 8080, server)
        first.network.publish(PORTS, first.spec)
        first.network.unpublish()
        first.network.unpublish()
        with pytest.raises(ConnectionRefusedError):
            dial(machine, US, 8080)


def in_this_namespace() -> int:
    """A name under /proc of the calling thread: its network namespace is not the process's."""
    return threading.get_native_id()


@in_new_network
def test_a_port_published_on_one_address_answers_on_that_one_only_and_udp_is_not_tcp() -> None:
    ensure_bridge(HOST)
    ports = (
        PortMapping(host_port=8080, container_port=80, host_address=US),
        PortMapping(host_port=53, container_port=53, protocol="udp"),
    )
    with outside() as machine, guest(FIRST) as it, listen(it.pid, "0.0.0.0", 80) as server:
        it.network.publish(ports, it.spec)
        assert whom_it_reaches(machine, US, 8080, server) == OUTSIDE
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("10.88.0.1", 8080), timeout=WAIT_S)
        with (
            in_network_namespace(it.pid, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as name_server,
            in_network_namespace(machine, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client,
        ):
            name_server.bind(("0.0.0.0", 53))
            for sock in (name_server, client):
                sock.settimeout(WAIT_S)
            client.sendto(b"question", (US, 53))
            question, peer = name_server.recvfrom(100)
            name_server.sendto(question.upper(), peer)
            assert client.recvfrom(100) == (b"QUESTION", (US, 53))


# Beginning and end


@in_new_network
def test_detaching_leaves_what_was_there_before_and_can_be_done_twice() -> None:
    ensure_bridge(HOST)
    before = links_and_rules()
    with guest(FIRST) as it:
        it.network.publish(PORTS, it.spec)
        assert links_and_rules() != before
        it.network.detach()
        assert links_and_rules() == before
        it.network.detach()


@in_new_network
def test_a_link_that_a_dead_container_left_is_replaced() -> None:
    ensure_bridge(HOST)
    run("ip", "link", "add", link_name(FIRST), "type", "veth", "peer", "name", "left")
    with guest(FIRST) as it, listen(it.pid, "0.0.0.0", 80) as server:
        assert whom_it_reaches(in_this_namespace(), it.address, 80, server) == "10.88.0.1"


@in_new_network
def test_attaching_to_a_process_that_is_gone_fails_by_name_and_leaves_no_link() -> None:
    ensure_bridge(HOST)
    before = links_and_rules()
    with subprocess.Popen(["true"]) as process:
        pass
    with ContainerNetwork(HOST, FIRST) as network, pytest.raises(KernelCallFailed, match=link_name(FIRST)):
        network.attach(process.pid, allocate_address(HOST, FIRST, []))
    assert links_and_rules() == before


@in_new_network
def test_statistics_count_from_the_containers_point_of_view() -> None:
    ensure_bridge(HOST)
    with guest(FIRST) as it, listen(it.pid, "0.0.0.0", 80) as server:
        with socket.create_connection((it.address, 80), timeout=WAIT_S) as client, server.accept()[0] as answer:
            answer.sendall(b"x" * 100_000)
            left = 100_000
            while left:
                left -= len(client.recv(left))
        counted = it.network.statistics()
        assert counted is not None
        assert counted.sent_bytes >= 100_000
        assert 0 < counted.received_bytes < 50_000
        assert min(counted.received_packets, counted.sent_packets) > 3
        assert counted.dropped_packets == 0


@in_new_network
def test_without_the_bridge_the_error_names_it() -> None:
    with (
        namespace() as pid,
        ContainerNetwork(HOST, FIRST) as network,
        pytest.raises(Exception, match="cmigrate0 is gone"),
    ):
        network.attach(pid, allocate_address(HOST, FIRST, []))
    assert link_name(FIRST) not in links_and_rules()[0]
