"""Scanning, comparing and reading trees: what counts as changed, what is sent, what is left out."""

import dataclasses
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.errors import BadInput
from runtime.tree import Change, Kind, Op, SentContent, Snapshot, compare, digest, hash_files, read_chunks, scan
from runtime.tree_scan import TICK_SLACK_NS
from runtime.treesink import TreeSink
from tests.support.trees import BLOCK, carry, data_bytes, look

MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def source_on_disk() -> Iterator[Path]:
    """/tmp may be a tmpfs, where times tell less."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


@pytest.fixture
def sink(target: Path) -> Iterator[TreeSink]:
    with TreeSink(target) as sink:
        yield sink


def let_times_tell() -> None:
    """What changed just now counts as changed; a little later the times tell."""
    time.sleep(TICK_SLACK_NS * 1.1e-9)


def summary(changes: list[Change]) -> list[str]:
    return [f"{change.op} {change.path or '.'}" for change in changes]


# Comparing


def test_an_unchanged_tree_has_no_changes(source: Path) -> None:
    (source / "d").mkdir()
    (source / "d/f").write_text("x")
    os.link(source / "d/f", source / "g")
    let_times_tell()
    first = scan(source)
    assert compare(first, scan(source)) == []
    assert compare(first, scan(source, previous=first)) == []


def test_what_did_not_change_is_taken_from_the_snapshot_before(source: Path) -> None:
    (source / "old").write_text("x")
    (source / "new").write_text("x")
    let_times_tell()
    first = scan(source)
    (source / "new").write_text("y")
    second = scan(source, previous=first)
    assert second.entries["old"] is first.entries["old"]
    assert second.entries["new"] is not first.entries["new"]


def test_a_file_that_changed_within_the_clocks_tick_of_the_scan_is_sent_again(source: Path) -> None:
    (source / "f").write_text("x")
    first = scan(source)
    assert not first.entries["f"].settled
    assert summary(compare(first, scan(source))) == ["put f"]


def test_parents_come_first_and_contents_leave_before_their_directory(source: Path) -> None:
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/c").write_text("x")
    first = scan(source)
    order = summary(compare(None, first))
    assert order.index("put a") < order.index("put a/b") < order.index("put a/b/c")
    (source / "a/b/c").unlink()
    (source / "a/b").rmdir()
    (source / "a").rmdir()
    (source / "a").write_text("now a file")
    assert summary(compare(first, scan(source)))[:4] == ["remove a/b/c", "remove a/b", "remove a", "meta ."]


def test_a_file_with_two_names_is_sent_once(source: Path) -> None:
    (source / "a").write_text("x")
    (source / "d").mkdir()
    os.link(source / "a", source / "d/b")
    changes = compare(None, scan(source))
    assert [change.op for change in changes if change.kind is Kind.FILE] == [Op.PUT, Op.LINK]


def test_a_second_name_outside_of_the_tree_means_nothing(source: Path, tmp_path: Path) -> None:
    (source / "a").write_text("x")
    os.link(source / "a", tmp_path / "elsewhere")
    assert summary(compare(None, scan(source))) == ["put .", "put a"]


def test_attributes_alone_do_not_send_a_directorys_contents_again(source: Path) -> None:
    (source / "d").mkdir()
    (source / "d/f").write_text("x")
    let_times_tell()
    first = scan(source)
    (source / "d").chmod(0o700)
    os.setxattr(source / "d", "user.a", b"b")
    assert summary(compare(first, scan(source, previous=first))) == ["meta d"]


def test_a_file_named_in_always_counts_as_changed(source: Path) -> None:
    (source / "f").write_text("x")
    (source / "g").write_text("x")
    let_times_tell()
    first = scan(source)
    inode = frozenset({first.entries["f"].inode})
    assert summary(compare(first, scan(source, previous=first), always=inode)) == ["put f"]
    assert first.file_inodes() > inode


def test_hashes_of_content_decide_where_both_sides_have_them(source: Path) -> None:
    (source / "f").write_text("x")
    (source / "g").write_text("x")
    let_times_tell()
    first = hash_files(source, scan(source))
    status = (source / "f").stat()
    (source / "f").write_text("y")
    os.utime(source / "f", ns=(status.st_mtime_ns, status.st_mtime_ns))
    (source / "g").touch()
    assert summary(compare(first, hash_files(source, scan(source)))) == ["put f", "meta g"]


# Scanning


def test_another_mount_is_not_entered(source: Path) -> None:
    # On every Linux /dev has mounts in it.
    entries = scan(Path("/dev")).entries
    assert entries["pts"].kind is Kind.DIRECTORY
    assert not any(path.startswith("pts/") for path in entries)


def test_a_root_that_is_a_symlink_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OSError):
        scan(tmp_path / "link")


def test_a_descriptor_of_the_root_does_as_well_and_stays_open(source: Path) -> None:
    (source / "f").write_text("content")
    descriptor = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        snapshot = scan(descriptor)
        assert snapshot == scan(source)
        (change,) = [change for change in compare(None, snapshot) if change.path == "f"]
        assert [bytes(piece) for _offset, piece in read_chunks(descriptor, change)] == [b"content"]
        assert digest(descriptor) == digest(source)
    finally:
        os.close(descriptor)


def test_a_path_too_long_to_carry_is_refused_with_its_beginning(source: Path) -> None:
    above = os.open(source, os.O_RDONLY)
    try:
        for _ in range(17):
            os.mkdir("x" * 250, dir_fd=above)
            below = os.open("x" * 250, os.O_RDONLY, dir_fd=above)
            os.close(above)
            above = below
    finally:
        os.close(above)
    with pytest.raises(BadInput, match="too deep to carry"):
        scan(source)


def test_only_attributes_that_travel_are_seen(source: Path) -> None:
    (source / "f").write_text("x")
    os.setxattr(source / "f", "user.b", b"\0\xff")
    os.setxattr(source / "f", "user.a", b"")
    assert scan(source).entries["f"].xattrs == (("user.a", b""), ("user.b", b"\0\xff"))


@pytest.mark.parametrize("settle", [False, True])
def test_settling_changes_nothing_of_what_a_scan_sees(source: Path, settle: bool) -> None:
    (source / "f").write_text("x" * 10000)
    os.setxattr(source / "f", "user.a", b"b")
    (source / "link").symlink_to("f")
    let_times_tell()
    assert scan(source, settle=settle) == scan(source)


def test_a_store_through_a_mapping_shows_in_the_times_after_settling(source_on_disk: Path) -> None:
    """A page that is dirty before the scan takes further stores without a trace, unless it is written back."""
    file_path = source_on_disk / "f"
    file_path.write_bytes(bytes(4096))
    with open(file_path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as mapping:
        mapping[0] = 1
        let_times_tell()
        first = scan(source_on_disk, settle=True)
        assert first.entries["f"].settled
        mapping[1] = 2
        assert "put f" in summary(compare(first, scan(source_on_disk, previous=first)))


# Content


def pieces(source: Path, name: str, sent: SentContent | None = None, op: Op = Op.PUT) -> list[tuple[int, bytes]]:
    entry = scan(source).entries[name]
    change = Change(op=op, path=name, size=entry.size, inode=entry.inode)
    return [(offset, bytes(piece)) for offset, piece in read_chunks(source, change, sent=sent)]


def test_holes_are_not_read(source: Path, target: Path, sink: TreeSink) -> None:
    with open(source / "f", "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"middle")
    assert [(offset, len(piece)) for offset, piece in pieces(source, "f")] == [(1 << 39, 4096)]
    carry(source, sink, sent=SentContent())
    sink.finish()
    assert data_bytes(target / "f") <= 2 * 4096
    assert (target / "f").stat().st_size == 1 << 40


def test_a_long_file_comes_in_pieces_of_a_mebibyte(source: Path) -> None:
    content = os.urandom(2 * MIB + 5)
    (source / "f").write_bytes(content)
    found = pieces(source, "f", SentContent())
    assert [(offset, len(piece)) for offset, piece in found] == [(0, MIB), (MIB, MIB), (2 * MIB, 5)]
    assert b"".join(piece for _offset, piece in found) == content


def test_only_the_blocks_that_changed_go_again(source: Path, target: Path, sink: TreeSink) -> None:
    sent = SentContent()
    (source / "f").write_bytes(os.urandom(4 * MIB + 100))
    first, _changes, content_bytes = carry(source, sink, sent=sent)
    assert content_bytes == 4 * MIB + 100
    inode = (target / "f").stat().st_ino
    with open(source / "f", "r+b") as file:
        file.seek(BLOCK + 7)
        file.write(b"here")
        file.seek(3 * MIB - 2)
        file.write(b"over")
    second, changes, content_bytes = carry(source, sink, first, sent=sent)
    assert summary(changes) == ["patch f"]
    assert content_bytes == 3 * BLOCK
    assert (target / "f").stat().st_ino == inode
    _third, _changes, content_bytes = carry(source, sink, second, sent=sent, always=Snapshot.file_inodes)
    sink.finish()
    assert content_bytes == 0
    assert look(target) == look(source)


def test_a_file_that_grows_and_shrinks_is_patched_right(source: Path, target: Path, sink: TreeSink) -> None:
    sent, snapshot = SentContent(), None
    for size in (3 * BLOCK, 3 * BLOCK + 10, MIB + 20, BLOCK + 10, 5, 2 * MIB, 0, 2 * BLOCK, 2 * BLOCK - 1, 2 * BLOCK):
        # Cut and written anew at once, as by O_TRUNC, or zeros at the end: the content is a different one each time.
        os.truncate(source / "f", size) if (source / "f").exists() else (source / "f").write_bytes(b"x" * size)
        with open(source / "f", "r+b") as file:
            file.seek(size // 2)
            file.write(b"y"[: size - size // 2])
        snapshot, _changes, _bytes = carry(source, sink, snapshot, sent=sent)
        sink.finish()
        assert look(target) == look(source), size


def test_a_hole_punched_after_the_first_pass_is_a_hole_on_the_other_side(
    source: Path, target: Path, sink: TreeSink
) -> None:
    sent = SentContent()
    (source / "f").write_bytes(os.urandom(2 * MIB))
    first, _changes, _bytes = carry(source, sink, sent=sent)
    os.truncate(source / "f", BLOCK)
    os.truncate(source / "f", 2 * MIB)
    carry(source, sink, first, sent=sent)
    sink.finish()
    assert look(target) == look(source)
    assert data_bytes(target / "f") == data_bytes(source / "f") == BLOCK


def test_what_is_sent_while_it_changes_back_and_forth_is_right_in_the_end(
    source: Path, target: Path, sink: TreeSink
) -> None:
    """A value that is 0 when first looked at, 1 when read and 0 again in the blackout: times may not tell."""
    sent = SentContent()
    (source / "f").write_bytes(bytes([0]) * 3 * BLOCK)
    first = scan(source)
    changes = compare(None, first)
    (source / "f").write_bytes(bytes([1]) * 3 * BLOCK)
    for change in changes:
        sink.apply(change)
        if change.has_content:
            for offset, piece in read_chunks(source, change, sent=sent):
                sink.write(change, offset, piece)
    with open(source / "f", "r+b") as file:
        file.write(bytes([0]) * 3 * BLOCK)
    carry(source, sink, first, sent=sent, always=Snapshot.file_inodes)
    sink.finish()
    assert (target / "f").read_bytes() == bytes([0]) * 3 * BLOCK


@pytest.mark.parametrize("op", [Op.PUT, Op.PATCH])
def test_a_file_that_shrinks_while_it_is_read_is_right_after_the_next_pass(
    source: Path, target: Path, sink: TreeSink, op: Op
) -> None:
    sent = SentContent()
    (source / "f").write_bytes(b"x" * 3 * MIB)
    first, changes, _bytes = carry(source, sink, sent=sent)
    (source / "f").write_bytes(b"y" * 3 * MIB)
    again = dataclasses.replace(changes[-1], op=op)
    sink.apply(again)
    for offset, piece in read_chunks(source, again, sent=sent):
        sink.write(again, offset, piece)
        os.truncate(source / "f", MIB + 10)
    assert (target / "f").read_bytes()[MIB - 1 : MIB + 10] == b"y" * 11
    with open(source / "f", "r+b") as file:
        file.seek(MIB)
        file.write(b"z" * 2 * MIB)
    carry(source, sink, first, sent=sent)
    sink.finish()
    assert look(target) == look(source)


def test_a_file_that_vanished_gives_nothing(source: Path) -> None:
    (source / "f").write_bytes(b"x")
    (change,) = [change for change in compare(None, scan(source)) if change.path == "f"]
    (source / "f").unlink()
    assert list(read_chunks(source, change)) == []


def test_another_file_of_the_same_name_is_not_read(source: Path) -> None:
    (source / "f").write_bytes(b"x" * 10)
    entry = scan(source).entries["f"]
    (source / "g").write_bytes(b"y" * 10)
    (source / "g").rename(source / "f")
    assert list(read_chunks(source, Change(op=Op.PUT, path="f", size=10, inode=entry.inode))) == []


def test_a_symlink_in_place_of_a_file_or_on_the_way_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not yours")
    (source / "f").symlink_to(tmp_path / "secret")
    (source / "d").symlink_to(tmp_path)
    assert list(read_chunks(source, Change(op=Op.PUT, path="f", size=9))) == []
    assert list(read_chunks(source, Change(op=Op.PUT, path="d/secret", size=9))) == []


def test_a_pipe_in_place_of_a_file_does_not_block(source: Path) -> None:
    os.mkfifo(source / "f")
    assert list(read_chunks(source, Change(op=Op.PUT, path="f", size=9))) == []


def test_a_patch_needs_to_know_what_was_sent(source: Path) -> None:
    (source / "f").write_bytes(b"x")
    for sent in (None, SentContent()):
        with pytest.raises(BadInput, match="what the peer has"):
            pieces(source, "f", sent, Op.PATCH)


# Digests


def test_a_digest_tells_every_difference_that_travels(source: Path) -> None:
    (source / "f").write_text("x")
    (source / "d").mkdir()
    os.link(source / "f", source / "d/g")

    def part_names() -> None:
        (source / "d/g").unlink()
        (source / "d/g").write_text("y")

    changes: list[Callable[[], object]] = [
        lambda: (source / "f").chmod(0o600),
        lambda: os.utime(source / "d", ns=(5, 5)),
        lambda: os.setxattr(source / "f", "user.a", b"b"),
        lambda: (source / "f").write_text("y"),
        part_names,
        lambda: (source / "d/g").rename(source / "d/h"),
    ]
    seen = [digest(source)]
    for change in changes:
        change()
        seen.append(digest(source))
    assert len(set(seen)) == len(seen)


def test_a_digest_of_a_snapshot_without_hashes_leaves_content_out(source: Path) -> None:
    (source / "f").write_text("x")
    os.utime(source / "f", ns=(5, 5))
    before = scan(source)
    (source / "f").write_text("y")
    os.utime(source / "f", ns=(5, 5))
    after = scan(source)
    assert digest(before) == digest(after)
    assert digest(after) != digest(hash_files(source, after)) == digest(source)
