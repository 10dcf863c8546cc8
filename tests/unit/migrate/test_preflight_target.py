"""Every reason for which a target refuses, each alone, and all of them together."""

from dataclasses import replace
from typing import Any

import pytest

from migrate.preflight.findings import Finding
from migrate.preflight.suitability import CHECKS, difference, judge_target
from runtime.api import NetworkSpec, PortMapping
from runtime.facts import LowerFile
from runtime.facts_host import CgroupSupport
from tests.unit.migrate.preflight_values import CRIU, FACTS, KERNEL, LIBC, MIB, NETWORK, ROOM, SPEC, VIEW, holder


def judged(mode: str = "diskless", *, facts: Any = None, **changes: Any) -> list[Finding]:
    return judge_target(facts or FACTS, replace(VIEW, **changes), mode)


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.check) for finding in findings if finding.level != "ok"]


def blockers(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings if finding.level == "blocker"]


def test_a_host_that_lacks_nothing_has_one_good_word_for_each_check_and_the_warning_about_volumes() -> None:
    findings = judged()
    assert bad(findings) == [("warning", "volumes")]
    assert len(findings) == len(CHECKS)
    without = replace(FACTS, spec=replace(SPEC, volumes=()))
    assert bad(judged(facts=without)) == []


@pytest.mark.parametrize("mode", ["diskless", "stopcopy"])
@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("arch", {"arch": "aarch64"}),
        ("arch", {"page_bytes": 65536}),
        ("criu", {"criu": None, "criu_error": "not installed"}),
        ("criu", {"criu": replace(CRIU, check_error="no vdso")}),
        ("criu-version", {"criu": replace(CRIU, version=(4, 1, 1))}),
        ("cpu", {"cpu_error": "CPU instruction capabilities do not match run time"}),
        ("cpu", {"criu": replace(CRIU, cpuinfo=b""), "cpu_flags": ("fpu",)}),
        ("namespaces", {"kernel": replace(KERNEL, namespaces=("user",))}),
        ("overlayfs", {"kernel": replace(KERNEL, overlay_error="ENODEV")}),
        ("network", {"kernel": replace(KERNEL, network_error="no nft")}),
        ("freezer", {"kernel": replace(KERNEL, cgroup=CgroupSupport(freezer="", has_kill=False, missing=()))}),
        ("memory", {"room": replace(ROOM, memory_bytes=64 * MIB)}),
        ("disk", {"room": replace(ROOM, state_bytes=MIB)}),
        ("id", {"holders": (holder(id=SPEC.id, name=SPEC.name),)}),
        ("name", {"holders": (holder(name="web1"),)}),
        ("name", {"holders": (holder(name="web1", arriving=True),)}),
        ("address", {"holders": (holder(network=NetworkSpec(address="10.88.0.5/16", mac="", gateway="")),)}),
        ("address", {"address_at": "02:42:00:00:00:01"}),
        ("subnet", {"host": replace(VIEW.host, subnet="10.99.0.0/16", gateway="10.99.0.1")}),
        ("port", {"holders": (holder(ports=(PortMapping(host_port=8080, container_port=1),)),)}),
        ("port", {"bound_ports": {"tcp": frozenset({8080})}}),
        ("rootfs", {"rootfs_exists": False}),
        ("files", {"files": {LIBC.path: None}}),
        ("volumes", {"missing_volumes": ("/srv/data",)}),
    ],
)
def test_each_lack_is_one_blocker_with_a_remedy(check: str, changes: dict[str, Any], mode: str) -> None:
    findings = judged(mode, **changes)
    assert blockers(findings) == [check]
    (finding,) = (finding for finding in findings if finding.level == "blocker")
    assert finding.what
    assert finding.remedy


@pytest.mark.parametrize(
    ("check", "facts", "changes"),
    [
        ("32-bit", {"needs": ("compat_cr",)}, {"criu": replace(CRIU, missing=("compat_cr",))}),
        ("ipv6", {"needs": ("ipv6",)}, {"has_ipv6": False}),
        ("huge-pages", {"hugetlb_bytes": 2 * MIB}, {}),
        ("cpu", {"cpuinfo": b"", "cpu_flags": ("avx512f", "fpu")}, {}),
    ],
)
def test_what_only_some_containers_need_is_asked_for_those(
    check: str, facts: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert blockers(judged(facts=replace(FACTS, **facts), **changes)) == [check]
    if changes:
        assert blockers(judged(**changes)) == []


def test_all_blockers_come_at_once() -> None:
    findings = judged(
        arch="aarch64",
        criu=None,
        criu_error="not installed",
        kernel=replace(KERNEL, overlay_error="ENODEV"),
        room=replace(ROOM, memory_bytes=0, state_bytes=0),
        holders=(holder(name="web1", network=NETWORK, ports=SPEC.ports),),
        missing_volumes=("/srv/data",),
        files={},
    )
    expected = ["arch", "criu", "overlayfs", "memory", "disk", "name", "address", "port", "files", "volumes"]
    assert blockers(findings) == expected


def test_pages_need_room_on_the_disk_only_with_stopcopy() -> None:
    tight = {"room": replace(ROOM, state_bytes=48 * MIB)}
    assert blockers(judged("diskless", **tight)) == []
    assert blockers(judged("stopcopy", **tight)) == ["disk"]


def test_a_newer_criu_reads_the_images_of_an_older_one() -> None:
    assert blockers(judged(criu=replace(CRIU, version=(5, 0, 0)))) == []
    assert blockers(judged(criu=replace(CRIU, version=(4, 2, 0)))) == []


def test_the_flags_that_are_missing_are_named_beside_crius_judgement() -> None:
    facts = replace(FACTS, cpu_flags=("avx512f", "fpu"))
    (finding,) = (f for f in judged(facts=facts, cpu_error="do not match") if f.check == "cpu")
    assert "do not match" in finding.what
    assert "avx512f" in finding.what
    # Without CRIU's objection a flag that only the kernel counts is no reason.
    assert blockers(judged(facts=facts)) == []


def test_the_container_itself_may_answer_for_its_address() -> None:
    assert blockers(judged(address_at=NETWORK.mac)) == []
    assert blockers(judged(address_at="")) == []


def test_ports_clash_by_protocol_number_and_address() -> None:
    def clash(**changes: Any) -> list[str]:
        port = PortMapping(**({"host_port": 8080, "container_port": 80} | changes))
        return blockers(judged(holders=(holder(ports=(port,)),)))

    assert clash() == ["port"]
    assert clash(host_address="192.0.2.1") == ["port"]
    assert clash(protocol="udp") == []
    assert clash(host_port=8081) == []


def test_a_container_without_network_needs_no_address() -> None:
    facts = replace(FACTS, spec=replace(SPEC, network=None))
    assert blockers(judged(facts=facts, host=replace(VIEW.host, subnet="10.99.0.0/16"))) == []


def test_another_gateway_is_a_warning() -> None:
    findings = judged(host=replace(VIEW.host, gateway="10.88.0.2"))
    assert ("warning", "gateway") in bad(findings)


def test_an_address_that_is_none_is_a_blocker() -> None:
    network = replace(NETWORK, address="nonsense")
    assert blockers(judged(facts=replace(FACTS, spec=replace(SPEC, network=network)))) == ["address"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"build_id": "cd" * 20}, "another build"),
        ({"size_bytes": 1001}, "1001 bytes instead of 1000"),
        ({"mode": 0o100644}, "mode 100644 instead of 100755"),
    ],
)
def test_a_file_differs_by_what_criu_compares(changes: dict[str, Any], word: str) -> None:
    assert word in difference(LIBC, replace(LIBC, **changes))


def test_files_that_agree_do_not_differ() -> None:
    assert difference(LIBC, LIBC) == ""
    plain = LowerFile(path="/etc/x", size_bytes=1, mode=0o100644)
    assert difference(plain, replace(plain, build_id="ab")) == ""
    assert "missing" in difference(LIBC, None)


def test_many_differing_files_are_counted_and_some_named() -> None:
    files = tuple(replace(LIBC, path=f"/lib/{number}.so") for number in range(40))
    (finding,) = (f for f in judged(facts=replace(FACTS, files=files), files={}) if f.check == "files")
    assert "40 of 40" in finding.what
    assert "/lib/4.so is missing and 35 more" in finding.what


@pytest.mark.parametrize(
    ("check", "changes"),
    [("files", {"files_complete": False}), ("upper-layer", {"upper_complete": False}), ("clock", {"clock_s": 1060})],
)
def test_what_is_not_known_beforehand_is_a_warning(check: str, changes: dict[str, Any]) -> None:
    findings = judged(facts=replace(FACTS, **changes))
    assert ("warning", check) in bad(findings)
    assert blockers(findings) == []


def test_clocks_may_differ_by_what_a_message_takes() -> None:
    assert ("warning", "clock") not in bad(judged(clock_s=1004))
    (finding,) = (f for f in judged(clock_s=940) if f.check == "clock")
    assert "60 s behind" in finding.what
