"""Rules and routes that lead a container's answers back to the host it came from."""

import json

import pytest

from runtime.api import NetworkSpec, PortMapping
from runtime.errors import BadInput
from runtime.host import HostConfig
from runtime.wayback import (
    MARK_MASK,
    MARKS,
    back_elements,
    back_rules,
    lead_back,
    mark_of,
    next_hop,
    parse_elements,
    way_back,
)
from tests.unit.migrate.preflight_values import SPEC

MAC = "02:43:00:00:00:01"
UDP = PortMapping(host_port=5300, container_port=53, protocol="udp")


def test_a_mark_and_a_next_hop_stand_for_each_bridge() -> None:
    mark = mark_of(MAC)
    assert mark & MARK_MASK == MARKS
    assert mark != mark_of("02:43:00:00:00:02")
    assert next_hop(MARKS | 0x010203) == "240.1.2.3"


def test_only_what_began_elsewhere_is_led_back() -> None:
    rules = back_rules().splitlines()
    middle, answer = [line for line in rules if "tcp flags" in line]
    assert "syn == 0 ct direction original ct status & 0x30 == 0" in middle
    assert "== syn | ack ct state invalid" in answer
    assert any("ip daddr @here notrack" in line for line in rules)
    assert any("@comes_from drop" in line for line in rules)
    assert any("icmp type redirect" in line and line.endswith("drop") for line in rules)


def test_entries_last_while_the_container_is_here_and_only_udp_ports_answer() -> None:
    text = back_elements("0123456789ab", "10.88.0.5", (UDP, PortMapping(host_port=80, container_port=80)), 5, MAC)
    assert 'way { 10.88.0.5 comment "0123456789ab" : 5 }' in text
    assert "answers { 10.88.0.5 . 53 timeout 600s }" in text
    assert "10.88.0.5 . 80" not in text
    assert "timeout 9s" in back_elements("0123456789ab", "10.88.0.5", (), 5, MAC, timeout_s=9)


def test_the_kernels_entries_are_read_with_and_without_time() -> None:
    elements = [
        [{"elem": {"val": "10.88.0.5", "timeout": 600, "expires": 599, "comment": "0123456789ab"}}, 7],
        ["10.88.0.6", 8],
    ]
    listing = {"nftables": [{"metainfo": {}}, {"map": {"name": "way", "elem": elements}}]}
    assert parse_elements(json.dumps(listing)) == [("10.88.0.5", 7, "0123456789ab"), ("10.88.0.6", 8, "")]
    assert parse_elements(json.dumps({"nftables": [{"map": {"name": "way"}}]})) == []


@pytest.mark.parametrize("mac", ["", "02:43", "02:43:00:00:00:0g", "02:43:00:00:00:01\n", "} ; flush ruleset"])
def test_what_a_peer_sends_for_a_mac_reaches_no_rule(mac: str) -> None:
    network = NetworkSpec(address="10.88.0.5/16", mac=MAC, gateway="10.88.0.1")
    with pytest.raises(BadInput, match="no MAC"):
        lead_back(HostConfig(name="h"), "0123456789ab", network, (), mac)


def test_a_host_that_is_not_the_way_out_of_its_containers_translates_nothing() -> None:
    host = HostConfig(name="h", bridge_address="10.88.255.1/16")
    assert way_back(host, SPEC) == ""
