"""A probe beside a move: what it is to ask, and that it is there and tells."""

import socket
from dataclasses import replace

import pytest

from migrate.probing import Probing, probe_words
from runtime.api import Container, ContainerSpec, ContainerState, NetworkSpec, Status
from runtime.errors import BadInput, WrongState

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
