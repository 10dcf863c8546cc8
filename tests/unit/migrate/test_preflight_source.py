"""Every reason for which a source refuses, and what is said about what will be different."""

from dataclasses import replace
from typing import Any, get_args

import pytest

from migrate.preflight.findings import Finding
from migrate.preflight.source import judge_obstacles, judge_source
from runtime.api import Status
from runtime.facts_obstacles import Kind, Obstacle
from tests.unit.migrate.preflight_values import CONTAINER, CRIU, MIB, ROOM, SOURCE_VIEW, SPEC


def judged(mode: str = "diskless", *, spec: Any = SPEC, view: Any = SOURCE_VIEW, **changes: Any) -> list[Finding]:
    return judge_source(spec, replace(CONTAINER, **changes), view, mode)


def levels(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.check) for finding in findings]


def test_a_container_that_can_go_gets_one_good_word() -> None:
    (finding,) = judged()
    assert (finding.level, finding.check) == ("ok", "contents")
    assert "2 processes, 64.0 MiB" in finding.what


@pytest.mark.parametrize("status", [Status.CREATED, Status.EXITED, Status.MOVED])
def test_a_container_that_does_not_run_stays(status: Status) -> None:
    (finding,) = judged(status=status)
    assert (finding.level, finding.check, finding.remedy) == ("blocker", "state", "cmigrate start web1")


def test_a_paused_container_stays_and_its_other_blockers_are_told_too() -> None:
    ring = Obstacle(kind="io_uring", who="p (1)", what="io_uring")
    findings = judged(status=Status.PAUSED, obstacles=(ring,))
    assert levels(findings) == [("blocker", "state"), ("blocker", "io_uring")]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_of_obstacle_has_its_sentence_and_its_remedy(kind: Kind) -> None:
    (finding,) = judge_obstacles((Obstacle(kind=kind, who="redis (7)", what="the-thing"),))
    assert finding.level == "blocker"
    assert "redis (7)" in finding.what
    assert finding.remedy
    assert "{" not in finding.what + finding.remedy


def test_obstacles_of_one_kind_are_one_finding_that_names_some() -> None:
    many = tuple(Obstacle(kind="socket", who=f"p ({number})", what="MPTCP") for number in range(9))
    (finding,) = judge_obstacles(many)
    assert "p (4) and 4 more" in finding.what
    assert finding.what.count("MPTCP") == 1


@pytest.mark.parametrize(
    ("check", "view"),
    [
        ("criu", replace(SOURCE_VIEW, criu=None, criu_error="not installed")),
        ("criu", replace(SOURCE_VIEW, criu=replace(CRIU, check_error="no vdso"))),
    ],
)
def test_without_a_working_criu_nothing_leaves(check: str, view: Any) -> None:
    assert levels(judged(view=view)) == [("blocker", check)]


def test_32_bit_programs_need_a_criu_that_knows_them() -> None:
    blind = replace(SOURCE_VIEW, criu=replace(CRIU, missing=("compat_cr",)))
    assert levels(judged(view=blind, compat_tasks=("old (3)",))) == [("blocker", "32-bit")]
    assert levels(judged(view=blind)) == [("ok", "contents")]
    assert levels(judged(compat_tasks=("old (3)",))) == [("ok", "contents")]


def test_other_users_need_the_capability_or_a_user_namespace() -> None:
    weak = replace(SOURCE_VIEW, has_sys_resource=False)
    shared = replace(SPEC, userns="host")
    others: dict[str, Any] = {"other_users": ("postgres (5)",)}
    assert levels(judged(spec=shared, view=weak, **others)) == [("blocker", "users")]
    assert levels(judged(spec=SPEC, view=weak, **others)) == [("ok", "contents")]
    assert levels(judged(spec=shared, **others)) == [("ok", "contents")]
    assert levels(judged(spec=shared, view=weak)) == [("ok", "contents")]


def test_image_files_of_a_stopcopy_need_room_here() -> None:
    full = replace(SOURCE_VIEW, room=replace(ROOM, state_bytes=64 * MIB))
    assert levels(judged("stopcopy", view=full)) == [("blocker", "room")]
    assert levels(judged("diskless", view=full)) == [("ok", "contents")]


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("exec", {"exec_sessions": 2}),
        ("tail", {"followers": ("tail (1)",)}),
        ("upper-layer", {"upper_complete": False}),
    ],
)
def test_what_will_be_different_is_a_warning(check: str, changes: dict[str, Any]) -> None:
    assert levels(judged(**changes)) == [("warning", check), ("ok", "contents")]
