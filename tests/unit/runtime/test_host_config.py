"""A host's directories."""

import os
from pathlib import Path

import pytest

from runtime.errors import ReadOnly
from runtime.host import HostConfig, must_be_writable


def test_directories_that_are_not_there_yet_are_judged_by_what_is_above_them(tmp_path: Path) -> None:
    must_be_writable(HostConfig(name="h", state_dir=tmp_path / "a" / "b", run_dir=tmp_path / "c"))


def test_a_directory_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    # A file system that nobody can write, root neither.
    proc = Path("/proc/sys/kernel")
    assert not os.access(proc, os.W_OK)
    with pytest.raises(ReadOnly, match=str(proc)):
        must_be_writable(HostConfig(name="h", state_dir=proc, run_dir=tmp_path))
