"""The container store on a disk without room."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.api import ContainerSpec, ContainerState, Status
from runtime.errors import NoRoom
from runtime.host import HostConfig
from runtime.store import ContainerStore


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True, timeout=10)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=10)


def spec_of(name: str) -> ContainerSpec:
    return ContainerSpec(id=ContainerStore.new_id(), name=name, rootfs="host", argv=("true",), created_at="")


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return filler


def test_a_full_disk_is_told_with_a_hint_and_keeps_the_old_state(small_disk: Path) -> None:
    store = ContainerStore(HostConfig(name="h", state_dir=small_disk))
    made = store.create(spec_of("web1"))
    filler = fill(small_disk)
    with pytest.raises(NoRoom) as caught:
        store.write_state(made.id, ContainerState(status=Status.RUNNING))
    assert "free space" in caught.value.hint
    assert store.get("web1") == made
    with pytest.raises(NoRoom):
        store.create(spec_of("web2"))
    filler.unlink()
    assert store.containers() == [made]
    assert [path.name for path in store.directory(made.id).iterdir() if path.name.startswith(".")] == []
    store.create(spec_of("web2"))


def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_no_half_file(small_disk: Path) -> None:
    store = ContainerStore(HostConfig(name="h", state_dir=small_disk))
    made = store.create(spec_of("web1"))
    with pytest.raises(NoRoom):
        store.write_state(made.id, ContainerState(status=Status.RUNNING, moved_to="x" * 100_000))
    assert store.get("web1") == made
