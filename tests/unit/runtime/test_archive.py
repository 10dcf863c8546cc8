"""The checkpoint file: what goes in comes out, whatever is wrong with it is found and named, ordinary tools open it."""

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import tar
from runtime.archive import ArchiveReader, ArchiveWriter
from runtime.archive_format import FORMAT, VERSION, Member, pack_footer
from runtime.archive_tree import few_ranges, write_tree
from runtime.errors import BadInput, CorruptData, WrongState
from runtime.tree_content import BLOCK_BYTES
from tests.support.trees import BLOCK, FIRST_STEPS, data_bytes, look, perform, steps

MIB = 1 << 20
METADATA = {"schema": 1, "name": "web1 ü", "list": [1, None, 2.5]}


def write_all(path: Path, tree: Path, image: Path) -> None:
    with ArchiveWriter(path) as archive:
        archive.add_json("checkpoint.json", METADATA)
        archive.add_tree("upper", tree)
        archive.add_file("images/core-1.img", image)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "core-1.img").write_bytes(os.urandom(700))
    return tmp_path / "core-1.img"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    perform(tmp_path / "tree", *FIRST_STEPS)
    return tmp_path / "tree"


@pytest.fixture
def file(tmp_path: Path, tree: Path, image: Path) -> Path:
    (tmp_path / "out").mkdir()
    write_all(tmp_path / "out/web1.ckpt", tree, image)
    return tmp_path / "out/web1.ckpt"


def new_directory(tmp_path: Path, name: str = "extracted") -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


# What goes in comes out


def test_every_member_comes_out_as_it_went_in(file: Path, tree: Path, image: Path, tmp_path: Path) -> None:
    target = new_directory(tmp_path)
    with ArchiveReader(file) as archive:
        assert archive.names() == ["checkpoint.json", "upper", "images/core-1.img"]
        archive.verify()
        assert archive.metadata() == archive.read_json("checkpoint.json") == METADATA
        archive.extract_file("images/core-1.img", tmp_path / "again.img")
        archive.extract_tree("upper", target)
    assert (tmp_path / "again.img").read_bytes() == image.read_bytes()
    assert (tmp_path / "again.img").stat().st_mode & 0o7777 == 0o600
    assert look(target) == look(tree)


@settings(deadline=None, max_examples=40)
@given(st.lists(steps, max_size=20))
def test_whatever_a_tree_holds_comes_back(some_steps: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as base:
        source, target = Path(base, "source"), Path(base, "target")
        source.mkdir()
        target.mkdir()
        perform(source, *FIRST_STEPS, *some_steps)
        with ArchiveWriter(Path(base, "file")) as archive:
            archive.add_tree("upper", source)
        with ArchiveReader(Path(base, "file")) as archive_read:
            archive_read.extract_tree("upper", target)
        assert look(target) == look(source)


def test_holes_are_neither_stored_nor_filled(tmp_path: Path) -> None:
    source, target = new_directory(tmp_path, "source"), new_directory(tmp_path)
    with open(source / "sparse", "wb") as sparse:
        sparse.seek(1 << 39)
        sparse.write(os.urandom(5000))
        sparse.truncate(1 << 40)
    with ArchiveWriter(tmp_path / "file") as archive:
        archive.add_tree("t", source)
    assert (tmp_path / "file").stat().st_size < 10_000
    with ArchiveReader(tmp_path / "file") as reader:
        reader.extract_tree("t", target)
    assert (target / "sparse").stat().st_size == 1 << 40
    assert data_bytes(target / "sparse") <= 3 * 4096
    with open(target / "sparse", "rb") as again, open(source / "sparse", "rb") as sparse:
        sparse.seek(1 << 39)
        again.seek(1 << 39)
        assert again.read(8000) == sparse.read(8000)


def test_a_file_with_very_many_holes_is_stored_with_fewer(tmp_path: Path) -> None:
    with open(tmp_path / "f", "w+b") as file:
        for number in range(200):
            file.seek(number * 8192)
            file.write(b"x")
        file.flush()
        assert len(few_ranges(file.fileno(), 200 * 8192)) == 200
        ranges = few_ranges(file.fileno(), 200 * 8192, most=50)
    assert len(ranges) <= 50
    assert (ranges[0][0], ranges[-1][1]) == (0, 199 * 8192 + 1)


MEASURE = """
import resource, sys
from pathlib import Path
from runtime.archive import ArchiveReader, ArchiveWriter

source, file, target = map(Path, sys.argv[1:])
begin_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ArchiveWriter(file) as archive:
    archive.add_tree("t", source)
with ArchiveReader(file) as archive:
    archive.extract_tree("t", target)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin_kib)
"""


def test_memory_does_not_grow_with_the_size_of_a_member(tmp_path: Path) -> None:
    """Neither on the way in nor out; 128 MiB of zeros make a frame of a few KiB."""
    source, target = new_directory(tmp_path, "source"), new_directory(tmp_path)
    with open(source / "zeros", "wb") as zeros:
        for _ in range(128):
            zeros.write(bytes(MIB))
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "file"), str(target)]
    top = Path(__file__).parents[3]
    grown_kib = int(subprocess.run(command, capture_output=True, timeout=60, check=True, cwd=top).stdout)
    assert (tmp_path / "file").stat().st_size < MIB
    assert grown_kib < 24 * 1024


def test_an_empty_file_an_empty_tree_and_an_empty_archive_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    target = new_directory(tmp_path)
    with ArchiveWriter(tmp_path / "file") as archive:
        archive.add_file("empty", tmp_path / "empty")
        archive.add_tree("tree", new_directory(tmp_path, "source"))
    with ArchiveReader(tmp_path / "file") as reader:
        reader.extract_file("empty", tmp_path / "again")
        reader.extract_tree("tree", target)
    assert (tmp_path / "again").read_bytes() == b""
    with ArchiveWriter(tmp_path / "nothing"):
        pass
    with ArchiveReader(tmp_path / "nothing") as reader:
        assert reader.names() == []
        reader.verify()
        with pytest.raises(CorruptData, match="no metadata"):
            reader.metadata()


# Writing


def test_the_file_is_its_owners_only_and_there_is_nothing_else(file: Path) -> None:
    assert file.stat().st_mode & 0o7777 == 0o600
    assert os.listdir(file.parent) == ["web1.ckpt"]


def test_an_older_file_stays_until_the_new_one_is_whole(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(BadInput), ArchiveWriter(file) as archive:
        archive.add_json("no name at all!", 1)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["web1.ckpt"]
    with ArchiveWriter(file) as archive:
        archive.add_json("a", 1)
        assert file.read_bytes() == before
    assert file.read_bytes() != before


def test_a_symlink_is_followed_and_stays(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    with ArchiveWriter(tmp_path / "link") as archive:
        archive.add_json("a", 1)
    assert (tmp_path / "link").is_symlink()
    with ArchiveReader(file) as reader:
        assert reader.names() == ["a"]


@pytest.mark.parametrize("path", ["/dev/null", "/", "/missing/directory/file", "/proc/file"])
def test_what_can_not_be_a_checkpoint_file_is_refused_and_left_alone(path: str) -> None:
    before = os.stat(path) if os.path.exists(path) else None
    with pytest.raises(BadInput):
        ArchiveWriter(Path(path))
    if before is not None:
        assert os.stat(path).st_rdev == before.st_rdev
        assert os.stat(path).st_ino == before.st_ino


@pytest.mark.parametrize(
    "name", ["", "/a", "../a", "a/../b", ".a", "a//b", "a/", "manifest.json", "a b", "x" * 101, "ü"]
)
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with ArchiveWriter(tmp_path / "file") as archive, pytest.raises(BadInput, match="no name"):
        archive.add_json(name, 1)


@pytest.mark.parametrize("name", ["upper", "upper/etc"])
def test_a_name_within_another_is_refused(tmp_path: Path, name: str) -> None:
    with ArchiveWriter(tmp_path / "file") as archive:
        archive.add_tree("upper", new_directory(tmp_path))
        with pytest.raises(BadInput, match="already"):
            archive.add_json(name, 1)


def test_a_tree_that_changes_while_it_is_written_is_told_as_such(tmp_path: Path) -> None:
    source = new_directory(tmp_path, "source")
    (source / "a").write_bytes(b"x" * 100)

    def write(_data: object) -> None:  # the root is written first
        (source / "a").write_bytes(b"x" * 50)

    with pytest.raises(WrongState, match="'a' changed"):
        write_tree("t", source, write)


# Damage


def damage_is_found(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CorruptData) as caught, ArchiveReader(path) as archive:
        archive.verify()
    return str(caught.value)


def test_a_bit_flipped_anywhere_is_found_and_named(tmp_path: Path, image: Path) -> None:
    small = new_directory(tmp_path, "small")
    (small / "file").write_bytes(b"content")
    whole = tmp_path / "whole"
    write_all(whole, small, image)
    with ArchiveReader(whole) as archive:
        members = list(archive._members.values())
    content = bytearray(whole.read_bytes())
    for position in range(len(content)):
        content[position] ^= 1 << position % 8
        message = damage_is_found(tmp_path / "damaged", bytes(content))
        content[position] ^= 1 << position % 8
        inside = [m.name for m in members if m.offset <= position < m.offset + m.frame_bytes]
        assert (inside[0] if inside else "its end" if "its end" in message else "manifest.json") in message


def test_a_file_cut_short_anywhere_is_found(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for length in (*range(200), *range(200, len(content), 97), len(content) - 1):
        assert "its end is missing" in damage_is_found(tmp_path / "damaged", content[:length])


def test_bytes_too_many_or_lost_in_the_middle_are_found(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    for wrong in (
        content + b"\0",
        b"\0" + content,
        content[:500] + content[501:],
        content[:500] + b"\0" + content[500:],
    ):
        assert "its end" in damage_is_found(tmp_path / "damaged", wrong)


def test_two_files_one_after_the_other_are_none(file: Path, tmp_path: Path) -> None:
    damage_is_found(tmp_path / "damaged", file.read_bytes() * 2)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(100_000), zstandard.compress(b"x" * 1000)])
def test_another_kind_of_file_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    assert "no whole checkpoint file" in damage_is_found(tmp_path / "file", content)


def test_a_damaged_member_is_not_used_without_verify_either(file: Path, tmp_path: Path) -> None:
    with ArchiveReader(file) as archive:
        member = archive._members["upper"]
    content = bytearray(file.read_bytes())
    content[member.offset + member.frame_bytes // 2] ^= 4
    file.write_bytes(content)
    target = new_directory(tmp_path)
    with ArchiveReader(file) as archive:
        assert archive.metadata() == METADATA
        with pytest.raises(CorruptData, match="upper is damaged"):
            archive.extract_tree("upper", target)
    assert os.listdir(target) == []


# Files made to do harm: whole, but not what we write


def forge(
    path: Path, frames: dict[str, tuple[str, bytes]], edit: Callable[[dict[str, Any]], None] = lambda _m: None
) -> None:
    """A file whose checksums are all right. ``frames``: name to kind and the bytes of its tar entries."""
    out, members = b"", []
    for name, (kind, content) in frames.items():
        frame = zstandard.compress(content)
        digest = xxhash.xxh3_128_hexdigest(frame)
        sizes = {"offset": len(out), "frame_bytes": len(frame), "tar_bytes": len(content)}
        members.append({"name": name, "kind": kind, **sizes, "xxh3": digest})
        out += frame
    manifest = {"format": FORMAT, "version": VERSION, "members": members}
    edit(manifest)
    text = json.dumps(manifest).encode()
    content = tar.encode(tar.TarEntry(name=b"manifest.json", size=len(text))) + text + tar.padding(len(text)) + tar.END
    frame = zstandard.compress(content)
    digest = xxhash.xxh3_128_hexdigest(frame)
    place = Member(name="", kind="json", offset=len(out), frame_bytes=len(frame), tar_bytes=0, xxh3=digest)
    path.write_bytes(out + frame + pack_footer(place))


def entry_of(name: bytes, content: bytes = b"", **fields: Any) -> bytes:
    return tar.encode(tar.TarEntry(name=name, size=len(content), **fields)) + content + tar.padding(len(content))


def one(name: str, content: bytes, kind: str = "file") -> dict[str, tuple[str, bytes]]:
    return {name: (kind, content)}


def test_a_forged_file_that_is_right_is_accepted(tmp_path: Path) -> None:
    forge(tmp_path / "file", one("a", entry_of(b"a", b"content")))
    with ArchiveReader(tmp_path / "file") as archive:
        archive.extract_file("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(format="other"),
        lambda m: m.update(version=VERSION + 1),
        lambda m: m.update(version="1"),
        lambda m: m.pop("members"),
        lambda m: m.update(members={}),
        lambda m: m.update(members=[7]),
        lambda m: m["members"][0].update(name="../a"),
        lambda m: m["members"][0].update(name="manifest.json"),
        lambda m: m["members"][0].update(name=7),
        lambda m: m["members"][0].update(kind="directory"),
        lambda m: m["members"][0].update(kind=["file"]),
        lambda m: m["members"][0].update(offset=1),
        lambda m: m["members"][0].update(offset=-1),
        lambda m: m["members"][0].update(frame_bytes=1.0),
        lambda m: m["members"][0].update(frame_bytes=1 << 70),
        lambda m: m["members"][0].update(tar_bytes=True),
        lambda m: m["members"][0].update(xxh3=None),
        lambda m: m["members"][0].update(extra=1),
        lambda m: m["members"].append(dict(m["members"][0])),
        lambda m: m["members"].append({**m["members"][0], "offset": m["members"][0]["frame_bytes"], "frame_bytes": 0}),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    forge(tmp_path / "file", one("a", entry_of(b"a", b"content")), edit)
    with pytest.raises(CorruptData), ArchiveReader(tmp_path / "file") as archive:
        archive.verify()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 512,
        bytes(512),
        entry_of(b"b", b"content"),
        entry_of(b"../../etc/passwd", b"content"),
        entry_of(b"a", kind=tar.SYMLINK, target=b"/etc/passwd"),
        entry_of(b"a", kind=tar.DIRECTORY),
        entry_of(b"a", kind=tar.CHAR, device=(1, 3)),
        entry_of(b"a", b"content")[:-512],
        entry_of(b"a", b"content") + entry_of(b"a", b"again"),
        entry_of(b"a", b"content") + bytes(1),
        tar.encode(tar.TarEntry(name=b"a", size=1 << 50)),
    ],
    ids=range(12),
)
def test_a_file_member_that_is_anything_but_that_file_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    forge(tmp_path / "file", one("a", content))
    with ArchiveReader(tmp_path / "file") as archive, pytest.raises(CorruptData, match="a is damaged"):
        archive.extract_file("a", tmp_path / "extracted")
    assert not (tmp_path / "extracted").exists()


def test_a_frame_longer_or_shorter_than_announced_is_refused(tmp_path: Path) -> None:
    content = entry_of(b"a", bytes(10 * MIB))
    for wrong in (512, len(content) - 512, len(content) + 512):
        forge(tmp_path / "file", one("a", content), lambda m, wrong=wrong: m["members"][0].update(tar_bytes=wrong))  # type: ignore[misc]
        with ArchiveReader(tmp_path / "file") as archive, pytest.raises(CorruptData, match="a is damaged"):
            archive.extract_file("a", tmp_path / "extracted")


def test_json_beyond_all_measure_is_not_read_into_memory(tmp_path: Path) -> None:
    forge(tmp_path / "file", one("a", tar.encode(tar.TarEntry(name=b"a", size=1 << 40)), "json"))
    with ArchiveReader(tmp_path / "file") as archive, pytest.raises(CorruptData, match="are allowed"):
        archive.read_json("a")


def test_what_is_no_json_is_corrupt(tmp_path: Path) -> None:
    forge(tmp_path / "file", one("a", entry_of(b"a", b"{"), "json"))
    with ArchiveReader(tmp_path / "file") as archive, pytest.raises(CorruptData, match="no JSON"):
        archive.read_json("a")


def tree_entry(path: str, content: bytes = b"", *, name: str = "", **message: Any) -> bytes:
    fields = {"op": "put", "path": os.fsencode(path), "kind": "file", "mode": 0o644, "size": len(content)}
    fields |= {"uid": os.getuid(), "gid": os.getgid()} | message
    comment = base64.b64encode(msgpack.packb({key: value for key, value in fields.items() if value is not None}))
    return entry_of(os.fsencode(name or f"t/{path}"), content, comment=comment)


@pytest.mark.parametrize(
    "content",
    [
        tree_entry("../escaped", b"x"),
        tree_entry("/tmp/escaped", b"x"),
        tree_entry("a", b"x", name="t/b"),
        tree_entry("a", b"x", name="other/a"),
        tree_entry("a", b"x", size=2),
        tree_entry("a", b"x", size=0),
        tree_entry("a", kind="symlink", size=0, target=b"..") + tree_entry("a/escaped", b"x"),
        tree_entry("a", op="remove", kind=None, size=None),
        tree_entry("a", op="patch", size=0),
        tree_entry("a", op="link", target=b"../outside", kind=None, size=None),
        tree_entry("b/c", b"x"),
        entry_of(b"t/a", b"x"),
        entry_of(b"t/a", b"x", comment=b"not base64!"),
        entry_of(b"t/a", b"x", comment=b"AAAA"),
        entry_of(b"t/a", b"x", data=((0, 5),), real_size=5),
    ],
    ids=range(15),
)
def test_a_tree_member_that_lies_makes_nothing_outside(tmp_path: Path, content: bytes) -> None:
    target = new_directory(tmp_path)
    forge(tmp_path / "file", one("t", content, "tree"))
    with ArchiveReader(tmp_path / "file") as archive, pytest.raises(CorruptData, match="t is damaged"):
        archive.extract_tree("t", target)
    assert sorted(os.listdir(tmp_path)) == ["extracted", "file"]


@pytest.mark.parametrize(
    "ranges",
    [((0, 10), (5, 20)), ((10, 20), (0, 5)), ((0, 1 << 40),), ((90, 110),)],
    ids=["over", "back", "long", "beyond"],
)
def test_a_map_of_data_that_lies_is_refused(tmp_path: Path, ranges: tuple[tar.Range, ...]) -> None:
    message = {"op": "put", "path": b"a", "kind": "file", "size": 100, "uid": os.getuid(), "gid": os.getgid()}
    size = min(1000, sum(end - start for start, end in ranges))
    comment = base64.b64encode(msgpack.packb(message))
    entry = tar.TarEntry(name=b"t/a", size=size, data=ranges, real_size=100, comment=comment)
    forge(tmp_path / "file", one("t", tar.encode(entry) + bytes(size) + tar.padding(size), "tree"))
    target = new_directory(tmp_path)
    with ArchiveReader(tmp_path / "file") as archive, pytest.raises(CorruptData, match="t is damaged"):
        archive.extract_tree("t", target)


# Extracting


def test_a_file_is_only_extracted_to_a_new_one(file: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to("elsewhere")
    with ArchiveReader(file) as archive:
        for name in ("there", "link"):
            with pytest.raises(BadInput, match="there already"):
                archive.extract_file("images/core-1.img", tmp_path / name)
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_tree_is_only_extracted_to_an_empty_directory(file: Path, tmp_path: Path) -> None:
    target = new_directory(tmp_path)
    (target / "mine").touch()
    with ArchiveReader(file) as archive, pytest.raises(BadInput, match="not empty"):
        archive.extract_tree("upper", target)


def test_a_member_that_is_missing_or_of_another_kind_is_named(file: Path, tmp_path: Path) -> None:
    target = new_directory(tmp_path)
    with ArchiveReader(file) as archive:
        with pytest.raises(CorruptData, match="no tree tmpfs-0"):
            archive.extract_tree("tmpfs-0", target)
        with pytest.raises(CorruptData, match="no json upper"):
            archive.read_json("upper")


def test_a_file_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        ArchiveReader(tmp_path / "missing")


# Ordinary tools


def test_zstd_and_tar_open_it_without_a_word_of_complaint(file: Path, tree: Path, tmp_path: Path) -> None:
    target = new_directory(tmp_path)
    for command in (["zstd", "-qt", str(file)], ["tar", "--zstd", "--xattrs", "-xf", str(file), "-C", str(target)]):
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        assert (done.stdout, done.stderr) == (b"", b"")
    # Times of directories are as tar leaves them when it makes hard links.
    extracted, original = (
        {path: (*facts[:5], facts[-1]) for path, facts in look(t).items()} for t in (target / "upper", tree)
    )
    assert extracted == original
    assert json.loads((target / "checkpoint.json").read_bytes()) == METADATA
    assert [m["name"] for m in json.loads((target / "manifest.json").read_bytes())["members"]][1:] == [
        "upper",
        "images/core-1.img",
    ]


def test_the_standard_library_reads_the_entries_as_they_are_meant(tmp_path: Path) -> None:
    """Another reader than our own: long names, large numbers, fractions of seconds, holes."""
    entries = [
        tar.TarEntry(
            name=b"d/" + b"n" * 200, size=3, uid=4_000_000_000, gid=2_097_152, mode=0o6755, mtime_ns=1_500_000_000
        ),
        tar.TarEntry(name=b"old", size=0, mtime_ns=-1_500_000_000),
        tar.TarEntry(name=b"link", kind=tar.SYMLINK, target=b"t" * 150),
        tar.TarEntry(name=b"dev", kind=tar.CHAR, device=(1, 3)),
        tar.TarEntry(name=b"x", xattrs=((b"user.a", b"\0\xff\n="), (b"user.b=c", b"left out")), comment=b"c" * 1000),
        tar.TarEntry(name=b"sparse", size=6, data=((2, 5), (8, 11)), real_size=20),
    ]
    data = {b"d/" + b"n" * 200: b"abc", b"sparse": b"uvwxyz"}
    blob = b"".join(
        tar.encode(entry) + data.get(entry.name, b"") + tar.padding(len(data.get(entry.name, b""))) for entry in entries
    )
    with tarfile.open(fileobj=io.BytesIO(blob + tar.END)) as archive:
        found = {info.name: info for info in archive}
        long = found["d/" + "n" * 200]
        assert (long.uid, long.gid, long.mode, long.mtime) == (4_000_000_000, 2_097_152, 0o6755, 1.5)
        content = archive.extractfile(long)
        assert content is not None
        assert content.read() == b"abc"
        assert found["old"].mtime == -1.5
        assert found["link"].linkname == "t" * 150
        assert (found["dev"].devmajor, found["dev"].devminor, found["dev"].ischr()) == (1, 3, True)
        assert set(found["x"].pax_headers) == {"SCHILY.xattr.user.a", "comment"}
        sparse = archive.extractfile(found["sparse"])
        assert sparse is not None
        assert sparse.read() == b"\0\0uvw\0\0\0xyz" + bytes(9)


@given(st.binary(max_size=3000))
def test_whatever_bytes_a_tar_parser_is_fed_they_are_an_entry_or_corrupt(noise: bytes) -> None:
    header = tar.encode(tar.TarEntry(name=b"n" * 150, comment=b"x" * 700, size=5))
    blob = bytes(a ^ b for a, b in zip(header, noise.ljust(len(header), b"\0"), strict=False))
    parser, position = tar.TarParser(), 0
    try:
        while position + parser.wanted <= len(blob):
            wanted = parser.wanted
            if parser.feed(blob[position : position + wanted]) is not None:
                return
            position += wanted
    except CorruptData:
        return


def test_block_sizes_match() -> None:
    """The property tests lean on files around the border of a block."""
    assert BLOCK == BLOCK_BYTES
