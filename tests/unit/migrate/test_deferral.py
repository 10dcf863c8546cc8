from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.deferral import Deferral
from runtime.memory.ranges import PAGE_BYTES, PageRanges


def pages(*numbers: int) -> PageRanges:
    return PageRanges.from_spans((number * PAGE_BYTES, (number + 1) * PAGE_BYTES) for number in numbers)


def test_a_page_dirty_in_two_scans_running_is_hot() -> None:
    deferral: Deferral[int] = Deferral()
    assert deferral.scanned({1: pages(1, 2, 3)}).hot_bytes == 0
    split = deferral.scanned({1: pages(2, 3, 9)})
    assert split.hot[1] == pages(2, 3)
    assert split.to_send(defer_hot=True)[1] == pages(1, 9)


def test_what_was_kept_back_stays_pending_until_it_is_sent() -> None:
    deferral: Deferral[int] = Deferral()
    first = deferral.scanned({1: pages(1, 2)})
    deferral.sent(first.to_send(defer_hot=False))
    second = deferral.scanned({1: pages(2)})
    deferral.sent(second.to_send(defer_hot=True))
    third = deferral.scanned({1: pages(5)})
    assert third.pending[1] == pages(2, 5)
    # It has cooled, so it is sent now.
    assert third.to_send(defer_hot=True)[1] == pages(2, 5)


def test_pages_and_processes_that_are_gone_are_not_pending() -> None:
    deferral: Deferral[int] = Deferral()
    deferral.scanned({1: pages(1, 2), 2: pages(7)})
    split = deferral.scanned({1: pages(3)}, existing={1: pages(2, 3)})
    assert split.pending == {1: pages(2, 3)}
    assert split.pending_bytes == 2 * PAGE_BYTES


@settings(deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 12)), st.booleans()), min_size=1, max_size=12))
def test_the_target_lacks_exactly_what_is_pending(rounds: list[tuple[set[int], bool]]) -> None:
    deferral: Deferral[str] = Deferral()
    stale: set[int] = set()
    for dirty, defer_hot in rounds:
        stale |= dirty
        split = deferral.scanned({"p": pages(*dirty)})
        assert split.pending["p"] == pages(*stale)
        send = split.to_send(defer_hot=defer_hot)
        deferral.sent(send)
        stale = {page for page in stale if page * PAGE_BYTES not in send["p"]}
