"""Passes over the container's files: everything once, then what changed, and what its times do not tell of."""

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.incoming import Incoming
from migrate.memory_target import NoPages
from migrate.outgoing import Outgoing
from migrate.trees_source import SourceTrees
from runtime.tree_scan import TICK_SLACK_NS
from tests.support.trees import look
from transport.api import Deadline
from transport.testing.memory import memory_pair


def soon() -> Deadline:
    return Deadline.after(30)


class Passes:
    """Two trees here, and what the target makes of each pass over them."""

    def __init__(self, directory: Path, tmpfs: Path) -> None:
        self.here = [directory / "upper", tmpfs / "tree"]
        self.there = [directory / "upper there", directory / "tmpfs there"]
        for path in (*self.here, *self.there, directory / "images"):
            path.mkdir()
        near, self._far = memory_pair(capacity_bytes=64 << 20)
        self.out = Outgoing(near, soon)
        self.roots = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in self.here]
        self._trees = SourceTrees(self.roots, self.out, list)
        self._incoming = Incoming(
            self._far,
            trees=self.there,
            images=directory / "images",
            log=directory / "log",
            pages=NoPages(),
            shared=None,
            expected=None,
            deadline=soon,
            on_frozen=lambda: None,
        )

    def make(self) -> int:
        """How many bytes of files one pass takes."""
        before = self.out.sent_bytes["files"]
        self._trees.send()
        self.out.control({"type": "the-end"})
        assert self._incoming.until_control() == {"type": "the-end"}
        return self.out.sent_bytes["files"] - before

    def finish(self) -> None:
        self._incoming.begin()
        self._incoming.finish()

    def close(self) -> None:
        self._incoming.close()
        for root in self.roots:
            os.close(root)


@pytest.fixture
def passes(tmp_path: Path) -> Iterator[Passes]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as tmpfs:
        passes = Passes(tmp_path, Path(tmpfs))
        yield passes
        passes.close()


def test_the_last_pass_leaves_the_trees_equal(passes: Passes) -> None:
    for number, tree in enumerate(passes.here):
        (tree / "d").mkdir()
        (tree / "d" / "file").write_bytes(b"%d" % number * 100_000)
        (tree / "goes").write_text("soon")
    assert passes.make() > 200_000
    for tree in passes.here:
        (tree / "goes").unlink()
        (tree / "new").write_text("news")
    passes.make()
    passes.finish()
    assert [look(tree) for tree in passes.there] == [look(tree) for tree in passes.here]


def test_a_pass_over_what_did_not_change_sends_no_content(passes: Passes) -> None:
    (passes.here[0] / "file").write_bytes(b"x" * 100_000)
    assert passes.make() > 100_000
    assert passes.make() < 1000


def test_on_a_tmpfs_the_times_are_not_believed(passes: Passes) -> None:
    """A store through a mapping whose page is dirty changes none of them."""
    file = passes.here[1] / "file"
    file.write_bytes(b"x" * 100_000)
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[0:1] = b"y"
        time.sleep(TICK_SLACK_NS * 1.1e-9)
        passes.make()
        before = file.stat()
        mapped[0:1] = b"z"
        passes.make()
        assert file.stat() == before
    passes.finish()
    assert (passes.there[1] / "file").read_bytes() == b"z" + b"x" * 99_999
