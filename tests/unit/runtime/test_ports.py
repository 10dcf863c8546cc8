"""A host port is had by one container or program at a time."""

from __future__ import annotations

import socket

import pytest

from runtime.api import ContainerSpec, PortMapping
from runtime.errors import BadInput, NameTaken
from runtime.ports import overlap, refuse_taken_ports
from runtime.store import ContainerStore


def spec_of(*ports: PortMapping, name: str = "web1") -> ContainerSpec:
    return ContainerSpec(
        id=ContainerStore.new_id(), name=name, rootfs="host", argv=("true",), created_at="", ports=ports
    )


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_free_ports_are_granted_and_none_at_all_need_no_look() -> None:
    port = free_port()
    refuse_taken_ports(spec_of(), [])
    refuse_taken_ports(spec_of(PortMapping(host_port=port, container_port=80)), [spec_of(name="other")])


def test_a_port_of_another_container_is_refused_by_its_name() -> None:
    port = PortMapping(host_port=free_port(), container_port=80)
    with pytest.raises(NameTaken, match=f"port {port.host_port}/tcp is taken by container db"):
        refuse_taken_ports(spec_of(port), [spec_of(port, name="db")])


def test_one_container_can_not_publish_a_port_twice() -> None:
    port = free_port()
    ports = [PortMapping(host_port=port, container_port=number) for number in (80, 81)]
    with pytest.raises(NameTaken, match="this container itself"):
        refuse_taken_ports(spec_of(*ports), [])


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_of_a_program_is_refused_and_free_when_it_has_ended(protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as program:
        program.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            program.listen()
        number = program.getsockname()[1]
        wanted = PortMapping(host_port=number, container_port=80, protocol=protocol)  # type: ignore[arg-type]
        with pytest.raises(NameTaken, match=f"port {number}/{protocol} is taken by a program of this host"):
            refuse_taken_ports(spec_of(wanted), [])
    refuse_taken_ports(spec_of(wanted), [])


def test_connections_that_linger_do_not_keep_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", number))
        accepted, _peer = server.accept()
        accepted.close()  # the side that closes first is the one that lingers
        client.close()
    refuse_taken_ports(spec_of(PortMapping(host_port=number, container_port=80)), [])


def test_an_address_that_this_host_has_not_is_bad_input() -> None:
    with pytest.raises(BadInput, match="192.0.2.99"):
        refuse_taken_ports(
            spec_of(PortMapping(host_port=free_port(), container_port=80, host_address="192.0.2.99")), []
        )


def test_ports_overlap_where_a_packet_could_be_meant_for_both() -> None:
    everywhere = PortMapping(host_port=80, container_port=1)
    here = PortMapping(host_port=80, container_port=2, host_address="192.0.2.1")
    there = PortMapping(host_port=80, container_port=2, host_address="192.0.2.2")
    by_udp = PortMapping(host_port=80, container_port=2, protocol="udp")
    assert overlap(everywhere, here)
    assert overlap(here, everywhere)
    assert not overlap(here, there)
    assert not overlap(everywhere, by_udp)
