"""What preflight says of connections."""

import ipaddress

from migrate.preflight.connections import judge_connections
from runtime.linux.tcp_table import TcpConnection


def found(count: int) -> list[tuple[TcpConnection, str]]:
    here, there = ipaddress.ip_address("10.88.0.5"), ipaddress.ip_address("192.0.2.1")
    return [
        (TcpConnection(local=here, local_port=port, remote=there, remote_port=80, family_bits=32), "a reason")
        for port in range(1, count + 1)
    ]


def test_connections_are_listed_by_reason_and_a_few_by_name() -> None:
    (finding,) = judge_connections(found(9), "auto", able=True)
    assert (finding.level, finding.check) == ("warning", "connections")
    assert "9 TCP connections will be closed at the freeze (a reason): 10.88.0.5:1 - 192.0.2.1:80" in finding.what
    assert finding.what.endswith("and 4 more")
    assert list(judge_connections([], "auto", able=True)) == []


def test_a_kernel_that_can_not_close_them_blocks_close_and_is_told_of_with_auto() -> None:
    (finding,) = judge_connections([], "close", able=False)
    assert (finding.level, finding.check) == ("blocker", "connections")
    assert "--tcp keep" in finding.remedy
    (finding,) = judge_connections(found(1), "auto", able=False)
    assert "1 TCP connection will be reset by the peer after the move" in finding.what
