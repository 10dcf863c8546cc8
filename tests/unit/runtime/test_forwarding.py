"""Ports of a container that went away: what nft is told."""

import json

import pytest

from runtime.api import PortMapping
from runtime.errors import BadInput
from runtime.forwarding import beside, forward_rules, leading_to

PORTS = (
    PortMapping(host_port=8080, container_port=80),
    PortMapping(host_port=53, container_port=5353, protocol="udp"),
    PortMapping(host_port=9000, container_port=90, host_address="192.0.2.1"),
)


def test_every_entry_ends_by_itself_and_ports_of_one_address_are_left_out() -> None:
    lines = forward_rules(PORTS, "10.88.0.5", 600).splitlines()
    elements = [line.partition("cmigrate-forward ")[2] for line in lines if line.startswith("add element")]
    assert elements == [
        "moved { 10.88.0.5 timeout 600s }",
        "by_tcp { 8080 timeout 600s : 10.88.0.5 . 80 }",
        "by_udp { 53 timeout 600s : 10.88.0.5 . 5353 }",
    ]


def test_over_a_wire_clients_are_seen_as_they_are_but_for_the_two_hosts() -> None:
    lines = forward_rules(PORTS[:1], "10.88.0.5", 0, ("192.0.2.1", "198.51.100.1")).splitlines()
    elements = [line.partition("cmigrate-forward ")[2] for line in lines if line.startswith("add element")]
    assert elements == [
        "under { 10.88.0.5 : 192.0.2.1 }",
        "near { 198.51.100.1 . 10.88.0.5 }",
        "by_tcp { 8080 : 10.88.0.5 . 80 }",
    ]


def test_what_leads_to_an_address_is_found_in_the_kernels_lists() -> None:
    timed = {"elem": {"val": 8080, "timeout": 600, "expires": 599}}
    elements = [
        [timed, {"concat": ["10.88.0.5", 80]}],
        [53, {"concat": ["10.88.0.5", 5353]}],
        [9, {"concat": ["10.88.0.6", 9]}],
    ]
    assert leading_to(json.dumps({"nftables": [{"metainfo": {}}, {"map": {"elem": elements}}]}), "10.88.0.5") == [
        8080,
        53,
    ]
    pairs = [
        {"concat": ["192.0.2.1", "10.88.0.5"]},
        {"elem": {"val": {"concat": ["192.0.2.2", "10.88.0.5"]}, "timeout": 600}},
        {"concat": ["192.0.2.3", "10.88.0.6"]},
    ]
    listing = json.dumps({"nftables": [{"set": {"elem": pairs}}]})
    assert beside(listing, "10.88.0.5") == ["192.0.2.1", "192.0.2.2"]


def test_what_is_no_port_is_refused() -> None:
    with pytest.raises(BadInput):
        forward_rules((PortMapping(host_port=0, container_port=80),), "10.88.0.5", 600)
