"""The doctor's judgement: what is a blocker, and what stands in for each thing that is absent."""

from dataclasses import replace
from typing import Any

import pytest

from migrate.journal import MoveJournal, Record, Side
from migrate.preflight.doctor import MAX_LEFTOVERS, judge_journals, judge_leftovers, judge_store
from migrate.preflight.findings import Finding
from migrate.preflight.support import judge_host
from runtime.facts_host import CgroupSupport, HostCriu
from runtime.facts_leftovers import Leftover
from tests.unit.migrate.preflight_values import CRIU, HOST, HOST_FACTS, KERNEL, ROOM


def judged(**changes: Any) -> list[Finding]:
    return judge_host(HOST, replace(HOST_FACTS, **changes))


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.check) for finding in findings if finding.level != "ok"]


def text_of(findings: list[Finding], check: str) -> str:
    return next(finding.what for finding in findings if finding.check == check)


def test_a_host_that_lacks_nothing_is_told_so() -> None:
    findings = judged()
    assert bad(findings) == []
    assert len(findings) >= 12


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("criu", {"criu": HostCriu(features=None, error="CRIU is not installed")}),
        ("criu", {"criu": HostCriu(features=replace(CRIU, check_error="no vdso"))}),
        ("criu-nftables", {"criu": HostCriu(features=replace(CRIU, missing=("network_lock_nftables",)))}),
        ("namespaces", {"kernel": replace(KERNEL, namespaces=("user", "net"))}),
        ("overlayfs", {"kernel": replace(KERNEL, overlay_error="EINVAL")}),
        ("network", {"kernel": replace(KERNEL, network_error="nft: No such file")}),
        ("freezer", {"kernel": replace(KERNEL, cgroup=CgroupSupport(freezer="", has_kill=False, missing=()))}),
        ("loopback", {"loopback_up": False}),
        ("programs", {"missing_programs": ("nft", "tar")}),
    ],
)
def test_what_nothing_stands_in_for_is_a_blocker_with_a_remedy(check: str, changes: dict[str, Any]) -> None:
    findings = judged(**changes)
    assert bad(findings) == [("blocker", check)]
    assert next(finding.remedy for finding in findings if finding.check == check)


@pytest.mark.parametrize(
    ("check", "changes", "instead"),
    [
        ("time-namespace", {"kernel": replace(KERNEL, has_time_namespace=False)}, "clocks jump"),
        ("32-bit", {"criu": HostCriu(features=replace(CRIU, missing=("compat_cr",)))}, "64-bit ones move"),
        (
            "freezer",
            {"kernel": replace(KERNEL, cgroup=CgroupSupport(freezer="v1", has_kill=True, missing=()))},
            "v1 freezer is used instead",
        ),
        (
            "controllers",
            {"kernel": replace(KERNEL, cgroup=CgroupSupport(freezer="v2", has_kill=True, missing=("memory",)))},
            "such limits are refused",
        ),
        ("dirty-pages", {"kernel": replace(KERNEL, pagemap_scan=False)}, "compared by their hashes instead"),
        ("lazy-pages", {"criu": HostCriu(features=replace(CRIU, lazy_pages=False))}, "filled before"),
        ("init", {"init_program": ""}, "--no-init"),
        ("disk", {"room": replace(ROOM, state_bytes=1 << 20)}, "1.0 MiB"),
        ("memory", {"room": replace(ROOM, memory_bytes=1 << 20)}, "1.0 MiB"),
        ("criu-cache", {"criu_cache_is_tmpfs": False}, "50 ms"),
        ("name", {"name_resolves": False}, "target"),
        ("clock", {"clock_synchronised": False}, "jump"),
    ],
)
def test_what_can_be_done_without_is_a_warning_that_says_how(check: str, changes: dict[str, Any], instead: str) -> None:
    findings = judged(**changes)
    assert bad(findings) == [("warning", check)]
    assert instead in text_of(findings, check)


@pytest.mark.parametrize(
    ("check", "changes", "instead"),
    [
        ("sys-resource", {"has_sys_resource": False}, "its own user namespace"),
        ("ip-forward", {"ip_forward": False}, "first container switches it on"),
        ("agent", {"agent_listens": False}, "over ssh"),
        (
            "dirty-pages",
            {
                "kernel": replace(KERNEL, async_write_protect=False),
                "criu": HostCriu(features=replace(CRIU, mem_track=True)),
            },
            "soft-dirty bits can find dirty pages instead",
        ),
        (
            "cgroup-kill",
            {"kernel": replace(KERNEL, cgroup=CgroupSupport(freezer="v2", has_kill=False, missing=()))},
            "one by one instead",
        ),
    ],
)
def test_what_has_a_full_replacement_is_fine_and_the_replacement_is_named(
    check: str, changes: dict[str, Any], instead: str
) -> None:
    findings = judged(**changes)
    assert bad(findings) == []
    assert instead in text_of(findings, check)


def test_leftovers_come_with_their_remedies_and_not_without_end() -> None:
    one = Leftover(what="network link cm0123456789ab", remedy="ip link delete cm0123456789ab")
    (finding,) = judge_leftovers([one])
    assert (finding.level, finding.remedy) == ("warning", one.remedy)
    assert len(list(judge_leftovers([one] * 100))) == MAX_LEFTOVERS + 1
    assert bad(list(judge_leftovers([]))) == []


def test_damaged_containers_are_named() -> None:
    assert [finding.what for finding in judge_store(["spec.json is damaged"])] == ["spec.json is damaged"]


def moved(side: Side, *phases: str, damage: str = "") -> MoveJournal:
    records = tuple(
        Record(move_id="m1", epoch=1, side=side, phase=phase, at="2026-01-01T00:00:00Z") for phase in phases
    )
    return MoveJournal(move_id="m1", side=side, records=records, damage=damage)


@pytest.mark.parametrize(
    ("journal", "expected"),
    [
        (moved("source", "PREPARED", "COMMITTED"), [("blocker", "in-doubt")]),
        (moved("source", "PREPARED", "COMMITTED", "DONE"), []),
        (moved("source", "PREPARED", "ROLLED_BACK"), []),
        (moved("source", "COMMITTED", "RECLAIMED"), []),
        (moved("source", "PREPARED"), [("warning", "journal")]),
        (moved("target", "RESERVED"), [("warning", "journal")]),
        (moved("target", "RESTORED_HELD", "COMMIT_LOGGED"), [("warning", "journal")]),
        (moved("target", "COMMIT_LOGGED", "RESUMED"), []),
        (moved("target", "COMMIT_LOGGED", "RESUMED", "CONFIRMED"), []),
        (moved("target", "RESERVED", "REFUSED"), []),
        (moved("source"), []),
        (moved("source", "DONE", damage="line 3 is damaged"), [("warning", "journal")]),
    ],
)
def test_moves_are_judged_by_their_last_record(journal: MoveJournal, expected: list[tuple[str, str]]) -> None:
    assert bad(list(judge_journals([journal]))) == expected
