"""What a container says of itself over IPv6, byte by byte."""

import dataclasses
import struct

import pytest

from runtime.address import with_ipv6
from runtime.announcements import announcements, is_for, neighbour_advertisement, solicited_mac
from runtime.api import NetworkSpec
from runtime.errors import BadInput
from runtime.host import HostConfig

HOST = HostConfig(name="h", gateway6="fd00:88::1/64")
FOUR = NetworkSpec(address="10.88.0.5/16", mac="02:42:0a:58:00:05", gateway="10.88.0.1")
BOTH = with_ipv6(FOUR, HOST, "fd00:88::1:5", [])
MAC = bytes.fromhex("02420a580005")


def test_an_address_without_a_length_gets_64_and_the_hosts_gateway_as_way_out() -> None:
    assert (BOTH.address6, BOTH.gateway6) == ("fd00:88::1:5/64", "fd00:88::1")
    assert with_ipv6(FOUR, HOST, "fd00:99::5/48", []).gateway6 == ""
    assert with_ipv6(FOUR, HostConfig(name="h"), "fd00:88::5", []).gateway6 == ""


@pytest.mark.parametrize("wanted", ["10.0.0.1", "x", "fe80::1", "ff02::1", "::1", "::", "fd00:88::1", "fd00:88::7"])
def test_an_address_that_can_not_be_a_containers_is_refused_with_a_hint(wanted: str) -> None:
    with pytest.raises(BadInput, match="--ip6") as refused:
        with_ipv6(FOUR, HOST, wanted, ["", "fd00:88::7/64"])
    assert refused.value.hint


def test_an_advertisement_is_what_the_rfc_says_and_its_checksum_is_right() -> None:
    frame = neighbour_advertisement(BOTH)
    address, all_nodes = bytes.fromhex("fd000088000000000000000000010005"), b"\xff\x02" + b"\0" * 13 + b"\1"
    assert frame[:14] == bytes.fromhex("333300000001") + MAC + b"\x86\xdd"
    header, body = frame[14:54], frame[54:]
    assert header == struct.pack("!IHBB", 0x60000000, 32, 58, 255) + address + all_nodes
    assert (body[0], body[1], body[4:8]) == (136, 0, b"\x20\0\0\0"), "an advertisement that overrides"
    assert body[8:24] == address
    assert body[24:] == b"\x02\x01" + MAC
    words = struct.unpack("!36H", address + all_nodes + struct.pack("!II", 32, 58) + body)
    total = sum(words)
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


def test_a_container_without_ipv6_says_nothing_of_it() -> None:
    assert len(announcements(FOUR)) == 1
    assert announcements(BOTH)[1:] == (neighbour_advertisement(BOTH),)
    assert solicited_mac(FOUR) == b""


@pytest.mark.parametrize("text", ["fd00::5", "nonsense/64", "10.0.0.1/8"])
def test_a_peers_address_is_checked(text: str) -> None:
    bad = dataclasses.replace(FOUR, address6=text)
    if text == "fd00::5":
        announcements(bad)  # a length of 128 is one, too
        return
    with pytest.raises(BadInput):
        announcements(bad)


def test_held_frames_that_are_the_containers_are_told_from_others() -> None:
    def frame(destination: str, protocol: str) -> bytes:
        return bytes.fromhex(destination + "020000000001" + protocol)

    solicited = solicited_mac(BOTH)
    assert solicited == bytes.fromhex("3333ff010005")
    assert is_for(frame("02420a580005", "86dd"), MAC, solicited)
    assert is_for(frame("3333ff010005", "86dd"), MAC, solicited)
    assert is_for(frame("ffffffffffff", "0806"), MAC, solicited)
    assert not is_for(frame("ffffffffffff", "0800"), MAC, solicited)
    assert not is_for(frame("333300000001", "86dd"), MAC, solicited)
