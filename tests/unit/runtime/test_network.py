"""Addresses and rules as values: what is chosen, what is refused, what nftables is told."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import nft
from runtime.address import allocate_address, host_address, mac_for, subnet_of
from runtime.announcements import gratuitous_arp
from runtime.api import NetworkSpec, PortMapping
from runtime.errors import BadInput, NoRoom
from runtime.host import HostConfig
from runtime.network import link_name
from runtime.nft import ForwardChain, dropping_chains, forwarding_rules, published_rules, rule

DATA = Path(__file__).parents[2] / "data"
HOST = HostConfig(name="h")


def network(address: str = "10.88.0.5/16", mac: str = "02:42:0a:58:00:05") -> NetworkSpec:
    return NetworkSpec(address=address, mac=mac, gateway="10.88.0.1")


# Addresses


def test_an_address_is_made_from_the_id_and_always_the_same() -> None:
    first, second = (allocate_address(HOST, "aa0000000001", []) for _ in range(2))
    assert first == second
    assert first != allocate_address(HOST, "aa0000000002", [])
    assert first.gateway == HOST.gateway
    assert first.mac == mac_for(first.address)


def test_the_mac_says_the_address_and_is_locally_administered() -> None:
    assert mac_for("10.88.1.255/16") == "02:42:0a:58:01:ff"


@given(
    container_id=st.text("0123456789abcdef", min_size=12, max_size=12),
    prefix=st.integers(16, 29),
    used=st.sets(st.integers(0, 7)),
)
def test_a_chosen_address_is_free_inside_and_leaves_the_last_ones_to_hosts(
    container_id: str, prefix: int, used: set[int]
) -> None:
    subnet = ipaddress.IPv4Network(f"10.88.0.0/{prefix}")
    host = HostConfig(name="h", subnet=str(subnet))
    taken = {f"{subnet[offset]}/{prefix}" for offset in used}
    try:
        chosen = allocate_address(host, container_id, taken)
    except NoRoom:
        assert prefix == 29
        return
    address = ipaddress.IPv4Interface(chosen.address)
    assert address.network == subnet
    assert address.with_prefixlen not in taken
    assert address.ip not in (subnet[0], subnet[1], subnet[-1])
    assert subnet.num_addresses - (int(address.ip) - int(subnet[0])) > min(256, subnet.num_addresses // 8)


def test_every_address_of_a_small_subnet_is_found_before_there_is_no_room() -> None:
    host = HostConfig(name="h", subnet="10.1.0.0/28", gateway="10.1.0.1")
    used: list[str] = []
    for _ in range(12):
        used.append(allocate_address(host, "aa0000000001", used).address)
    assert sorted(used) == sorted(f"10.1.0.{number}/28" for number in range(2, 14))
    with pytest.raises(NoRoom, match="no free address in 10.1.0.0/28"):
        allocate_address(host, "aa0000000001", used)


@pytest.mark.parametrize("wanted", ["10.88.7.7", "10.88.7.7/16", "10.88.7.7/24"])
def test_a_wanted_address_is_taken_as_it_is_with_the_subnets_prefix(wanted: str) -> None:
    assert allocate_address(HOST, "aa0000000001", [], wanted).address == "10.88.7.7/16"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("10.89.0.1", "is not in 10.88.0.0/16"),
        ("10.88.0.1", "is taken"),
        ("10.88.0.0", "is taken"),
        ("10.88.255.255", "is taken"),
        ("10.88.255.3", "is taken"),
        ("10.88.0.9", "is taken"),
        ("fd00::1", "--ip fd00::1"),
        ("web", "--ip web"),
        ("10.88.0.300", "--ip"),
    ],
)
def test_a_wanted_address_that_does_not_fit_is_refused(wanted: str, reason: str) -> None:
    host = HostConfig(name="h", bridge_address="10.88.255.3/16")
    with pytest.raises(BadInput, match=reason):
        allocate_address(host, "aa0000000001", ["10.88.0.9/16"], wanted)


@pytest.mark.parametrize("subnet", ["10.88.0.0", "10.88.0.5/16", "fd00::/64", "nonsense"])
def test_a_subnet_that_is_none_names_the_configuration(subnet: str) -> None:
    host = HostConfig(name="h", subnet=subnet)
    if subnet == "10.88.0.0":  # one address is a subnet too, with room for nobody
        with pytest.raises(NoRoom):
            allocate_address(host, "aa0000000001", [])
    else:
        with pytest.raises(BadInput, match="config.toml"):
            subnet_of(host)


def test_a_gateway_that_is_none_names_the_configuration() -> None:
    with pytest.raises(BadInput, match="config.toml"):
        allocate_address(HostConfig(name="h", gateway="router"), "aa0000000001", [])


@pytest.mark.parametrize("address", ["10.88.0.5; flush ruleset", "10.88.0.5/16 }", "", "fd00::1/64", "10.88.0.5/99"])
def test_an_address_from_elsewhere_is_read_strictly(address: str) -> None:
    with pytest.raises(BadInput):
        host_address(network(address))
    with pytest.raises(BadInput):
        gratuitous_arp(network(address))


# Links


def test_a_links_name_fits_the_kernels_limit() -> None:
    assert len(link_name("0123456789ab")) <= 15


def test_an_announcement_is_a_broadcast_arp_request_for_the_containers_own_address() -> None:
    frame = gratuitous_arp(network())
    mac, address = bytes.fromhex("02420a580005"), bytes([10, 88, 0, 5])
    assert frame[:14] == b"\xff" * 6 + mac + b"\x08\x06"
    assert frame[14:22] == bytes.fromhex("0001080006040001")
    assert frame[22:] == mac + address + bytes(6) + address


@pytest.mark.parametrize("mac", ["", "02:42", "zz:42:0a:58:00:05", "02:42:0a:58:00:05:06"])
def test_a_mac_that_is_none_is_refused(mac: str) -> None:
    with pytest.raises(BadInput):
        gratuitous_arp(network(mac=mac))


# Rules


def test_a_port_is_led_to_the_container() -> None:
    assert rule(PortMapping(host_port=8080, container_port=80), "10.88.0.5") == "tcp dport 8080 dnat to 10.88.0.5:80"
    some = PortMapping(host_port=53, container_port=5353, protocol="udp", host_address="192.0.2.1")
    assert rule(some, "10.88.0.5") == "ip daddr 192.0.2.1 udp dport 53 dnat to 10.88.0.5:5353"


@pytest.mark.parametrize(
    "changes",
    [
        {"host_port": 0},
        {"host_port": 65536},
        {"host_port": "80; flush ruleset"},
        {"container_port": -1},
        {"container_port": None},
        {"protocol": "tcp dport 22 accept\n"},
        {"host_address": "0.0.0.0/0"},
        {"host_address": "1.2.3.4 } flush ruleset"},
        {"host_address": "::"},
    ],
)
def test_a_port_that_is_none_is_refused_and_never_reaches_nft(changes: dict[str, object]) -> None:
    fields: dict[str, object] = {"host_port": 8080, "container_port": 80} | changes
    with pytest.raises(BadInput):
        published_rules("t", [PortMapping(**fields)], address="10.88.0.5", subnet="10.88.0.0/16")  # type: ignore[arg-type]


def test_a_replaced_table_is_gone_and_back_in_one_transaction() -> None:
    assert nft.replace_table("t", "chain c {", "}").splitlines()[:3] == [
        "table ip t {}",
        "delete table ip t",
        "table ip t {",
    ]


def test_chains_that_drop_what_is_forwarded_are_found_among_all() -> None:
    listing = (DATA / "nft-list-chains.txt").read_text()
    assert list(dropping_chains(listing)) == [
        ForwardChain(family="ip", table="filter", name="FORWARD"),
        ForwardChain(family="inet", table="myfw", name="my-forward"),
    ]


def test_a_dropping_chain_gets_what_goes_out_what_answers_and_what_was_published() -> None:
    chain = ForwardChain(family="ip", table="filter", name="FORWARD")
    assert forwarding_rules(chain, "cmigrate0").splitlines() == [
        'insert rule ip filter FORWARD oifname "cmigrate0" ct status dnat accept',
        'insert rule ip filter FORWARD oifname "cmigrate0" ct state established,related accept',
        'insert rule ip filter FORWARD iifname "cmigrate0" accept',
    ]
