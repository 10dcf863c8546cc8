"""Datagrams that waited: the file that carries them, and what is sent to bring them again, byte by byte."""

import ipaddress
import struct
from collections import Counter

import msgpack
import pytest

from runtime.datagrams import (
    LINK_MTU_BYTES,
    MAX_DATA_BYTES,
    MAX_DATAGRAMS,
    Datagram,
    frames,
    from_file,
    packets,
    to_file,
)
from runtime.errors import CorruptData
from runtime.linux.inet_diag import InetSocket
from runtime.udp_queues import Waiting, finds_its_way

MAC = bytes.fromhex("02420a580005")
FOUR = Datagram(
    source=ipaddress.ip_address("10.88.0.9"),
    source_port=4000,
    destination=ipaddress.ip_address("10.88.0.5"),
    port=53,
    data=b"question",
)
SIX = Datagram(
    source=ipaddress.ip_address("fd00:88::9"),
    source_port=4000,
    destination=ipaddress.ip_address("fd00:88::5"),
    port=53,
    data=b"question",
)


def with_data(one: Datagram, data: bytes) -> Datagram:
    return Datagram(
        source=one.source, source_port=one.source_port, destination=one.destination, port=one.port, data=data
    )


def folded(data: bytes) -> int:
    """The sum that is 0xFFFF where the checksum in the data is right."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def right_udp(one: Datagram, body: bytes) -> bool:
    pseudo = one.source.packed + one.destination.packed + struct.pack("!II", len(body), 17)
    return folded(pseudo + body) == 0xFFFF


def test_a_frame_of_ipv4_is_to_the_container_from_the_sender_with_right_checksums() -> None:
    (frame,) = frames(FOUR, MAC, 7)
    assert (frame[:6], frame[12:14]) == (MAC, b"\x08\x00")
    header, body = frame[14:34], frame[34:]
    assert header[:2] == b"\x45\0"
    assert struct.unpack("!HHH", header[2:8]) == (28 + len(FOUR.data), 7, 0)
    assert (header[9], header[12:]) == (17, FOUR.source.packed + FOUR.destination.packed)
    assert folded(header) == 0xFFFF
    assert struct.unpack("!HHH", body[:6]) == (4000, 53, 8 + len(FOUR.data))
    assert body[8:] == FOUR.data
    assert right_udp(FOUR, body)


def test_a_frame_of_ipv6_is_to_the_container_from_the_sender_with_a_right_checksum() -> None:
    (frame,) = frames(SIX, MAC, 7)
    assert (frame[:6], frame[12:14]) == (MAC, b"\x86\xdd")
    header, body = frame[14:54], frame[54:]
    assert header[:6] == b"\x60\0\0\0" + struct.pack("!H", 8 + len(SIX.data))
    assert (header[6], header[8:]) == (17, SIX.source.packed + SIX.destination.packed)
    assert right_udp(SIX, body)


@pytest.mark.parametrize("one", [FOUR, SIX])
@pytest.mark.parametrize("data", [b"", b"x", b"odd", bytes(8)])
def test_any_data_gets_a_checksum_that_is_right_and_not_the_one_that_means_none(one: Datagram, data: bytes) -> None:
    sent = with_data(one, data)
    (packet,) = packets(sent, 1, LINK_MTU_BYTES)
    body = packet[20 if one is FOUR else 40 :]
    assert right_udp(sent, body)
    assert body[6:8] != b"\0\0"


def test_a_checksum_that_comes_to_zero_is_sent_as_all_ones() -> None:
    (packet,) = packets(with_data(FOUR, b"\0\0"), 1, LINK_MTU_BYTES)
    # With what the checksum was as data all words together are 0xFFFF, and their complement is nothing.
    (packet,) = packets(with_data(FOUR, packet[26:28]), 1, LINK_MTU_BYTES)
    assert packet[26:28] == b"\xff\xff"


@pytest.mark.parametrize("size", [1472, 1473, 1480, 3000, MAX_DATA_BYTES])
def test_what_is_longer_than_the_link_takes_goes_in_fragments_of_ipv4(size: int) -> None:
    one = with_data(FOUR, bytes(number % 251 for number in range(size)))
    made = packets(one, 9, LINK_MTU_BYTES)
    assert (len(made) > 1) is (size > 1472)
    body = bytearray()
    for number, packet in enumerate(made):
        assert len(packet) <= LINK_MTU_BYTES
        assert folded(packet[:20]) == 0xFFFF
        length, identification, place = struct.unpack("!HHH", packet[2:8])
        assert (length, identification) == (len(packet), 9)
        assert bool(place & 0x2000) is (number < len(made) - 1)
        assert (place & 0x1FFF) * 8 == len(body)
        body += packet[20:]
    assert body[8:] == one.data
    assert right_udp(one, bytes(body))


@pytest.mark.parametrize("size", [1452, 1453, 3000, MAX_DATA_BYTES])
def test_what_is_longer_than_the_link_takes_goes_in_fragments_of_ipv6(size: int) -> None:
    one = with_data(SIX, bytes(number % 251 for number in range(size)))
    made = packets(one, 9, LINK_MTU_BYTES)
    if size == 1452:
        assert len(made) == 1
        return
    body = bytearray()
    for number, packet in enumerate(made):
        assert len(packet) <= LINK_MTU_BYTES
        assert struct.unpack("!H", packet[4:6]) == (len(packet) - 40,)
        assert packet[6] == 44
        following, _zero, place, identification = struct.unpack("!BBHI", packet[40:48])
        assert (following, identification, bool(place & 1)) == (17, 9, number < len(made) - 1)
        assert place & ~7 == len(body)
        body += packet[48:]
    assert body[8:] == one.data
    assert right_udp(one, bytes(body))


def test_datagrams_come_back_from_their_file_in_their_order() -> None:
    sent = [with_data(FOUR if number % 2 else SIX, bytes(number)) for number in range(20)]
    assert from_file(to_file(sent)) == sent


GOOD = [bytes(4), 1, bytes(4), 2, b"data"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        msgpack.packb(7),
        msgpack.packb([7]),
        msgpack.packb([GOOD[:4]]),
        msgpack.packb([[bytes(5), *GOOD[1:]]]),
        msgpack.packb([["10.0.0.1", *GOOD[1:]]]),
        msgpack.packb([[bytes(16), *GOOD[1:]]]),
        msgpack.packb([[bytes(4), 65536, *GOOD[2:]]]),
        msgpack.packb([[bytes(4), True, *GOOD[2:]]]),
        msgpack.packb([[*GOOD[:3], -1, b""]]),
        msgpack.packb([[*GOOD[:4], "text"]]),
        msgpack.packb([[*GOOD[:4], bytes(MAX_DATA_BYTES + 1)]]),
        msgpack.packb([GOOD] * (MAX_DATAGRAMS + 1)),
        msgpack.packb([GOOD]) + b"\0",
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_its_name(content: bytes) -> None:
    with pytest.raises(CorruptData, match=r"datagrams\.img"):
        from_file(content)


def bound_to(local: str, port: int = 53, remote: str = "0.0.0.0", remote_port: int = 0) -> InetSocket:
    return InetSocket(
        family=2,
        local=ipaddress.ip_address(local),
        local_port=port,
        remote=ipaddress.ip_address(remote),
        remote_port=remote_port,
        waiting=1,
        inode=1,
    )


def test_only_what_comes_to_the_same_socket_again_and_to_no_other_is_carried() -> None:
    own = frozenset({FOUR.destination, SIX.destination})
    once, twice = Counter({53: 1}), Counter({53: 2})

    def found(one: Datagram, to: InetSocket, listeners: Counter[int]) -> bool:
        return finds_its_way(one, to, own, listeners)

    anyone = bound_to("0.0.0.0")
    assert found(FOUR, anyone, twice)
    assert found(SIX, bound_to("::", remote="::"), twice)
    assert found(FOUR, bound_to("10.88.0.5", remote="10.88.0.9", remote_port=4000), once)
    assert found(FOUR, bound_to("::ffff:10.88.0.5", remote="::ffff:10.88.0.9", remote_port=4000), once)
    assert not found(FOUR, bound_to("10.88.0.5", remote="10.88.0.8", remote_port=4000), once)
    assert not found(FOUR, bound_to("10.88.0.5", remote="10.88.0.9", remote_port=4001), once)
    group = Datagram(
        source=FOUR.source, source_port=1, destination=ipaddress.ip_address("224.0.0.251"), port=53, data=b""
    )
    assert found(group, anyone, once)
    assert not found(group, anyone, twice)
    everyone = Datagram(
        source=FOUR.source, source_port=1, destination=ipaddress.ip_address("10.88.255.255"), port=53, data=b""
    )
    assert found(everyone, anyone, once)
    assert not found(everyone, anyone, twice)


def test_what_is_lost_is_said_and_nothing_where_nothing_is() -> None:
    assert str(Waiting(datagrams=(FOUR,))) == ""
    assert str(Waiting(lost=3)).startswith("3 datagrams")
    assert "4096 datagrams or 8 MiB" in str(Waiting(cut=True))
    assert "udp_diag" in str(Waiting(unseen=True))
