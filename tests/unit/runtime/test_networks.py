"""User-defined networks, and the names of their containers."""

import dataclasses
from pathlib import Path

import pytest

from runtime.api import NetworkSpec
from runtime.errors import BadInput, NameTaken, NotFound, WrongState
from runtime.host import HostConfig
from runtime.names import BEGIN, END, names_in, with_names
from runtime.networks import BRIDGE_PATTERN, Networks, host_for, network_mismatch
from tests.unit.migrate.preflight_values import SPEC

ON_BLUE = NetworkSpec(address="10.90.1.5/24", mac="02:42:0a:5a:01:05", gateway="10.90.1.1", name="blue")


@pytest.fixture
def host(tmp_path: Path) -> HostConfig:
    return HostConfig(name="h", state_dir=tmp_path, bridge_address="10.88.255.1/16")


def test_a_network_is_kept_and_its_subnet_chosen_where_none_is_given(host: HostConfig) -> None:
    networks = Networks(host)
    assert networks.list() == []
    first, second = networks.create("blue"), networks.create("green")
    assert (first.subnet, first.gateway, second.subnet) == ("10.89.0.0/24", "10.89.0.1", "10.89.1.0/24")
    assert BRIDGE_PATTERN.fullmatch(first.bridge)
    assert first.bridge != second.bridge
    assert Networks(host).list() == [first, second]
    with pytest.raises(NameTaken):
        networks.create("blue")
    assert networks.remove("blue", ()) == first
    with pytest.raises(NotFound):
        networks.get("blue")


@pytest.mark.parametrize(
    ("name", "subnet", "gateway"),
    [
        ("bridge", "", ""),
        ("../x", "", ""),
        ("x", "10.88.7.0/24", ""),  # the host's own
        ("x", "10.90.1.0/33", ""),
        ("x", "10.90.1.1/24", ""),
        ("x", "10.90.1.0/30", ""),
        ("x", "10.90.1.0/24", "10.91.0.1"),
        ("x", "10.90.1.0/24", "10.90.1.255"),
        ("x", "10.90.1.0/24", "gateway"),
    ],
)
def test_what_is_no_network_is_refused(host: HostConfig, name: str, subnet: str, gateway: str) -> None:
    with pytest.raises(BadInput) as refused:
        Networks(host).create(name, subnet=subnet, gateway=gateway)
    assert refused.value.hint
    assert Networks(host).list() == []


def test_a_network_with_containers_stays(host: HostConfig) -> None:
    networks = Networks(host)
    networks.create("blue", subnet="10.90.1.0/24")
    with pytest.raises(WrongState, match="web1"):
        networks.remove("blue", [dataclasses.replace(SPEC, network=ON_BLUE)])
    assert [network.name for network in networks.list()] == ["blue"]


def test_a_container_of_a_network_sees_its_bridge_and_another_the_hosts(host: HostConfig) -> None:
    seen = host_for(host, ON_BLUE)
    assert (seen.subnet, seen.gateway, seen.bridge_address) == ("10.90.1.0/24", "10.90.1.1", "")
    assert seen.bridge != host.bridge
    assert host_for(host, SPEC.network) is host
    assert host_for(host, None) is host


def test_a_target_must_have_the_same_network(host: HostConfig) -> None:
    assert "no network blue" in network_mismatch(host, ON_BLUE)
    Networks(host).create("blue", subnet="10.90.2.0/24")
    assert "10.90.2.0/24" in network_mismatch(host, ON_BLUE)
    Networks(host).remove("blue", ())
    Networks(host).create("blue", subnet="10.90.1.0/24")
    assert network_mismatch(host, ON_BLUE) == ""
    assert network_mismatch(host, SPEC.network) == ""


def test_names_come_between_marks_and_what_others_wrote_stays() -> None:
    text = "127.0.0.1 localhost\n"
    one = with_names(text, {"a": "10.90.1.5"})
    assert one == f"127.0.0.1 localhost\n{BEGIN}\n10.90.1.5 a\n{END}\n"
    two = with_names(one + "::1 six\n", {"b": "10.90.1.6"})
    assert two == f"127.0.0.1 localhost\n{BEGIN}\n10.90.1.5 a\n10.90.1.6 b\n{END}\n::1 six\n"
    assert with_names(two, {"b": "10.90.1.6"}) == two
    assert with_names(two, {}, ["a", "b"]) == "127.0.0.1 localhost\n::1 six\n"
    assert "10.90.1.5 a" not in with_names(one, {"c": "10.90.1.5"})  # the address is another's now


def test_what_a_neighbour_knows_is_heard_but_does_not_outweigh_what_is_known() -> None:
    file = with_names("", {"a": "10.90.1.5"})
    assert names_in(file) == {"a": "10.90.1.5"}
    heard = {"a": "10.90.1.9", "b": "10.90.1.6", "c": "10.90.1.7", "d": "10.90.1.8"}
    assert names_in(with_names(file, {"b": "10.90.1.10", "e": "10.90.1.8"}, ["c"], heard)) == {
        "a": "10.90.1.5",
        "b": "10.90.1.10",
        "e": "10.90.1.8",
    }


def test_a_file_of_which_our_part_was_cut_keeps_what_is_left() -> None:
    cut = f"{BEGIN}\n10.90.1.5 a\n"
    assert with_names(cut, {"b": "10.90.1.6"}) == f"{cut}{BEGIN}\n10.90.1.6 b\n{END}\n"
