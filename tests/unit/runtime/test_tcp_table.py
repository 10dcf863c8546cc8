"""The kernel's answer to who listens and who is connected."""

import os
import socket
import struct

import pytest

from runtime.errors import KernelCallFailed
from runtime.linux.inet_diag import NLMSG_ERROR
from runtime.linux.tcp_table import TcpTable, parse_listeners


@pytest.mark.parametrize(
    ("family", "address", "loopback"),
    [
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::", False),
    ],
)
def test_connections_that_nobody_accepts_are_counted(
    family: socket.AddressFamily, address: str, loopback: bool
) -> None:
    with TcpTable() as table, socket.create_server((address, 0), family=family) as server:
        port = server.getsockname()[1]
        to = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        with socket.create_connection((to, port)), socket.create_connection((to, port)) as second:
            mine = [listener for listener in table.listeners() if listener.port == port]
            assert [(listener.waiting, listener.loopback) for listener in mine] == [(2, loopback)]
            unaccepted = [one.remote_port for one in table.unaccepted() if one.local_port == port]
            assert len(unaccepted) == 2
            accepted, client = server.accept()
            unaccepted.remove(client[1])
            assert [one.remote_port for one in table.unaccepted() if one.local_port == port] == unaccepted
            accepted.close()
            mine = [listener for listener in table.listeners() if listener.port == port]
            # A connection is no listener, whatever its port.
            assert [listener.waiting for listener in mine] == [1]
            assert second.getsockname()[1] not in {listener.port for listener in table.listeners()}
    assert port not in {listener.port for listener in TcpTable().listeners()}


def test_more_listeners_than_one_answer_holds_are_all_found() -> None:
    servers = [socket.create_server(("127.0.0.1", 0)) for _number in range(600)]
    try:
        with TcpTable() as table:
            assert {server.getsockname()[1] for server in servers} <= {one.port for one in table.listeners()}
    finally:
        for server in servers:
            server.close()


def test_a_kernel_that_refuses_is_said_to() -> None:
    answer = struct.pack("=LHHLLi", 36, NLMSG_ERROR, 0, 0, os.getpid(), -2) + bytes(16)
    with pytest.raises(KernelCallFailed, match="no tcp_diag"):
        list(parse_listeners(answer))


def test_an_answer_that_is_cut_short_or_makes_no_sense_is_no_listener() -> None:
    assert list(parse_listeners(bytes(15))) == []
    assert list(parse_listeners(bytes(64))) == []
    assert list(parse_listeners(struct.pack("=LHHLL", 20, 20, 0, 0, 0) + bytes(4))) == []


@pytest.mark.parametrize(
    ("listen", "connect", "family", "shown"),
    [
        ("127.0.0.1", "127.0.0.1", socket.AF_INET, "127.0.0.1:{} - 127.0.0.1:{}"),
        ("::1", "::1", socket.AF_INET6, "[::1]:{} - [::1]:{}"),
        ("::", "127.0.0.1", socket.AF_INET6, "127.0.0.1:{} - 127.0.0.1:{}"),
    ],
)
def test_both_ends_of_a_connection_are_found_until_it_is_over_and_mapped_addresses_are_ipv4(
    listen: str, connect: str, family: socket.AddressFamily, shown: str
) -> None:
    with TcpTable() as table, socket.create_server((listen, 0), family=family, dualstack_ipv6=listen == "::") as server:
        port = server.getsockname()[1]
        with socket.create_connection((connect, port)) as client:
            own = client.getsockname()[1]
            with server.accept()[0]:
                found = [one for one in table.connections() if port in (one.local_port, one.remote_port)]
                assert {str(one) for one in found} == {shown.format(own, port), shown.format(port, own)}
                bits = {one.local_port: one.family_bits for one in found}
                assert bits == {port: 128 if ":" in listen else 32, own: 128 if ":" in connect else 32}
        assert port not in {one.local_port for one in table.connections() if one.remote_port != own}
