"""The sink against changes that lie, come in the wrong order, or meet a full disk's errors."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import CorruptData
from runtime.tree import Change, Kind, Op, digest
from runtime.treesink import TreeSink

FILE = Change(op=Op.PUT, path="file", mode=0o640, uid=os.getuid(), gid=os.getgid(), size=10, mtime_ns=5_000_000_007)


def put(path: str, kind: Kind = Kind.FILE, **fields: object) -> Change:
    return Change(op=Op.PUT, path=path, kind=kind, uid=os.getuid(), gid=os.getgid(), mode=0o755, **fields)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("untouched")
    return tmp_path / "root"


@pytest.fixture
def sink(root: Path) -> Iterator[TreeSink]:
    with TreeSink(root) as sink:
        yield sink


@pytest.fixture(autouse=True)
def nothing_outside_is_touched(root: Path) -> Iterator[None]:
    outside = root.parent / "outside"
    before = digest(outside)
    yield
    assert digest(outside) == before
    assert (outside / "file").read_text() == "untouched"
    assert {path.name for path in root.parent.iterdir()} == {"root", "outside"}


def test_a_file_is_complete_after_finish(root: Path, sink: TreeSink) -> None:
    sink.apply(FILE)
    sink.write(FILE, 8, b"89")
    sink.write(FILE, 0, memoryview(b"01"))
    sink.finish()
    status = (root / "file").stat()
    assert (root / "file").read_bytes() == b"01\0\0\0\0\0\x0089"
    assert (status.st_mode & 0o7777, status.st_mtime_ns) == (0o640, 5_000_000_007)


def test_times_of_a_directory_outlast_what_is_made_in_it(root: Path, sink: TreeSink) -> None:
    sink.apply(put("d", Kind.DIRECTORY, mtime_ns=1_000))
    sink.apply(put("d/e", Kind.DIRECTORY, mtime_ns=2_000))
    sink.apply(put("d/e/f"))
    sink.apply(put("d/g"))
    sink.finish()
    assert ((root / "d").stat().st_mtime_ns, (root / "d/e").stat().st_mtime_ns) == (1_000, 2_000)
    sink.apply(Change(op=Op.REMOVE, path="d/g"))
    sink.finish()
    assert (root / "d").stat().st_mtime_ns == 1_000


@pytest.mark.parametrize("target", ["../outside", "/"])
def test_a_symlink_is_made_and_never_followed(root: Path, sink: TreeSink, target: str) -> None:
    sink.apply(put("out", Kind.SYMLINK, target=target))
    for lie in (
        put("out/file"),
        put("out/new", Kind.DIRECTORY),
        put("out/new", Kind.SYMLINK, target="x"),
        put("out/new", Kind.FIFO),
        put("out", Kind.DIRECTORY),
        Change(op=Op.REMOVE, path="out/file"),
        Change(op=Op.META, path="out/file", mode=0o777),
        Change(op=Op.META, path="out", mode=0o777),
        Change(op=Op.META, path="out", kind=Kind.DIRECTORY, mode=0o777),
        Change(op=Op.PATCH, path="out/file", size=0),
        Change(op=Op.PATCH, path="out", size=0),
        Change(op=Op.LINK, path="out/new", target="out"),
        Change(op=Op.LINK, path="new", target="out/file"),
    ):
        with pytest.raises(CorruptData, match="out|new"):
            sink.apply(lie)
    assert os.readlink(root / "out") == target
    assert os.listdir(root) == ["out"]


def test_a_hard_link_to_a_symlink_is_one_to_the_symlink(root: Path, sink: TreeSink) -> None:
    sink.apply(put("out", Kind.SYMLINK, target="../outside/file"))
    sink.apply(Change(op=Op.LINK, path="second", target="out"))
    sink.apply(put("out"))
    sink.finish()
    assert os.readlink(root / "second") == "../outside/file"
    assert (root / "out").stat().st_size == 0


def test_a_file_in_place_of_a_symlink_replaces_it(root: Path, sink: TreeSink) -> None:
    sink.apply(put("file", Kind.SYMLINK, target="../outside/file"))
    sink.apply(FILE)
    sink.write(FILE, 0, b"0123456789")
    sink.finish()
    assert not (root / "file").is_symlink()


@pytest.mark.parametrize(
    "lie",
    [
        put("missing/file"),
        put("file/below", Kind.DIRECTORY),
        put("file", Kind.DIRECTORY),
        put("full"),
        put("full", Kind.SYMLINK, target="x"),
        Change(op=Op.REMOVE, path="full"),
        Change(op=Op.LINK, path="new", target="missing"),
        Change(op=Op.LINK, path="new", target="full"),
        Change(op=Op.LINK, path="full", target="file"),
        Change(op=Op.META, path="missing", mode=0o700),
        Change(op=Op.META, path="file", kind=Kind.DIRECTORY, mode=0o700),
        Change(op=Op.PATCH, path="missing", size=5),
        Change(op=Op.PATCH, path="full", size=5),
        Change(op=Op.PATCH, path="pipe", size=5),
        put("huge", size=1 << 62),
    ],
    ids=lambda change: f"{change.op} {change.kind} {change.path}",
)
def test_a_change_that_does_not_fit_what_is_there_is_corrupt_data_that_names_it(sink: TreeSink, lie: Change) -> None:
    sink.apply(FILE)
    sink.apply(put("full", Kind.DIRECTORY))
    sink.apply(put("full/inside"))
    sink.apply(put("pipe", Kind.FIFO))
    with pytest.raises(CorruptData, match=lie.path.split("/")[0]):
        sink.apply(lie)


def test_content_goes_only_to_the_last_change_and_within_its_size(sink: TreeSink) -> None:
    with pytest.raises(CorruptData, match="does not belong"):
        sink.write(FILE, 0, b"x")
    sink.apply(FILE)
    for offset, data in ((-1, b"x"), (10, b"x"), (5, b"123456"), (1 << 70, b"x")):
        with pytest.raises(CorruptData, match="beyond the size"):
            sink.write(FILE, offset, data)
    sink.apply(put("other"))
    with pytest.raises(CorruptData, match="does not belong"):
        sink.write(FILE, 0, b"x")


def test_a_name_that_is_gone_already_can_be_removed(sink: TreeSink) -> None:
    sink.apply(Change(op=Op.REMOVE, path="missing"))


def test_a_link_to_itself_is_refused_or_harmless(root: Path, sink: TreeSink) -> None:
    sink.apply(FILE)
    with pytest.raises(CorruptData):
        sink.apply(Change(op=Op.LINK, path="file", target="file"))


def test_zeros_in_a_patch_become_a_hole(root: Path, sink: TreeSink) -> None:
    whole = put("file", size=1 << 20)
    sink.apply(whole)
    sink.write(whole, 0, b"x" * (1 << 20))
    patch = Change(op=Op.PATCH, path="file", size=1 << 20, uid=os.getuid(), gid=os.getgid(), mode=0o600)
    sink.apply(patch)
    sink.write(patch, 0, bytes(1 << 19))
    sink.finish()
    assert (root / "file").stat().st_blocks * 512 <= 1 << 19
    assert (root / "file").read_bytes() == bytes(1 << 19) + b"x" * (1 << 19)


def test_a_tree_that_is_not_the_one_sent_does_not_pass_verification(root: Path, sink: TreeSink) -> None:
    sink.apply(FILE)
    sink.finish()
    expected = digest(root)
    sink.verify(expected)
    (root / "file").write_bytes(b"0" * 10)
    os.utime(root / "file", ns=(FILE.mtime_ns, FILE.mtime_ns))
    with pytest.raises(CorruptData, match="not those that were sent"):
        sink.verify(expected)


def test_a_closed_sink_holds_no_descriptor(root: Path) -> None:
    sink = TreeSink(root)
    sink.apply(FILE)
    sink.close()
    sink.close()
