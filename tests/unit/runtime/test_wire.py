"""Wires between hosts that share no segment: what may cross, and for how long."""

import json
import math

import pytest

from runtime.errors import BadInput
from runtime.wire import WireSpec, check_wire, parse_grace
from runtime.wire_rules import wire_rules

ID, ADDRESS = "0123456789ab", "10.88.0.5"
MACS = ("02:42:0a:58:00:05", "33:33:ff:00:00:05")


def rules(gateway: str = "10.88.0.1", gateway6: str = "", grace_s: int = 600) -> str:
    return wire_rules(ID, address=ADDRESS, macs=MACS, gateway=gateway, gateway6=gateway6, grace_s=grace_s)


def test_only_what_the_container_sends_makes_a_wire_last() -> None:
    assert f"elements = {{ {ADDRESS} timeout 600s }}" in rules()
    assert [line.split()[:3] for line in rules().splitlines() if "update @alive" in line] == [["ip", "saddr", "@alive"]]
    forever = rules(grace_s=0)
    assert f"elements = {{ {ADDRESS} }}" in forever
    assert "update" not in forever


def test_nothing_goes_from_one_wire_to_the_other_but_on_its_way_to_or_from_the_container() -> None:
    text = rules()
    places = f'{{ "cm{ID}", "ch{ID}", "cw{ID}" }}'
    assert f'iifname "cv{ID}*" oifname != {places} drop' in text
    assert f'oifname "cv{ID}*" iifname != {places} drop' in text
    assert text.count(" drop\n") >= 5


def test_a_host_that_is_the_way_out_keeps_questions_for_it_to_itself() -> None:
    assert "arp operation request arp daddr ip 10.88.0.1 drop" in rules()
    assert "arp daddr ip 10.88.0.1" not in rules(gateway="")
    assert f"@th,64,128 {0xFD000088 << 96 | 1:#x} drop" in rules(gateway6="fd00:88::1")


@pytest.mark.parametrize("bad", ["", "10.88.0.5/16", "x } ; flush ruleset"])
def test_what_is_no_address_or_mac_is_refused(bad: str) -> None:
    with pytest.raises(BadInput):
        wire_rules(ID, address=bad, macs=MACS, gateway="", grace_s=1)
    with pytest.raises(BadInput):
        wire_rules(ID, address=ADDRESS, macs=[bad], gateway="", grace_s=1)


def test_a_wire_ends_at_an_address_of_this_host_or_is_refused() -> None:
    good = WireSpec(number=1, source="192.0.2.1", target="127.0.0.1", grace_s=1)
    assert check_wire(good) is good
    for source, target in (("192.0.2.1", "203.0.113.77"), ("fd00::1", "127.0.0.1")):
        with pytest.raises(BadInput):
            check_wire(WireSpec(number=1, source=source, target=target, grace_s=1))


def test_the_kernels_list_tells_how_long_a_wire_lasts() -> None:
    def listing(*elements: object) -> str:
        return json.dumps({"nftables": [{"metainfo": {}}, {"set": {"name": "alive", "elem": list(elements)}}]})

    assert parse_grace(listing({"elem": {"val": ADDRESS, "timeout": 600, "expires": 599}})) == (600, 599)
    assert parse_grace(listing(ADDRESS)) == (0, math.inf)
    assert parse_grace(json.dumps({"nftables": [{"set": {"name": "alive"}}]})) is None
