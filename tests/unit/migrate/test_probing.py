"""A probe beside a move: what it is to ask, and that it is there and tells."""

import socket
from dataclasses import replace

import pytest

from migrate.probing import Probing, listening_ports, probe_words
from runtime.api import Container, ContainerSpec, ContainerState, NetworkSpec, Status
from runtime.errors import BadInput, WrongState

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
CONTAINER = Container(
    spec=ContainerSpec(
        id="aa0000000001",
        name="web1",
        rootfs="host",
        argv=("true",),
        created_at="",
        network=NetworkSpec(address="10.88.1.2/16", mac="02:42:0a:58:01:02", gateway="10.88.0.1"),
    ),
    state=ContainerState(status=Status.RUNNING, init_pid=0),
)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("10.88.1.2:6379", ["tcp", "10.88.1.2:6379"]),
        ("redis://h:6379", ["redis", "h:6379"]),
        ("udp://[fd00::1]:53", ["udp", "[fd00::1]:53"]),
        ("http://h:80/a/b?c", ["http", "h:80", "--path", "/a/b?c"]),
    ],
)
def test_addresses_name_a_kind_of_probe(asked: str, words: list[str]) -> None:
    assert probe_words(asked, CONTAINER) == words


@pytest.mark.parametrize("asked", ["h", "h:99999", "ftp://h:21", "udp://h:1/x", "h:80 -x", "http:///x"])
def test_what_is_no_address_of_a_service_is_refused_with_a_hint(asked: str) -> None:
    with pytest.raises(BadInput, match="no address of a service") as refused:
        probe_words(asked, CONTAINER)
    assert "HOST:PORT" in refused.value.hint


def test_auto_finds_nothing_where_nothing_listens() -> None:
    nowhere = replace(CONTAINER, state=ContainerState(status=Status.RUNNING, init_pid=2**22))
    with pytest.raises(WrongState, match="listens on no TCP port"):
        probe_words("auto", nowhere)


def test_listeners_for_others_are_read_from_the_kernels_tables() -> None:
    text = HEAD + (
        "   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
        "   1: 00000000:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1\n"
        "   2: 0201580A:18EC 0101580A:9C40 01 00000000:00000000 00:00000000 00000000     0        0 3 1\n"
    )
    assert listening_ports(text) == {6379}
    loopback, every = "0" * 24 + "01000000", "0" * 32
    text = HEAD + f"   0: {loopback}:0051 {every}:0000 0A x\n   1: {every}:0052 {every}:0000 0A x\n"
    assert listening_ports(text) == {0x52}


def test_a_probe_that_runs_tells_at_the_end_what_it_saw() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1000) as service,
        Probing(["tcp", f"127.0.0.1:{service.getsockname()[1]}"]) as probing,
    ):
        seen = probing.finish()
    assert (seen["failed"], seen["resets"]) == (0, 0)
    assert seen["downtime_ms"] > 0


def test_a_service_that_is_not_there_is_said_before_anything_moves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
    with pytest.raises(WrongState, match="refused"):
        Probing(["tcp", f"127.0.0.1:{port}"])
