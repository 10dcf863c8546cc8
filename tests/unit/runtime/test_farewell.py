"""What makes a client notice that its connection is no more, byte by byte."""

import ipaddress
import struct

import pytest

from runtime.farewell import strange_segment
from runtime.linux.tcp_table import TcpConnection


def folded(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize(("local", "remote"), [("10.88.0.5", "10.88.0.9"), ("fd00:88::5", "fd00:88::9")])
def test_it_goes_to_the_client_acknowledges_something_and_carries_nothing(local: str, remote: str) -> None:
    here, there = ipaddress.ip_address(local), ipaddress.ip_address(remote)
    bits = here.max_prefixlen
    one = TcpConnection(local=here, local_port=80, remote=there, remote_port=4000, family_bits=bits)
    packet = strange_segment(one)
    header, segment = (packet[:20], packet[20:]) if bits == 32 else (packet[:40], packet[40:])
    assert header[-2 * len(here.packed) :] == here.packed + there.packed
    if bits == 32:
        assert folded(header) == 0xFFFF
        assert (header[0], struct.unpack("!H", header[2:4]), header[9]) == (0x45, (len(packet),), 6)
    else:
        assert (header[0] >> 4, struct.unpack("!H", header[4:6]), header[6]) == (6, (20,), 6)
    assert struct.unpack("!HH", segment[:4]) == (80, 4000)
    assert (len(segment), segment[12] >> 4, segment[13]) == (20, 5, 0x10)
    assert folded(here.packed + there.packed + struct.pack("!II", 20, 6) + segment) == 0xFFFF
