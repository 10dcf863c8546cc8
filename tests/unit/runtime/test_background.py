"""Who copies in the background: which files are written, by the hierarchies of the host."""

from pathlib import Path

import pytest

from runtime.background import GROUP, V1_SHARES, V2_WEIGHT, Background
from runtime.cgroup_layout import CgroupLayout

HYBRID = "3:cpu,cpuacct:/user/shell\n0::/elsewhere\n"
UNIFIED = "0::/user/shell\n"


def files(top: Path, weight: str) -> tuple[Path, Path, Path]:
    """As the kernel makes them: the group's weight, its members, those of the group this process comes from."""
    for directory in (top / GROUP, top / "user/shell"):
        directory.mkdir(parents=True)
        (directory / "cgroup.procs").touch()
    (top / GROUP / weight).touch()
    return top / GROUP / weight, top / GROUP / "cgroup.procs", top / "user/shell/cgroup.procs"


@pytest.mark.parametrize(
    ("text", "name", "value"), [(HYBRID, "cpu.shares", V1_SHARES), (UNIFIED, "cpu.weight", V2_WEIGHT)]
)
def test_it_goes_into_the_group_and_back_where_it_came_from(tmp_path: Path, text: str, name: str, value: int) -> None:
    v1 = (("cpu", tmp_path),) if text == HYBRID else ()
    weight, members, home = files(tmp_path, name)
    controllers = tmp_path / "cgroup.subtree_control"
    if not v1:
        controllers.touch()
    background = Background(CgroupLayout(v2=tmp_path, v1=v1), text)
    background.leave()
    assert home.read_text() == ""
    background.enter()
    assert (weight.read_text(), members.read_text(), home.read_text()) == (str(value), "0", "")
    assert v1 or controllers.read_text() == "+cpu"
    assert not v1 or not controllers.exists()
    weight.write_text("")
    background.enter()
    assert weight.read_text() == ""
    background.leave()
    assert home.read_text() == "0"


def test_without_weights_it_stays_where_it_is(tmp_path: Path) -> None:
    background = Background(CgroupLayout(v2=tmp_path, v1=()), UNIFIED)
    background.enter()
    background.leave()
    assert list(tmp_path.iterdir()) == []


def test_who_could_not_name_the_way_back_does_not_go(tmp_path: Path) -> None:
    weight, members, _home = files(tmp_path, "cpu.weight")
    Background(CgroupLayout(v2=tmp_path, v1=()), "0::/../other\n").enter()
    assert (weight.read_text(), members.read_text()) == ("", "")


def test_without_a_cgroup_hierarchy_it_does_nothing() -> None:
    Background(CgroupLayout(v2=None, v1=()), UNIFIED).enter()
