"""Where a mapping has no pages: what is to be cleared of marks before a dump."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.memory.maps import Kind, Mapping
from runtime.memory.ranges import PAGE_BYTES, PageRanges
from runtime.memory.watched import gaps


def mapping(start: int, end: int) -> Mapping:
    return Mapping(start * PAGE_BYTES, end * PAGE_BYTES, "rw-p", 0, "00:00", 0, "", Kind.ANONYMOUS)


def held(*spans: tuple[int, int]) -> PageRanges:
    return PageRanges.from_spans((start * PAGE_BYTES, end * PAGE_BYTES) for start, end in spans)


def in_pages(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start // PAGE_BYTES, end // PAGE_BYTES) for start, end in spans]


def test_a_full_mapping_has_none_and_an_empty_one_is_one() -> None:
    assert gaps(mapping(10, 20), held((10, 20))) == []
    assert in_pages(gaps(mapping(10, 20), held())) == [(10, 20)]


def test_pages_of_neighbours_do_not_count() -> None:
    assert in_pages(gaps(mapping(100, 400), held((0, 100), (400, 500)))) == [(100, 400)]
    assert in_pages(gaps(mapping(100, 400), held((0, 200), (300, 500)))) == [(200, 300)]
    assert gaps(mapping(100, 400), held((0, 500))) == []


def test_a_few_pages_between_two_gaps_belong_to_the_gap() -> None:
    assert in_pages(gaps(mapping(0, 1000), held((100, 110), (500, 600)))) == [(0, 500), (600, 1000)]


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 200)), max_size=10), st.integers(0, 400))
def test_every_page_that_does_not_exist_is_in_a_gap(pages: list[tuple[int, int]], start: int) -> None:
    existing = held(*((first, first + count) for first, count in pages))
    where = mapping(start, start + 500)
    found = PageRanges.from_spans(gaps(where, existing))
    inside = PageRanges.from_spans([(where.start, where.end)])
    assert not (inside - existing) - found
    assert not found - inside
