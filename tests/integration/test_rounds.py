"""Pre-copy of a container that writes faster than it may be sent: what the operator's limits lead to."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.lab import TwoHosts, nothing_left_on, slow_link

# Writes all of its 48 MiB again and again, about 100 MiB a second.
WRITER = """
import mmap, time
area = mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
word, at = 1, 0
while True:
    for _ in range(256):
        area[at:at + 8] = word.to_bytes(8, "little")
        at = (at + 4096) % len(area)
    word += 1
    time.sleep(0.01)
"""
# All of it takes 1.5 s on the writer's link: far more than the limit, which is far more than every blackout takes.
LINK_MIB_S = 32
SLOW = ("--mode", "precopy", "--transport", "stream", "--downtime-limit", "400", "--compress", "none")
# Less than CRIU needs for an empty process: no number of rounds gets there.
HOPELESS = ("--downtime-limit", "30")


@pytest.fixture
def writer(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    program = os.path.realpath("/usr/bin/python3")
    with nothing_left_on(two_hosts, "host1", "host2"), slow_link(two_hosts, "host1", LINK_MIB_S):
        two_hosts.cmigrate(
            "host1", "run", "-d", "--name", "w", "--cpus", "1.5", "--rootfs", "host", "--", program, "-c", WRITER
        )
        try:
            yield two_hosts
        finally:
            for host in ("host1", "host2"):
                two_hosts.cmigrate(host, "rm", "-f", "w", check=False)


def quota(hosts: TwoHosts, host: str) -> list[str]:
    """Of the container's cgroup, in whatever version."""
    parent = hosts.config(host).cgroup_parent
    found = [
        file.read_text().split()[0]
        for name in ("cpu.max", "cpu.cfs_quota_us")
        for file in sorted(Path("/sys/fs/cgroup").glob(f"**/{parent}/*/{name}"))
    ]
    assert found
    return found


def test_abort_leaves_it_running_where_it_is(writer: TwoHosts) -> None:
    before = quota(writer, "host1")
    done = writer.cmigrate(
        "host1", "move", "w", "--to", "host2", *SLOW, *HOPELESS, "--on-timeout", "abort", "--no-throttle", check=False
    )
    assert done.returncode == 5, done.stderr
    assert "downtime limit" in done.stderr
    assert "hint: " in done.stderr
    (line,) = writer.lines("host1", "ps", "--json")
    assert (line["name"], line["status"]) == ("w", "running")
    assert quota(writer, "host1") == before


def test_it_is_slowed_down_until_it_fits_and_runs_at_its_own_speed_on_the_target(writer: TwoHosts) -> None:
    lines = writer.lines("host1", "move", "w", "--to", "host2", *SLOW, "--json")
    rounds = [line for line in lines if line["type"] == "round"]
    assert any(line["decision"] == "throttle" for line in rounds)
    assert len({line["round"] for line in rounds}) == len(rounds) == lines[-1]["rounds"]
    assert lines[-1]["outcome"] == "migrated"
    assert quota(writer, "host2") == quota_of_one_and_a_half(writer)


def quota_of_one_and_a_half(hosts: TwoHosts) -> list[str]:
    hosts.cmigrate("host1", "run", "-d", "--name", "other", "--cpus", "1.5", "--rootfs", "host", "--", "sleep", "100")
    try:
        return quota(hosts, "host1")
    finally:
        hosts.cmigrate("host1", "rm", "-f", "other")


def test_one_round_is_all_when_no_more_are_allowed(writer: TwoHosts) -> None:
    lines = writer.lines("host1", "move", "w", "--to", "host2", *SLOW, "--max-rounds", "1", "--json")
    assert lines[-1]["rounds"] == 1
    assert lines[-1]["outcome"] == "migrated"


def test_what_does_not_fit_follows_after_the_switch_where_that_is_allowed(writer: TwoHosts) -> None:
    options = (*SLOW, *HOPELESS, "--no-throttle", "--on-timeout", "postcopy")
    refused = writer.cmigrate("host1", "move", "w", "--to", "host2", *options, check=False)
    assert refused.returncode == 2
    assert "--allow-postcopy" in refused.stderr
    lines = writer.lines("host1", "move", "w", "--to", "host2", *options, "--allow-postcopy", "--verify", "--json")
    assert [line["decision"] for line in lines if line["type"] == "round"][-1] == "stop"
    report = lines[-1]
    assert (report["outcome"], report["mode"]) == ("migrated", "precopy")
    assert report["fill"]["pages_after"] > 0
    assert report["verify"]["pages_later"] > 0
    assert report["verify"]["differing"] == 0


def test_a_plan_with_consent_may_take_what_needs_it_and_knows_limits(writer: TwoHosts) -> None:
    words = ("plan", "w", "--to", "host2", "--downtime-limit", "1", "--transport", "stream", "--json")

    def planned(*options: str) -> dict[str, Any]:
        (line,) = [line for line in writer.lines("host1", *words, *options) if line["type"] == "plan"]
        return line

    assert planned()["mode"] not in ("postcopy", "hybrid")
    (slow,) = [
        found for found in planned("--allow-postcopy", "--bandwidth", "4m")["predictions"] if found["mode"] == "precopy"
    ]
    # 48 MiB at 4 MiB a second.
    assert slow["total_ms"] > 10_000


def test_a_plan_shows_every_mode_and_moves_nothing_and_auto_does_what_it_says(writer: TwoHosts) -> None:
    (planned,) = [
        line for line in writer.lines("host1", "plan", "w", "--to", "host2", "--json") if line["type"] == "plan"
    ]
    assert {"stopcopy", "diskless", "precopy"} <= {found["mode"] for found in planned["predictions"]}
    assert all(found["blackout_ms"] > 0 for found in planned["predictions"])
    said = writer.cmigrate("host1", "move", "w", "--to", "host2", "--dry-run").stdout
    assert "w can move to host2" in said
    assert "stopcopy" in said
    (line,) = writer.lines("host1", "ps", "--json")
    assert (line["name"], line["status"]) == ("w", "running")
    report = writer.lines("host1", "move", "w", "--to", "host2", "--json")[-1]
    assert (report["outcome"], report["mode"]) == ("migrated", "precopy")
    assert report["why"]
    assert report["predicted_blackout_ms"] > 0


@pytest.mark.parametrize(
    "wrong", [("--bandwidth", "fast"), ("--bandwidth", "1kbit"), ("--max-rounds", "0"), ("--on-timeout", "never")]
)
def test_limits_that_are_none_are_refused(two_hosts: TwoHosts, wrong: tuple[str, str]) -> None:
    done = two_hosts.cmigrate("host1", "move", "w", "--to", "host2", *wrong, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
