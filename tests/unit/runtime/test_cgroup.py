"""Where control groups are, read from captured files, and what is written where, on a tree of plain files."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.api import Limits
from runtime.cgroup import ContainerCgroup
from runtime.cgroup_layout import CgroupLayout, parse_layout
from runtime.errors import BadInput, KernelCallFailed, MissingFeature, WrongState

DATA = Path(__file__).parents[2] / "data"
ID = "aa0000000001"


def layout_of(name: str) -> CgroupLayout:
    return parse_layout((DATA / f"mountinfo-{name}.txt").read_text())


# Layouts


def test_a_host_with_v2_alone_has_one_tree() -> None:
    assert layout_of("v2") == CgroupLayout(v2=Path("/sys/fs/cgroup"), v1=())


def test_a_host_with_v1_alone_has_a_tree_for_each_controller_and_blanks_in_paths_are_read() -> None:
    layout = layout_of("v1")
    assert layout.v2 is None
    assert dict(layout.v1) == {
        "cpu": Path("/tmp/my cgroups/cpu"),
        "freezer": Path("/sys/fs/cgroup/freezer"),
        "memory": Path("/sys/fs/cgroup/memory"),
        "pids": Path("/sys/fs/cgroup/pids"),
    }


def test_a_hybrid_host_has_both() -> None:
    layout = layout_of("hybrid")
    assert layout.v2 == Path("/sys/fs/cgroup/unified")
    assert {name for name, _path in layout.v1} == {"cpu", "cpuacct", "freezer", "memory", "pids"}


def test_controllers_that_share_a_mount_are_each_found_there() -> None:
    line = "33 25 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
    both = Path("/sys/fs/cgroup/cpu,cpuacct")
    assert parse_layout(line) == CgroupLayout(v2=None, v1=(("cpu", both), ("cpuacct", both)))


@pytest.mark.parametrize("text", ["", "\n", "garbage", "1 2 3 - cgroup2", "1 2 0:3 / /x - ext4 a rw"])
def test_lines_that_say_nothing_are_passed_over(text: str) -> None:
    assert parse_layout(text) == CgroupLayout(v2=None, v1=())


def test_on_a_hybrid_host_a_process_joins_the_v2_tree_and_the_controllers_that_limit_it() -> None:
    cgroup = ContainerCgroup(layout_of("hybrid"), "cmigrate", ID)
    assert [str(path) for path in cgroup.paths()] == [
        f"/sys/fs/cgroup/{tree}/cmigrate/{ID}" for tree in ("unified", "cpu", "memory", "pids")
    ]
    assert cgroup.criu_freezer_path() == f"/sys/fs/cgroup/unified/cmigrate/{ID}"


def test_on_a_host_with_v1_alone_it_joins_the_freezer_too() -> None:
    cgroup = ContainerCgroup(layout_of("v1"), "a/b", ID)
    assert cgroup.criu_freezer_path() == f"/sys/fs/cgroup/freezer/a/b/{ID}"
    assert Path(cgroup.criu_freezer_path()) in cgroup.paths()


# Limits, on plain files that take what is written


@pytest.fixture
def v2(tmp_path: Path) -> CgroupLayout:
    """A v2 tree with all controllers, as systemd hosts have."""
    directory = tmp_path / "cmigrate" / ID
    directory.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "cmigrate"):
        (place / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
        (place / "cgroup.subtree_control").write_text("")
    for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max"):
        (directory / name).write_text("max\n")
    return CgroupLayout(v2=tmp_path, v1=(("freezer", tmp_path / "freezer"), ("memory", tmp_path / "unused")))


def test_on_v2_limits_go_to_its_files_and_controllers_are_enabled_above(v2: CgroupLayout) -> None:
    cgroup = ContainerCgroup(v2, "cmigrate", ID)
    assert v2.v2 is not None
    directory = v2.v2 / "cmigrate" / ID
    assert cgroup.paths() == (directory,), "a controller that v2 has is not taken from v1"
    cgroup.create(Limits(memory_bytes=1 << 20, cpus=1.5, pids=7))
    found = {name: (directory / name).read_text() for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max")}
    assert found == {
        "memory.max": "1048576",
        "memory.swap.max": "0",
        "cpu.max": "150000 100000",
        "pids.max": "7",
    }
    assert [(place / "cgroup.subtree_control").read_text() for place in (v2.v2, v2.v2 / "cmigrate")] == ["+pids"] * 2
    cgroup.set_limits(Limits())
    assert (directory / "memory.max").read_text() == "max"
    assert (directory / "cpu.max").read_text() == "max 100000"
    assert (directory / "pids.max").read_text() == "max"


@pytest.mark.parametrize(
    ("limits", "option"),
    [(Limits(memory_bytes=1 << 20), "--memory"), (Limits(cpus=1.0), "--cpus"), (Limits(pids=3), "--pids-limit")],
)
def test_a_limit_that_no_hierarchy_can_keep_is_named(tmp_path: Path, limits: Limits, option: str) -> None:
    cgroup = ContainerCgroup(CgroupLayout(v2=tmp_path, v1=()), "cmigrate", ID)
    with pytest.raises(MissingFeature, match=option):
        cgroup.create(limits)


def test_no_limits_need_no_controllers(tmp_path: Path) -> None:
    ContainerCgroup(CgroupLayout(v2=tmp_path, v1=()), "cmigrate", ID).create(Limits())


@pytest.mark.parametrize("cpus", [0.0, -1.0, float("nan")])
def test_no_processor_at_all_is_refused(v2: CgroupLayout, cpus: float) -> None:
    with pytest.raises(BadInput):
        ContainerCgroup(v2, "cmigrate", ID).set_cpu_quota(cpus)


def test_the_smallest_quota_is_the_kernels(v2: CgroupLayout) -> None:
    ContainerCgroup(v2, "cmigrate", ID).set_cpu_quota(0.001)
    assert v2.v2 is not None
    assert (v2.v2 / "cmigrate" / ID / "cpu.max").read_text() == "1000 100000"


def test_a_cgroup_that_is_gone_can_be_asked_and_thawed_but_not_frozen(tmp_path: Path) -> None:
    cgroup = ContainerCgroup(CgroupLayout(v2=tmp_path, v1=()), "cmigrate", ID)
    cgroup.thaw()
    cgroup.kill()
    cgroup.remove()
    assert not cgroup.frozen()
    assert cgroup.pids() == []
    assert cgroup.wait_empty(0)
    assert cgroup.stats().pids == 0
    with pytest.raises(WrongState, match=ID):
        cgroup.freeze()


def test_a_directory_that_can_not_be_made_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "cmigrate").write_text("")
    with pytest.raises(KernelCallFailed, match="mkdir"):
        ContainerCgroup(CgroupLayout(v2=tmp_path, v1=()), "cmigrate", ID).create(Limits())
