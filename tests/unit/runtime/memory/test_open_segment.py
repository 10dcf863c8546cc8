import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.memory.api import Segment
from runtime.memory.maps import parse_mappings
from runtime.memory.open_segment import OpenSegment, open_segment
from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRanges

PAGES = 64


def pages(*numbers: int) -> PageRanges:
    return PageRanges.from_spans((number * PAGE_BYTES, (number + 1) * PAGE_BYTES) for number in numbers)


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("segment", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * PAGE_BYTES)
    yield fd
    os.close(fd)


@pytest.fixture
def segment(file: int) -> Iterator[OpenSegment]:
    found = OpenSegment(Segment("0:1", 7, "/memfd:segment"), os.dup(file))
    yield found
    found.close()


def copy_out(segment: OpenSegment, wanted: PageRanges) -> dict[int, bytes]:
    """As a round does: what is copied is noted. Page number to content of all pages that are not zeros."""
    found = {}
    for filled, data, zeros in segment.content(wanted, memoryview(bytearray(8 * PAGE_BYTES))):
        position = 0
        for offset, size in filled:
            segment.copied(offset, data[position : position + size])
            for at in range(0, size, PAGE_BYTES):
                start = position + at
                found[(offset + at) // PAGE_BYTES] = bytes(data[start : start + PAGE_BYTES])
            position += size
        for offset, size in zeros:
            segment.copied(offset, memoryview(bytes(size)))
    return found


def write(file: int, page: int, content: bytes) -> None:
    os.pwrite(file, content.ljust(PAGE_BYTES, b"."), page * PAGE_BYTES)


def test_what_was_never_copied_is_all_that_exists(segment: OpenSegment, file: int) -> None:
    write(file, 3, b"x")
    write(file, 9, b"y")
    assert segment.existing() == pages(3, 9)
    assert segment.differing(segment.existing()) == pages(3, 9)
    segment.look_ahead(segment.existing())
    assert segment.differing_still(segment.existing()) == pages(3, 9)


@pytest.mark.parametrize("still", [False, True])
def test_only_what_changed_since_it_was_copied_differs(segment: OpenSegment, file: int, still: bool) -> None:
    chosen = random.Random(1)
    for page in range(40):
        write(file, page, b"%d" % page)
    copies = copy_out(segment, segment.existing())
    assert copies[7].startswith(b"7..")
    segment.look_ahead(segment.existing())
    for _ in range(10):
        changed = {chosen.randrange(PAGES) for _ in range(5)}
        for page in changed:
            write(file, page, os.urandom(8))
        existing = segment.existing()
        found = segment.differing_still(existing) if still else segment.differing(existing)
        assert found == pages(*changed)
        copy_out(segment, found)


def test_looking_ahead_makes_no_page(segment: OpenSegment, file: int) -> None:
    write(file, 5, b"x")
    segment.look_ahead(segment.existing())
    copy_out(segment, segment.existing())
    assert segment.differing_still(segment.existing()) == EMPTY
    assert segment.existing() == pages(5)


def test_a_segment_that_became_shorter_is_not_looked_at_behind_its_end(segment: OpenSegment, file: int) -> None:
    for page in range(PAGES):
        write(file, page, b"x")
    copy_out(segment, segment.existing())
    segment.look_ahead(segment.existing())
    os.ftruncate(file, 10 * PAGE_BYTES)
    write(file, 4, b"y")
    assert segment.differing_still(segment.existing()) == pages(4)


def test_a_segment_that_became_longer_is_compared_as_a_whole(segment: OpenSegment, file: int) -> None:
    write(file, 1, b"x")
    copy_out(segment, segment.existing())
    segment.look_ahead(segment.existing())
    os.ftruncate(file, 2 * PAGES * PAGE_BYTES)
    write(file, PAGES + 1, b"y")
    assert segment.differing_still(segment.existing()) == pages(PAGES + 1)


def test_a_last_page_that_is_not_whole_is_copied_with_zeros_behind_it(segment: OpenSegment, file: int) -> None:
    os.ftruncate(file, 2 * PAGE_BYTES + 5)
    os.pwrite(file, b"ends!", 2 * PAGE_BYTES)
    copies = copy_out(segment, segment.existing())
    assert copies[2] == b"ends!".ljust(PAGE_BYTES, b"\0")
    segment.look_ahead(segment.existing())
    os.pwrite(file, b"Ends", 2 * PAGE_BYTES)
    assert pages(2) - segment.differing_still(segment.existing()) == EMPTY


def test_what_is_no_shared_memory_is_not_opened() -> None:
    mappings = parse_mappings(Path("/proc/self/maps").read_text())
    assert next(open_segment(os.getpid(), mapping) for mapping in mappings if mapping.permissions[3] == "p") is None
