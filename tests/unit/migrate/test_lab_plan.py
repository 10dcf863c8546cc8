"""What a lab decides and reads, without making one."""

import ipaddress
from pathlib import Path

import pytest

from migrate.lab import plan
from migrate.lab.cgroups import parse_hierarchies
from migrate.lab.processes import ProcessId, listening_ports
from migrate.lab.record import LabHost, LabRecord, record_from_json
from runtime.errors import BadInput, MissingFeature
from runtime.host import load_host_config

HYBRID = """\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
32 30 0:28 / /sys/fs/cgroup/my\\040memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
34 24 0:29 / /mnt/again rw,relatime - cgroup2 cgroup2 rw
"""

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1D35 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 55 1 0 100 0 0 10 0
   1: 0100007F:0016 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 56 1 0 20 4 30 10 -1
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1gbit", ("1000000000bit", 500_000)),
        ("1.5Gbit", ("1500000000bit", 750_000)),
        ("64kbit", ("64000bit", 131072)),
        ("10mbit", ("10000000bit", 131072)),
    ],
)
def test_a_rate_gets_a_bucket_that_holds_a_tick_and_the_largest_packet(text: str, expected: tuple[str, int]) -> None:
    rate = plan.parse_rate(text)
    assert (rate.text, rate.burst_bytes) == expected


@pytest.mark.parametrize("text", ["", "fast", "1", "0mbit", "-1mbit", "1gbit burst 1", "1gbps", "1 gbit"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        plan.parse_rate(text)


@pytest.mark.parametrize("count", [0, -1, plan.MAX_HOSTS + 1])
def test_a_lab_has_at_least_one_host_and_not_too_many(count: int) -> None:
    with pytest.raises(BadInput):
        plan.host_names(count)


def test_addresses_of_hosts_are_distinct_and_none_is_a_containers_or_the_broadcast() -> None:
    addresses = [ipaddress.IPv4Address(plan.host_address(number)) for number in range(1, plan.MAX_HOSTS + 1)]
    assert len(set(addresses)) == plan.MAX_HOSTS
    assert all(address in plan.SUBNET and address != plan.SUBNET.broadcast_address for address in addresses)
    # runtime.network leaves the last 256 addresses of the subnet to hosts.
    assert min(addresses) >= plan.SUBNET[plan.SUBNET.num_addresses - 256]


def test_the_configuration_of_a_host_is_one_that_a_host_can_read(tmp_path: Path) -> None:
    text = plan.config_toml(name="host1", address="10.88.255.1", cgroup_parent="cmigrate-lab/x/host1/containers")
    (tmp_path / "config.toml").write_text(text)
    host = load_host_config(tmp_path)
    assert (host.name, host.bridge_address, host.gateway) == ("host1", "10.88.255.1/16", "10.88.0.1")
    assert (host.bridge, host.stream_port) == (plan.BRIDGE, plan.STREAM_PORT)


def test_one_directory_always_gives_the_same_id_and_another_one_another() -> None:
    assert plan.lab_id(Path("/a")) == plan.lab_id(Path("/a")) != plan.lab_id(Path("/b"))


def test_hierarchies_of_a_hybrid_host_are_all_found() -> None:
    found = parse_hierarchies(HYBRID)
    assert str(found.unified) == "/sys/fs/cgroup/unified"
    assert [str(path) for path in found.others] == ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/my memory"]


def test_a_host_without_cgroup_version_2_is_told_how_to_mount_it() -> None:
    with pytest.raises(MissingFeature) as caught:
        parse_hierarchies("\n".join(line for line in HYBRID.splitlines() if "cgroup2" not in line))
    assert "mount -t cgroup2" in caught.value.hint


def test_only_ports_on_which_somebody_listens_count() -> None:
    assert listening_ports([TCP, ""]) == {7477}


def test_a_record_comes_back_as_it_was_written() -> None:
    holder = ProcessId(pid=1, start_ticks=2)
    host = LabHost(name="host1", address="10.88.255.1", holder=holder, daemons={"sshd": holder})
    record = LabRecord(id="0123abcd", rate="1gbit", hosts=(host,), complete=True)
    assert record_from_json(record.to_json()) == record
    with pytest.raises(ValueError):
        record_from_json(record.to_json() | {"schema": 9})
