"""Image sets: written from what a peer sent, byte for byte as CRIU wants them, and read again."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycriu.images import pagemap_pb2, pstree_pb2

from runtime.criu.images import (
    ImageSetSummary,
    ImageSetWriter,
    PageImageWriter,
    PagemapEntry,
    PageRun,
    image_set_summary,
    read_pagemap,
)
from runtime.criu.pages import SpaceId
from runtime.errors import CorruptData

PAGE = 4096
LAZY, PRESENT = 2, 4
NARROW, WIDE = (4, 1, 1), (4, 2, 1)
TASK, OTHER_TASK, SHMEM = SpaceId("task", 1), SpaceId("task", 42), SpaceId("shmem", 7)
DATA = Path(__file__).resolve().parents[3] / "data"
MAGIC = struct.pack("<II", 0x54564319, 0x56084025)

both_versions = pytest.mark.parametrize("version", [NARROW, WIDE])


def pages(count: int) -> bytes:
    return os.urandom(count * PAGE)


def writer_of(directory: Path, *spaces: SpaceId, version: tuple[int, int, int] = WIDE) -> PageImageWriter:
    writer = PageImageWriter(directory, version)
    for space in spaces:
        writer.open(space)
    return writer


def pages_of(directory: Path, pagemap: str) -> bytes:
    return (directory / f"pages-{read_pagemap(directory / pagemap).pages_id}.img").read_bytes()


# Files by name


@pytest.mark.parametrize(
    "name",
    [
        "inventory.img",
        "core-1.img",
        "tmpfs-dev-72.tar.gz.img",
        "netns-ct-9.img",
        "ip6tables-12.img",
        "pagemap-shmem-18446744073709551615.img",
        "tcp-stream-3fb21.img",
    ],
)
def test_names_that_criu_gives_are_accepted(tmp_path: Path, name: str) -> None:
    ImageSetWriter(tmp_path).write_file(name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".img",
        ".hidden.img",
        "-f.img",
        "..img/../x.img",
        "../inventory.img",
        "a/b.img",
        "/etc/core-1.img",
        "core-1.img\n",
        "core-1.img\0",
        "core 1.img",
        "core-1.im",
        "core-1.imgs",
        "parent",
        "dump.log",
        "côre-1.img",
        "x" * 200 + ".img",
    ],
)
def test_other_names_are_refused_and_write_nothing(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    with pytest.raises(CorruptData):
        ImageSetWriter(directory).write_file(name, b"x")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_that_comes_twice_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    writer = ImageSetWriter(tmp_path)
    writer.write_file("core-1.img", b"first")
    with pytest.raises(CorruptData, match="twice"):
        writer.write_file("core-1.img", b"second")
    assert (tmp_path / "core-1.img").read_bytes() == b"first"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "core-1.img").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptData):
        ImageSetWriter(tmp_path).write_file("core-1.img", b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_can_be_written_in_pieces(tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path).create("pages-1.img") as file:
        file.write(b"one")
        file.write(memoryview(b"two"))
    assert (tmp_path / "pages-1.img").read_bytes() == b"onetwo"


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    writer = ImageSetWriter(tmp_path, max_files=2)
    writer.write_file("core-1.img", b"")
    writer.write_file("core-2.img", b"")
    with pytest.raises(CorruptData):
        writer.write_file("core-3.img", b"")


# Pages


@both_versions
def test_runs_come_back_with_address_count_and_flags_and_their_bytes_in_order(
    tmp_path: Path, version: tuple[int, int, int]
) -> None:
    content = pages(6)
    writer = writer_of(tmp_path, TASK, version=version)
    writer.write(TASK, [(0x10000, 2, PRESENT), (0x7FFF_F000_0000, 1, PRESENT | LAZY)], content[: 3 * PAGE])
    writer.write(TASK, [(0x7FFF_F800_0000, 3, PRESENT)], content[3 * PAGE :])
    writer.finish()
    assert read_pagemap(tmp_path / "pagemap-1.img").entries == (
        PagemapEntry(address=0x10000, pages=2, flags=PRESENT),
        PagemapEntry(address=0x7FFF_F000_0000, pages=1, flags=PRESENT | LAZY),
        PagemapEntry(address=0x7FFF_F800_0000, pages=3, flags=PRESENT),
    )
    assert pages_of(tmp_path, "pagemap-1.img") == content


def test_a_wide_pagemap_is_byte_for_byte_what_criu_reads(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, TASK)
    writer.write(TASK, [(0x2000, 3, 6)], pages(3))
    writer.finish()
    head = b"\x08\x01"  # field 1: pages_id
    entry = b"\x08\x80\x40\x10\x03\x20\x06\x28\x03"  # 1: vaddr, 2: compat_nr_pages, 4: flags, 5: nr_pages
    expected = MAGIC + b"\x02\0\0\0" + head + b"\x09\0\0\0" + entry
    assert (tmp_path / "pagemap-1.img").read_bytes() == expected


def test_a_pagemap_for_an_older_criu_has_the_narrow_count_alone(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, TASK, version=NARROW)
    writer.write(TASK, [(0x2000, 3, 6)], pages(3))
    writer.finish()
    entry = b"\x08\x80\x40\x10\x03\x20\x06"
    assert (tmp_path / "pagemap-1.img").read_bytes() == MAGIC + b"\x02\0\0\0\x08\x01" + b"\x07\0\0\0" + entry


def test_adjacent_runs_with_the_same_flags_become_one_entry(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, TASK)
    writer.write(TASK, [(0x1000, 1, PRESENT), (0x2000, 2, PRESENT), (0x4000, 1, 6)], pages(4))
    writer.write(TASK, [(0x5000, 1, 6), (0x7000, 1, 6)], pages(2))
    writer.finish()
    entries = read_pagemap(tmp_path / "pagemap-1.img").entries
    assert [(entry.address, entry.pages, entry.flags) for entry in entries] == [
        (0x1000, 3, PRESENT),
        (0x4000, 2, 6),
        (0x7000, 1, 6),
    ]


def test_spaces_may_alternate_and_keep_files_of_their_own(tmp_path: Path) -> None:
    content = {space: pages(2) for space in (TASK, OTHER_TASK, SHMEM)}
    writer = writer_of(tmp_path, TASK)
    for page in (0, 1):
        for space, data in content.items():
            writer.open(space)
            writer.write(space, [(page * PAGE, 1, PRESENT)], data[page * PAGE : (page + 1) * PAGE])
    writer.finish()
    names = {TASK: "pagemap-1.img", OTHER_TASK: "pagemap-42.img", SHMEM: "pagemap-shmem-7.img"}
    assert {space: pages_of(tmp_path, name) for space, name in names.items()} == content
    assert len({read_pagemap(tmp_path / name).pages_id for name in names.values()}) == 3


def test_a_space_without_pages_has_its_files_nevertheless(tmp_path: Path) -> None:
    writer_of(tmp_path, TASK).finish()
    assert read_pagemap(tmp_path / "pagemap-1.img").entries == ()
    assert pages_of(tmp_path, "pagemap-1.img") == b""


def test_pages_can_be_received_straight_into_reserved_memory(tmp_path: Path) -> None:
    content = pages(5)
    writer = writer_of(tmp_path, TASK)
    for first, count in ((0, 3), (3, 2)):
        with writer.reserve(TASK, [(first * PAGE, count, PRESENT)]) as view:
            assert len(view) == count * PAGE
            view[:] = content[first * PAGE : (first + count) * PAGE]
    writer.finish()
    assert pages_of(tmp_path, "pagemap-1.img") == content
    assert [entry.pages for entry in read_pagemap(tmp_path / "pagemap-1.img").entries] == [5]


def test_a_reservation_that_fails_leaves_no_trace_of_its_runs(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, TASK)
    with pytest.raises(ConnectionError), writer.reserve(TASK, [(0, 3, PRESENT)]):
        raise ConnectionError
    content = pages(1)
    writer.write(TASK, [(0, 1, PRESENT)], content)
    writer.finish()
    assert pages_of(tmp_path, "pagemap-1.img") == content


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([(0, 1, LAZY)], "has no content"),
        ([(0, 1, 1)], "has no content"),
        ([(0, 1, 5)], "has no content"),
        ([(0, 1, 0)], "has no content"),
        ([(0, 1, PRESENT | 8)], "has no content"),
        ([(0, 0, PRESENT)], "impossible"),
        ([(0, -1, PRESENT)], "impossible"),
        ([(7, 1, PRESENT)], "impossible"),
        ([(1 << 57, 1, PRESENT)], "impossible"),
        ([(0, 1 << 46, PRESENT)], "impossible"),
        ([(0x8000, 1, PRESENT), (0x7000, 1, PRESENT)], "out of order or twice"),
        ([(0x8000, 2, PRESENT), (0x9000, 1, PRESENT)], "out of order or twice"),
        ([(0, 1 << 30, PRESENT)], "in one batch"),
    ],
)
def test_runs_that_make_no_sense_are_refused_before_any_memory_is_given(
    tmp_path: Path, runs: list[PageRun], why: str
) -> None:
    writer = writer_of(tmp_path, TASK)
    with pytest.raises(CorruptData, match=why), writer.reserve(TASK, runs):
        pytest.fail("no memory should have been given")


def test_a_page_of_an_earlier_batch_cannot_come_again(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, TASK)
    writer.write(TASK, [(0x8000, 2, PRESENT)], pages(2))
    with pytest.raises(CorruptData, match="out of order or twice"):
        writer.write(TASK, [(0x9000, 1, PRESENT)], pages(1))


def test_data_that_does_not_fit_its_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match="do not fit"):
        writer_of(tmp_path, TASK).write(TASK, [(0, 2, PRESENT)], pages(1))


def test_pages_of_a_space_that_was_not_opened_or_after_the_end_are_refused(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, TASK)
    with pytest.raises(CorruptData):
        writer.write(OTHER_TASK, [(0, 1, PRESENT)], pages(1))
    writer.finish()
    with pytest.raises(CorruptData):
        writer.write(TASK, [(0, 1, PRESENT)], pages(1))
    with pytest.raises(CorruptData):
        writer.open(OTHER_TASK)


@pytest.mark.parametrize("space", [SpaceId("task", 2**31), SpaceId("shmem", 2**56)])
def test_a_space_that_no_image_can_hold_is_refused(tmp_path: Path, space: SpaceId) -> None:
    with pytest.raises(CorruptData):
        writer_of(tmp_path, space)


def test_too_many_spaces_are_refused(tmp_path: Path) -> None:
    writer = PageImageWriter(tmp_path, WIDE, max_spaces=1)
    writer.open(TASK)
    with pytest.raises(CorruptData):
        writer.open(OTHER_TASK)


def test_a_file_of_the_peers_in_the_place_of_ours_is_not_overwritten(tmp_path: Path) -> None:
    ImageSetWriter(tmp_path).write_file("pages-1.img", b"the peer's")
    with pytest.raises(CorruptData, match="twice"):
        writer_of(tmp_path, TASK)
    assert (tmp_path / "pages-1.img").read_bytes() == b"the peer's"


# Reading


@pytest.mark.parametrize("version", ["4.1.1", "4.2.1"])
def test_pagemaps_of_real_criu_are_read(version: str) -> None:
    """Of a `sleep`, dumped with this CRIU: 30 pages in 12 entries."""
    pagemap = read_pagemap(DATA / f"pagemap-criu-{version}.img")
    assert pagemap.pages_id == 1
    assert len(pagemap.entries) == 12
    assert sum(entry.pages for entry in pagemap.entries if entry.flags & PRESENT) == 30
    addresses = [entry.address for entry in pagemap.entries]
    assert addresses == sorted(addresses)
    assert {entry.flags for entry in pagemap.entries} == {PRESENT, PRESENT | LAZY}


def record(message: Any) -> bytes:
    body = message.SerializePartialToString()
    return struct.pack("<I", len(body)) + body


HEAD = record(pagemap_pb2.pagemap_head(pages_id=3))


def test_entries_from_before_there_were_flags_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "pagemap-1.img"
    old = record(pagemap_pb2.pagemap_entry(vaddr=PAGE, compat_nr_pages=2))
    parent = record(pagemap_pb2.pagemap_entry(vaddr=9 * PAGE, compat_nr_pages=1, in_parent=True))
    path.write_bytes(MAGIC + HEAD + old + parent)
    assert read_pagemap(path).entries == (
        PagemapEntry(address=PAGE, pages=2, flags=PRESENT),
        PagemapEntry(address=9 * PAGE, pages=1, flags=1),
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        MAGIC[:7],
        b"\0" * 8 + HEAD,
        MAGIC,
        MAGIC + HEAD[:-1],
        MAGIC + HEAD + b"\1\0",
        MAGIC + HEAD + struct.pack("<I", 2**32 - 1) + b"x",
        MAGIC + HEAD + struct.pack("<I", 3) + b"\xff\xff\xff",
        MAGIC + HEAD + record(pagemap_pb2.pagemap_entry(flags=PRESENT)),
        MAGIC + record(pagemap_pb2.pagemap_head()),
    ],
)
def test_a_damaged_pagemap_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pagemap-1.img"
    path.write_bytes(content)
    with pytest.raises(CorruptData, match=r"pagemap-1\.img"):
        read_pagemap(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_pagemap_or_corrupt_data(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.img"
    path.write_bytes(MAGIC + HEAD + content)
    try:
        pagemap = read_pagemap(path)
    except CorruptData:
        return
    assert pagemap.pages_id == 3


def test_a_missing_image_is_corrupt_data(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match="pstree"):
        image_set_summary(tmp_path)


def test_the_summary_counts_tasks_threads_and_pages_with_content(tmp_path: Path) -> None:
    tree = [
        pstree_pb2.pstree_entry(pid=1, ppid=0, pgid=1, sid=1, threads=[1, 5, 6]),
        pstree_pb2.pstree_entry(pid=42, ppid=1, pgid=1, sid=1, threads=[42]),
    ]
    magic = struct.pack("<II", 0x54564319, 0x50273030)
    (tmp_path / "pstree.img").write_bytes(magic + b"".join(record(entry) for entry in tree))
    writer = writer_of(tmp_path, TASK, SHMEM)
    writer.write(TASK, [(0, 3, PRESENT), (0x8000, 2, 6)], pages(5))
    writer.write(SHMEM, [(0, 4, PRESENT)], pages(4))
    writer.finish()
    parent = record(pagemap_pb2.pagemap_entry(vaddr=0, compat_nr_pages=100, flags=1))
    (tmp_path / "pagemap-42.img").write_bytes(MAGIC + HEAD + parent)
    summary = image_set_summary(tmp_path)
    assert summary == ImageSetSummary(tasks=2, threads=4, pages=9)
    assert summary.memory_bytes == 9 * PAGE
