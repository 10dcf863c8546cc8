"""What is left to fill, against a plain map from page to page."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.memory.segments import Segment, Segments

PAGES = 40
span = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda ends: (min(ends), max(ends)))


def as_map(segments: Segments) -> dict[int, int]:
    return {page: segment.offset + page - segment.start for segment in segments for page in range(*segment[:2])}


@given(
    st.lists(st.one_of(st.tuples(st.just("cut"), span), st.tuples(st.just("move"), span, st.integers(0, PAGES)))),
)
def test_cutting_and_moving_leave_what_a_map_of_pages_says(steps: list[tuple]) -> None:
    segments = Segments([(0, 10), (10, 20), (25, PAGES)])
    model = {page: page for page in (*range(20), *range(25, PAGES))}
    for step in steps:
        start, end = step[1]
        if step[0] == "cut":
            segments.cut(start, end)
            model = {page: at for page, at in model.items() if not start <= page < end}
        else:
            to = step[2]
            moved = {page - start + to: at for page, at in model.items() if start <= page < end}
            segments.move(start, to, end - start)
            model = {page: at for page, at in model.items() if not start <= page < end}
            model = {page: at for page, at in model.items() if not to <= page < to + end - start} | moved
        assert as_map(segments) == model
        for page in range(PAGES * 2):
            found = segments.at(page)
            assert (found is not None) == (page in model)
        starts = [segment.start for segment in segments]
        assert starts == sorted(starts)


@given(span, span)
def test_the_first_segment_within_bounds_is_clipped_to_them(cut: tuple[int, int], bounds: tuple[int, int]) -> None:
    segments = Segments([(0, PAGES)])
    segments.cut(*cut)
    pages = [page for page in as_map(segments) if bounds[0] <= page < bounds[1]]
    found = segments.first(*bounds)
    assert (found.start if found else None) == (min(pages) if pages else None)
    if found:
        assert set(range(found.start, found.end)) <= set(pages)


def test_a_copy_goes_its_own_way() -> None:
    segments = Segments([(0, 10)])
    other = segments.copy()
    other.cut(0, 10)
    assert list(segments) == [Segment(0, 10, 0)]
    assert not other
