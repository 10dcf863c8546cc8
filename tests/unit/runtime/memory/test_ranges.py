"""Sets of pages as ranges, against sets of page numbers."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from runtime.memory.ranges import EMPTY, PAGE_BYTES, PageRange, PageRanges

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), max_size=12)


def made(spans: list[tuple[int, int]]) -> tuple[PageRanges, set[int]]:
    """From (first page, pages), the ranges and the same as a set."""
    ranges = PageRanges.from_spans((first * PAGE_BYTES, (first + pages) * PAGE_BYTES) for first, pages in spans)
    return ranges, {first + index for first, pages in spans for index in range(pages)}


def pages_of(ranges: PageRanges) -> set[int]:
    return {address // PAGE_BYTES + index for address, pages in ranges for index in range(pages)}


@given(SPANS)
def test_ranges_are_sorted_and_neither_overlap_nor_touch(spans: list[tuple[int, int]]) -> None:
    ranges, expected = made(spans)
    assert pages_of(ranges) == expected
    assert (ranges.pages, ranges.bytes, bool(ranges)) == (len(expected), len(expected) * PAGE_BYTES, bool(expected))
    listed = ranges.spans()
    assert all(start < end for start, end in listed)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(listed))


@given(SPANS, SPANS)
def test_they_behave_like_sets(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    (one, one_set), (two, two_set) = made(first), made(second)
    assert pages_of(one | two) == one_set | two_set
    assert pages_of(one & two) == one_set & two_set
    assert pages_of(one - two) == one_set - two_set
    assert (one == two) == (one_set == two_set)
    assert ((one | two) - two) | (one & two) == one


@given(SPANS, st.integers(0, 50))
def test_a_byte_is_in_the_page_that_holds_it(spans: list[tuple[int, int]], page: int) -> None:
    ranges, expected = made(spans)
    assert (page * PAGE_BYTES in ranges) == (page in expected)
    assert (page * PAGE_BYTES + PAGE_BYTES - 1 in ranges) == (page in expected)


def test_addresses_at_the_top_of_the_address_space_are_kept() -> None:
    top = (1 << 64) - PAGE_BYTES
    ranges = PageRanges.from_spans([(top - PAGE_BYTES, top)])
    assert list(ranges) == [PageRange(top - PAGE_BYTES, 1)]


def test_nothing_is_nothing() -> None:
    assert PageRanges.from_spans([]) == EMPTY == PageRanges.from_spans([(4096, 4096)])
    assert (len(EMPTY), EMPTY.pages, 0 in EMPTY) == (0, 0, False)
    assert repr(PageRanges.from_spans([(4096, 8192)])) == "PageRanges(1000-2000)"
