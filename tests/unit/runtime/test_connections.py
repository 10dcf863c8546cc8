"""Which connections a move ends."""

import ipaddress

import pytest

from runtime.api import NetworkSpec
from runtime.connections import fate, lost_connections
from runtime.linux.tcp_table import TcpConnection

NETWORK = NetworkSpec(
    address="10.88.0.5/16",
    mac="02:42:0a:58:00:05",
    gateway="10.88.0.1",
    address6="fd00:88::5/64",
    gateway6="fd00:88::1",
)


def to(remote: str, local: str = "10.88.0.5") -> TcpConnection:
    where, here = ipaddress.ip_address(remote), ipaddress.ip_address(local)
    return TcpConnection(local=here, local_port=4000, remote=where, remote_port=80, family_bits=where.max_prefixlen)


@pytest.mark.parametrize("remote", ["127.0.0.1", "::1", "10.88.0.5", "10.88.7.7", "192.0.2.1", "2001:db8::1"])
def test_connections_inside_the_container_to_its_neighbours_and_to_the_world_survive(remote: str) -> None:
    connection = to(remote, remote if remote in ("127.0.0.1", "::1") else "10.88.0.5")
    assert fate(connection, NETWORK, host_is_gateway=True) == ""


@pytest.mark.parametrize("remote", ["10.88.0.1", "fd00:88::1"])
def test_a_connection_to_the_host_itself_is_lost_where_its_address_is_the_targets_after_the_move(remote: str) -> None:
    assert "that address will be the target's" in fate(to(remote), NETWORK, host_is_gateway=True)


def test_a_connection_to_a_gateway_that_is_another_machine_survives() -> None:
    assert fate(to("10.88.0.1"), NETWORK, host_is_gateway=False) == ""


def test_keep_ends_none_and_close_all_but_those_inside() -> None:
    found = [to("127.0.0.1", "127.0.0.1"), to("10.88.7.7"), to("10.88.0.1")]
    assert lost_connections(found, NETWORK, "keep", host_is_gateway=True) == []
    closed = [connection for connection, _why in lost_connections(found, NETWORK, "close", host_is_gateway=True)]
    assert closed == found[1:]
    assert [c for c, _why in lost_connections(found, NETWORK, "auto", host_is_gateway=True)] == found[2:]
