"""Whom a container knows at link level goes with it: its first words on the target need not ask."""

from __future__ import annotations

import json
import socket

import pytest

from runtime.errors import BadInput
from runtime.host import HostConfig
from runtime.neighbours import NeighbourTable, known_neighbours
from runtime.network import ensure_bridge, in_network_namespace
from tests.integration.test_network import FIRST, HOST, SECOND, guest, in_new_network, inside, listen, run, uplink
from tests.integration.test_network import whom_it_reaches as talk

ELSEWHERE = HostConfig(name="h", bridge_address="10.88.255.2/16")


def neighbours(pid: int) -> dict[str, str]:
    return {entry["dst"]: entry.get("lladdr", "") for entry in json.loads(inside(pid, "ip", "-j", "neigh"))}


@in_new_network
def test_neighbours_that_were_known_are_read_and_set_and_the_way_out_is_each_hosts_own() -> None:
    ensure_bridge(HOST)
    with uplink(), guest(FIRST) as first, guest(SECOND) as second:
        with listen(second.pid, "0.0.0.0", 80) as server:
            talk(first.pid, second.address, 80, server)
        with socket.create_server(("10.88.0.1", 81)) as host:
            talk(first.pid, "10.88.0.1", 81, host)
        known = known_neighbours(HOST, first.pid, first.spec)
        assert known == {second.address: second.spec.mac}
        # Where the way out is somebody else it is a neighbour like any other.
        assert "10.88.0.1" in known_neighbours(ELSEWHERE, first.pid, first.spec)
        inside(first.pid, "ip", "neigh", "flush", "all")
        table = NeighbourTable(HOST, first.spec)
        table.get_ready(known)
        assert neighbours(first.pid) == {}
        table.set(first.network)
        bridge = json.loads(run("ip", "-j", "link", "show", HOST.bridge))[0]["address"]
        assert neighbours(first.pid) == {**known, "10.88.0.1": bridge}


@in_new_network
def test_what_waits_for_an_unknown_neighbour_leaves_when_it_is_set() -> None:
    ensure_bridge(HOST)
    with (
        guest(SECOND) as second,
        guest(FIRST, connect=False) as first,
        in_network_namespace(second.pid, udp) as ear,
        in_network_namespace(first.pid, udp) as mouth,
    ):
        ear.bind(("0.0.0.0", 80))
        ear.settimeout(0.4)
        table = NeighbourTable(HOST, first.spec)
        table.get_ready({second.address: second.spec.mac})
        # Asks now, while nobody can hear it, and would ask again in a second.
        inside(first.pid, "sh", "-c", "echo 1000 >/proc/sys/net/ipv4/neigh/eth0/retrans_time_ms")
        mouth.sendto(b"waits", (second.address, 80))
        first.network.connect()
        table.set(first.network)
        assert ear.recv(100) == b"waits"


def udp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


@in_new_network
@pytest.mark.parametrize("known", [{"10.88.0": "02:42:00:00:00:01"}, {"10.88.0.7": "02:42"}])
def test_a_peers_neighbours_are_checked(known: dict[str, str]) -> None:
    ensure_bridge(HOST)
    with guest(FIRST) as first:
        table = NeighbourTable(HOST, first.spec)
        with pytest.raises(BadInput, match="neighbour"):
            table.get_ready(known)
