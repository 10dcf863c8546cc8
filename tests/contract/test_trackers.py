"""What every tracker promises: copies that follow its scans are equal to the memory, whatever a process does to it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.memory.api import DirtyTracker
from runtime.memory.ranges import PageRanges
from runtime.memory.tracker import make_tracker, probe_trackers
from runtime.memory.tracker_hash import HashTracker
from runtime.memory.tracker_uffd import UffdTracker
from tests.support.mapper import Copies, Mapper, private_mappings, running_mapper

pytestmark = pytest.mark.root

MAKERS: dict[str, Callable[[], DirtyTracker]] = {
    "uffd-wp": UffdTracker,
    "hash": HashTracker,
    "hash by pagemap entries": lambda: HashTracker(use_pagemap_scan=False),
}
EXAMPLES = {"uffd-wp": 40, "hash": 10, "hash by pagemap entries": 10}


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "uffd-wp" and (reason := probe_trackers()["uffd-wp"]):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def tracker(name: str) -> Iterator[DirtyTracker]:
    made = MAKERS[name]()
    yield made
    made.close()


@pytest.fixture
def mapper() -> Iterator[Mapper]:
    with running_mapper() as started:
        yield started


def test_the_first_scan_reports_all_that_exists_and_the_next_nothing(tracker: DirtyTracker, mapper: Mapper) -> None:
    copies = Copies(tracker)
    tracker.arm(mapper.pids)
    (first,) = copies.follow(mapper.pids).processes
    assert first.to_copy == first.existing
    assert first.existing.pages > 100
    (second,) = copies.follow(mapper.pids).processes
    assert (second.to_copy.pages, second.reason) == (0, "")
    assert second.existing == first.existing
    copies.check(mapper.pids)


@pytest.mark.parametrize("how", ["instruction", "read", "thread"])
def test_exactly_the_written_pages_are_dirty(tracker: DirtyTracker, mapper: Mapper, how: str) -> None:
    copies = Copies(tracker)
    assert mapper.order("map", area=1, pages=64, kind="anon")
    assert mapper.order("write", area=1, page=0, count=64, value=1, how=how)
    tracker.arm(mapper.pids)
    copies.follow(mapper.pids)
    start = _area(mapper, pages=64)
    mapper.order("look", area=1, page=0, count=64)
    assert mapper.order("write", area=1, page=3, count=2, value=9, how=how)
    (found,) = copies.follow(mapper.pids).processes
    assert _pages_in_area(found.to_copy, start, 64) == {3, 4}
    copies.check(mapper.pids)


def _followed_area(tracker: DirtyTracker, mapper: Mapper) -> tuple[Copies, int]:
    """Copies that know an area of 64 written pages, and its address."""
    copies = Copies(tracker)
    mapper.order("map", area=1, pages=64, kind="anon")
    mapper.order("write", area=1, page=0, count=64, value=1, how="instruction")
    tracker.arm(mapper.pids)
    copies.follow(mapper.pids)
    return copies, _area(mapper, pages=64)


def _area(mapper: Mapper, *, pages: int) -> int:
    """The address of the only area of that size."""
    (start,) = [start for start, end, _file in private_mappings(mapper.pids[0]) if end - start == pages * 4096]
    return start


def _pages_in_area(ranges: PageRanges, start: int, pages: int) -> set[int]:
    """Numbers of the area's pages. (Python's own memory changes too, all the time.)"""
    found = {(address - start) // 4096 + page for address, count in ranges for page in range(count)}
    return found & set(range(pages))


def test_a_forked_child_is_untracked_memory_at_first_and_tracked_then(tracker: DirtyTracker, mapper: Mapper) -> None:
    copies, start = _followed_area(tracker, mapper)
    mapper.order("fork")
    child = mapper.pids[1]
    found = {process.pid: process for process in copies.follow(mapper.pids).processes}
    assert found[child].to_copy == found[child].existing
    mapper.order("write", to=1, area=1, page=5, count=1, value=2, how="instruction")
    found = {process.pid: process for process in copies.follow(mapper.pids).processes}
    assert _pages_in_area(found[child].to_copy, start, 64) == {5}
    copies.check(mapper.pids)


def test_a_process_that_has_ended_is_named(tracker: DirtyTracker, mapper: Mapper) -> None:
    copies = Copies(tracker)
    mapper.order("fork")
    child = mapper.pids[1]
    copies.follow(mapper.pids)
    mapper.order("exit", child=1)
    assert copies.follow([*mapper.pids, child]).gone == (child,)


def test_another_program_in_the_same_process_is_new_memory(tracker: DirtyTracker, mapper: Mapper) -> None:
    copies = Copies(tracker)
    tracker.arm(mapper.pids)
    copies.follow(mapper.pids)
    mapper.order("exec")
    copies.follow(mapper.pids)
    copies.check(mapper.pids)
    (found,) = copies.follow(mapper.pids).processes
    assert found.to_copy.pages == 0


def test_a_mapping_that_took_the_place_of_an_equal_one_is_not_taken_for_it(
    tracker: DirtyTracker, mapper: Mapper
) -> None:
    copies = Copies(tracker)
    mapper.order("map", area=1, pages=32, kind="anon")
    mapper.order("write", area=1, page=0, count=32, value=1, how="instruction")
    tracker.arm(mapper.pids)
    copies.follow(mapper.pids)
    mapper.order("remap_there", area=1, page=0, count=32)
    mapper.order("write", area=1, page=7, count=1, value=2, how="instruction")
    copies.follow(mapper.pids)
    copies.check(mapper.pids)


def test_a_whole_huge_page_that_was_dropped_is_forgotten(tracker: DirtyTracker, mapper: Mapper) -> None:
    copies = Copies(tracker)
    mapper.order("map", area=1, pages=1024, kind="huge")
    mapper.order("write", area=1, page=0, count=1024, value=1, how="instruction")
    mapper.order("advise", area=1, page=0, count=1024, advice="collapse")
    tracker.arm(mapper.pids)
    copies.follow(mapper.pids)
    copies.check(mapper.pids)
    assert mapper.order("advise", area=1, page=0, count=512, advice="dontneed")
    (found,) = copies.follow(mapper.pids).processes
    start = _area(mapper, pages=1024)
    assert start not in found.existing
    assert start + 512 * 4096 in found.existing
    copies.check(mapper.pids)


def test_the_last_scan_changes_nothing_and_closing_twice_is_no_error(tracker: DirtyTracker, mapper: Mapper) -> None:
    copies = Copies(tracker)
    tracker.arm(mapper.pids)
    copies.follow(mapper.pids)
    mapper.order("map", area=1, pages=8, kind="anon")
    mapper.order("write", area=1, page=0, count=8, value=1, how="instruction")
    copies.follow(mapper.pids, final=True)
    copies.check(mapper.pids)
    facts = tracker.facts()
    assert (facts.armed, facts.untracked) == (1, {})
    tracker.close()
    tracker.close()
    assert tracker.facts() == facts
    assert mapper.order("write", area=1, page=0, count=8, value=2, how="instruction")


def test_a_process_that_does_not_exist_is_left_out(tracker: DirtyTracker) -> None:
    tracker.arm([2**22 + 1])
    assert tracker.scan([2**22 + 1]).processes == ()


def test_what_a_glance_finds_the_last_scan_reports_only_when_it_was_written_again(
    tracker: DirtyTracker, mapper: Mapper
) -> None:
    copies, start = _followed_area(tracker, mapper)
    mapper.order("write", area=1, page=5, count=3, value=2, how="instruction")
    found = tracker.glance(mapper.pids)[mapper.pids[0]]
    assert _pages_in_area(found, start, 64) == {5, 6, 7}
    mapper.order("write", area=1, page=9, count=1, value=3, how="instruction")
    copies.glance(mapper.pids)
    mapper.order("write", area=1, page=9, count=2, value=4, how="instruction")
    (last,) = copies.follow(mapper.pids, final=True).processes
    assert _pages_in_area(last.to_copy, start, 64) - {5, 6, 7} == {9, 10}


# Shared memory


@pytest.fixture(params=["uffd-wp", "hash"])
def sharing_tracker(request: pytest.FixtureRequest) -> Iterator[DirtyTracker]:
    if reason := probe_trackers()[request.param]:
        pytest.skip(reason)
    made = make_tracker(request.param, shared=True)
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "sysv"])
def test_shared_memory_is_found_once_and_only_what_changed_is_dirty(
    sharing_tracker: DirtyTracker, mapper: Mapper, kind: str
) -> None:
    copies = Copies(sharing_tracker)
    assert mapper.order("share", area=1, pages=64, kind=kind)
    mapper.order("write", area=1, page=8, count=40, value=1, how="instruction")
    mapper.order("fork")
    sharing_tracker.arm(mapper.pids)
    (first,) = copies.follow(mapper.pids).segments
    assert first.existing.spans() == [(8 * 4096, 48 * 4096)]
    assert first.dirty == first.existing
    mapper.order("write", to=1, area=1, page=10, count=2, value=2, how="instruction")
    (second,) = copies.follow(mapper.pids).segments
    assert second.dirty.spans() == [(10 * 4096, 12 * 4096)]
    (third,) = copies.follow(mapper.pids).segments
    assert not third.dirty
    assert [copies.check_shared(pid) for pid in mapper.pids] == [1, 1]


def test_writes_that_page_tables_do_not_show_are_found_in_shared_memory(
    sharing_tracker: DirtyTracker, mapper: Mapper
) -> None:
    copies = Copies(sharing_tracker)
    mapper.order("share", area=1, pages=64, kind="memfd")
    mapper.order("write", area=1, page=0, count=64, value=1, how="instruction")
    sharing_tracker.arm(mapper.pids)
    copies.follow(mapper.pids)
    assert mapper.order("write_file", area=1, page=3, value=7)
    assert mapper.order("write_by_short_lived_child", area=1, page=20, value=7)
    assert mapper.order("punch", area=1, page=40, count=4)
    (found,) = copies.follow(mapper.pids, final=True).segments
    assert found.dirty.spans() == [(3 * 4096, 4 * 4096), (20 * 4096, 21 * 4096)]
    assert found.existing.spans() == [(0, 40 * 4096), (44 * 4096, 64 * 4096)]
    assert copies.check_shared(mapper.pids[0]) == 1


# Random histories

AREAS = st.integers(1, 5)
PAGES = st.integers(0, 40)
COUNTS = st.integers(1, 24)
# Around the border of two huge pages too.
HUGE_PAGES = st.sampled_from([0, 1, 500, 510, 511, 512, 513, 800, 1023])
HUGE_COUNTS = st.sampled_from([1, 3, 24, 512, 600, 1024])
ANY_PAGE = st.one_of(PAGES, HUGE_PAGES)
ANY_COUNT = st.one_of(COUNTS, HUGE_COUNTS)


def order(op: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"op": st.just(op), "to": st.sampled_from([0, 0, 0, 1, 2]), **arguments})


WRITE = order(
    "write",
    area=AREAS,
    page=ANY_PAGE,
    count=ANY_COUNT,
    value=st.integers(0, 255),
    how=st.sampled_from(["instruction", "read", "thread"]),
)
MAP_SMALL = order("map", area=AREAS, pages=COUNTS, kind=st.sampled_from(["anon", "file", "reserved"]))
MAP_HUGE = order("map", area=AREAS, pages=st.sampled_from([512, 1024, 1030]), kind=st.just("huge"))
ORDERS = st.one_of(
    WRITE,
    WRITE,
    MAP_SMALL,
    MAP_HUGE,
    order("unmap", area=AREAS, page=ANY_PAGE, count=ANY_COUNT),
    order("remap_there", area=AREAS, page=ANY_PAGE, count=COUNTS),
    order("look", area=AREAS, page=ANY_PAGE, count=ANY_COUNT),
    order(
        "resize",
        area=AREAS,
        pages=st.sampled_from([1, 8, 40, 600, 1024]),
        how=st.sampled_from(["place", "maymove", "move", "dontunmap"]),
    ),
    order(
        "advise",
        area=AREAS,
        page=ANY_PAGE,
        count=ANY_COUNT,
        advice=st.sampled_from(["dontneed", "free", "hugepage", "nohugepage", "collapse", "guard", "unguard"]),
    ),
    order("protect", area=AREAS, page=ANY_PAGE, count=ANY_COUNT, protection=st.sampled_from([0, 1, 3])),
    order("grow_heap", pages=st.integers(1, 8), value=st.integers(1, 255)),
    st.just({"op": "fork"}),
    order("exit", child=st.integers(1, 3)),
    st.just({"op": "exec"}),
)
SCAN = st.just({"op": "scan"})
GLANCE = st.just({"op": "glance"})
# Three areas to begin with, so that most orders find something.
BEGIN: list[dict[str, Any]] = [
    {"op": "map", "area": 1, "pages": 40, "kind": "anon"},
    {"op": "map", "area": 2, "pages": 40, "kind": "file"},
    {"op": "map", "area": 3, "pages": 1024, "kind": "huge"},
    {"op": "write", "area": 1, "page": 0, "count": 30, "value": 1, "how": "instruction"},
    {"op": "write", "area": 2, "page": 0, "count": 20, "value": 1, "how": "read"},
    {"op": "write", "area": 3, "page": 0, "count": 600, "value": 1, "how": "instruction"},
]


def test_copies_that_follow_the_scans_equal_memory_after_any_history(name: str) -> None:
    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.one_of(ORDERS, ORDERS, SCAN, GLANCE), min_size=5, max_size=40))
    def follow(history: list[dict[str, Any]]) -> None:
        tracker = MAKERS[name]()
        try:
            with running_mapper() as mapper:
                _follow_history(tracker, mapper, history)
        finally:
            tracker.close()

    follow()


def _follow_history(tracker: DirtyTracker, mapper: Mapper, history: list[dict[str, Any]]) -> None:
    copies = Copies(tracker)
    for each in BEGIN:
        mapper.order(**each)
    tracker.arm(mapper.pids)
    begin: dict[str, Any] = {"op": "scan"}
    for each in [begin, *history]:
        if each["op"] == "scan":
            copies.follow(mapper.pids)
            copies.check(mapper.pids)
        elif each["op"] == "glance":
            copies.glance(mapper.pids)
        else:
            mapper.order(**each)
    copies.follow(mapper.pids, final=True)
    copies.check(mapper.pids)
