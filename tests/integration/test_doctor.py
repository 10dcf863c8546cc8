"""`cmigrate doctor` on a real kernel: what works is said to work, what is broken on purpose is named."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.journal import Journal
from migrate.preflight import Finding, doctor
from runtime.criu.binary import find_criu
from runtime.criu.features import CACHE_FILE, cpu_mismatch, criu_features
from runtime.facts_host import probe_network, probe_overlay
from runtime.host import HostConfig
from tests.leaks import SANDBOX

DEAD_ID = "0123456789ab"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostConfig]:
    run_dir = Path(tempfile.mkdtemp(prefix="cmigrate-run-", dir="/dev/shm"))
    yield HostConfig(
        name="localhost",
        config_dir=tmp_path / "etc",
        state_dir=tmp_path / "state",
        run_dir=run_dir,
        cgroup_parent=f"cmigrate-doctor-{secrets.token_hex(3)}",
        bridge="cmdoc0",
        subnet="10.98.0.0/16",
        gateway="10.98.0.1",
    )
    shutil.rmtree(run_dir)


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=20, stdin=subprocess.DEVNULL, capture_output=True)


def bad(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.level != "ok"}


def test_a_host_that_was_set_up_has_no_blocker(host: HostConfig) -> None:
    findings = doctor(host)
    assert [finding for finding in findings if finding.level == "blocker"] == []
    good = {finding.check for finding in findings if finding.level == "ok"}
    assert {"criu", "namespaces", "overlayfs", "network", "freezer", "init", "disk", "memory"} <= good


def test_looking_makes_nothing_but_the_cache(host: HostConfig) -> None:
    doctor(host)
    assert [path.name for path in host.run_dir.iterdir()] == [CACHE_FILE]
    assert not host.state_dir.exists()


def test_criu_is_asked_once_and_again_when_the_answer_may_have_changed(host: HostConfig) -> None:
    criu = find_criu()
    first = criu_features(criu, host.run_dir)
    assert first.check_error == ""
    assert first.version == criu.version
    file = host.run_dir / CACHE_FILE
    kept = json.loads(file.read_bytes())
    kept["features"]["missing"] = ["compat_cr"]
    file.write_text(json.dumps(kept))
    assert criu_features(criu, host.run_dir).missing == ("compat_cr",)
    kept["key"]["boot_id"] = "another boot"
    file.write_text(json.dumps(kept))
    assert criu_features(criu, host.run_dir) == first
    file.write_bytes(b"{")
    assert criu_features(criu, host.run_dir) == first


def test_criu_judges_cpus(host: HostConfig) -> None:
    criu = find_criu()
    own = criu_features(criu, host.run_dir).cpuinfo
    if not own:
        pytest.skip("CRIU describes CPUs on x86-64 only")
    assert cpu_mismatch(criu, own, host.run_dir) == ""
    assert "magic" in cpu_mismatch(criu, b"garbage", host.run_dir)
    assert [path.name for path in host.run_dir.iterdir()] == [CACHE_FILE]


def test_no_criu_is_a_blocker_that_says_what_to_do(host: HostConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMIGRATE_CRIU", "/no/such/criu")
    finding = bad(doctor(host))["criu"]
    assert finding.level == "blocker"
    assert "/no/such/criu" in finding.what
    assert finding.remedy


def test_a_criu_that_fails_its_check_is_a_blocker_and_is_asked_again(
    host: HostConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that answers the version and nothing else."""
    broken = tmp_path / "criu"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Version: 4.2.1'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CMIGRATE_CRIU", str(broken))
    assert bad(doctor(host))["criu"].level == "blocker"
    assert not (host.run_dir / CACHE_FILE).exists()


def test_an_overlay_that_can_not_be_made_says_why(host: HostConfig) -> None:
    assert probe_overlay(host.state_dir) == ""
    # The upper layer of an overlay must not be on procfs.
    assert probe_overlay(Path("/proc")) != ""


def test_network_probes_leave_this_namespace_alone() -> None:
    before = os.readlink("/proc/self/ns/net")
    assert probe_network() == ""
    assert os.readlink("/proc/self/ns/net") == before


def test_what_dead_containers_left_is_named_with_its_remedy(host: HostConfig) -> None:
    (host.run_dir / DEAD_ID).mkdir()
    move = host.state_dir / "moves" / "m1"
    move.mkdir(parents=True)
    old = time.time() - 3600
    os.utime(move, (old, old))
    with contextlib.ExitStack() as undo:
        run("ip", "link", "add", f"cm{DEAD_ID}", "type", "veth", "peer", "cmdead0")
        undo.callback(subprocess.run, ["ip", "link", "delete", f"cm{DEAD_ID}"], capture_output=True, timeout=10)
        for name in (f"cmigrate-{DEAD_ID}", "CRIU-4711"):
            run("nft", "add", "table", "inet", name)
            undo.callback(subprocess.run, ["nft", "delete", "table", "inet", name], capture_output=True, timeout=10)
        findings = [finding for finding in doctor(host) if finding.check == "leftover"]
        assert len(findings) == 5
        for finding in findings:
            assert finding.level == "warning"
            # The remedy is the cure.
            run(*finding.remedy.split())
    assert [f.level for f in doctor(host) if f.check == "leftover"] == ["ok"]


def test_a_move_whose_files_are_open_is_not_called_a_leftover(host: HostConfig) -> None:
    move = host.state_dir / "moves" / "m1"
    move.mkdir(parents=True)
    old = time.time() - 3600
    with open(move / "pages", "w") as _held:
        os.utime(move, (old, old))
        assert "leftover" not in bad(doctor(host))


def test_a_move_in_doubt_is_a_blocker_and_a_broken_off_one_a_warning(host: HostConfig) -> None:
    with Journal(host.journal_dir, "doubtful", side="source") as journal:
        journal.append("PREPARED")
        journal.append("COMMITTED")
    with Journal(host.journal_dir, "broken", side="target") as journal:
        journal.append("RESERVED")
    with Journal(host.journal_dir, "over", side="source") as journal:
        journal.append("ROLLED_BACK")
    findings = bad(doctor(host))
    assert findings["in-doubt"].level == "blocker"
    assert "doubtful" in findings["in-doubt"].what
    assert findings["journal"].level == "warning"
    assert "broken (target, RESERVED)" in findings["journal"].what
    assert "over" not in findings["journal"].what


def test_a_damaged_container_is_named(host: HostConfig) -> None:
    directory = host.containers_dir / DEAD_ID
    directory.mkdir(parents=True)
    (directory / "spec.json").write_text("{")
    assert str(directory / "spec.json") in bad(doctor(host))["store"].what


@pytest.mark.skipif(not SANDBOX, reason="would cut this host's own loopback")
def test_a_loopback_that_is_down_is_a_blocker(host: HostConfig) -> None:
    run("ip", "link", "set", "lo", "down")
    try:
        assert bad(doctor(host))["loopback"].level == "blocker"
    finally:
        run("ip", "link", "set", "lo", "up")
