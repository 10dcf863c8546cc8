"""Ports of a container that went away: what nft is told."""

import pytest

from runtime.api import PortMapping
from runtime.errors import BadInput
from runtime.forwarding import forward_rules

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


def test_what_is_no_port_is_refused() -> None:
    with pytest.raises(BadInput):
        forward_rules((PortMapping(host_port=0, container_port=80),), "10.88.0.5", 600)
