"""Both sides agree on what is missing, whatever got lost on the way: nothing is left out, and nothing comes twice."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import ProtocolViolation
from migrate.missing import MISSING, MissingMemory, hear_missing
from migrate.outgoing import RUNS_PER_MESSAGE
from runtime.memory.ranges import PAGE_BYTES, PageRanges

PAGES = 64
TASKS = (1, 7)


def pages_of(numbers: set[int]) -> PageRanges:
    return PageRanges.from_spans((page * PAGE_BYTES, (page + 1) * PAGE_BYTES) for page in numbers)


def heard(book: MissingMemory, kept: dict[int, PageRanges]) -> dict[int, PageRanges]:
    messages = book.messages()
    found = hear_missing(lambda: next(messages), book.bytes, kept)
    assert next(messages, None) is None
    return found


def numbers_of(ranges: PageRanges) -> set[int]:
    return {start // PAGE_BYTES + page for start, end in ranges.spans() for page in range((end - start) // PAGE_BYTES)}


@given(
    remote=st.fixed_dictionaries({task: st.sets(st.integers(0, PAGES - 1)) for task in TASKS}),
    arrive=st.lists(st.integers(0, 40), max_size=6),
    seed=st.integers(0, 1 << 32),
)
def test_after_any_number_of_broken_links_every_page_has_come_and_is_taken_once(
    remote: dict[int, set[int]], arrive: list[int], seed: int
) -> None:
    """Of what is sent on each link only the first so many pages arrive; some of them have come before."""
    chance = random.Random(seed)
    kept = {task: pages_of(numbers) for task, numbers in remote.items()}
    book = MissingMemory(kept)
    taken: list[tuple[int, int]] = []
    left = kept
    for count in (*arrive, 2 * PAGES):
        sent = [(task, page) for task, ranges in left.items() for page in numbers_of(ranges)]
        chance.shuffle(sent)
        for task, page in sent[:count] + chance.sample(taken, min(3, len(taken))):
            span = (page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
            book.must_be_expected(task, [span])
            taken += [(task, start // PAGE_BYTES) for start, _end in book.come(task, *span)]
            assert not book.lacks(task, span[0])
        left = heard(book, kept)
        come = {task: {page for its, page in taken if its == task} for task in TASKS}
        assert {task: numbers_of(left[task]) for task in left} == {
            task: remote[task] - come[task] for task in TASKS if remote[task] - come[task]
        }
    assert sorted(taken) == sorted((task, page) for task, numbers in remote.items() for page in numbers)
    assert book.bytes == 0


def test_what_was_not_kept_back_may_not_come() -> None:
    book = MissingMemory({7: pages_of({1, 2, 4})})
    book.must_be_expected(7, [(PAGE_BYTES, 3 * PAGE_BYTES)])
    for pid, span in ((7, (PAGE_BYTES, 4 * PAGE_BYTES)), (7, (0, PAGE_BYTES)), (8, (PAGE_BYTES, 2 * PAGE_BYTES))):
        with pytest.raises(ProtocolViolation, match="not kept back"):
            book.must_be_expected(pid, [span])


def test_much_that_is_missing_is_told_in_messages_that_fit() -> None:
    kept = {7: pages_of({2 * number for number in range(RUNS_PER_MESSAGE + 5)})}
    book = MissingMemory(kept)
    assert [len(message["runs"]) // 2 for message in book.messages()] == [RUNS_PER_MESSAGE, 5]
    assert heard(book, kept) == kept


def told(*runs: int, pid: int = 7, kind: str = MISSING) -> dict[str, Any]:
    return {"type": kind, "id": pid, "runs": list(runs)}


@pytest.mark.parametrize(
    ("messages", "total_pages"),
    [
        ([told(PAGE_BYTES, 1, kind="want")], 1),  # something else
        ([told(0, 1)], 1),  # not kept back
        ([told(PAGE_BYTES, 1, pid=8)], 1),  # of another task
        ([told(PAGE_BYTES, 2)], 1),  # more than was said
        ([told()], 1),  # nothing at all
        ([told(PAGE_BYTES, 0)], 1),
        ([told(PAGE_BYTES, 1), told(PAGE_BYTES, 1)], 2),  # twice
        ([told(PAGE_BYTES + 1, 1)], 1),  # no page
        ([told(-PAGE_BYTES, 1)], 1),
        ([told(PAGE_BYTES, 2**56)], 2**56),  # more than there is
        ([{"type": MISSING}], 1),
    ],
)
def test_a_target_that_lacks_what_can_not_be_missing_is_not_believed(
    messages: list[dict[str, Any]], total_pages: int
) -> None:
    coming = iter(messages)
    with pytest.raises(ProtocolViolation):
        hear_missing(lambda: next(coming), total_pages * PAGE_BYTES, {7: pages_of({1, 2})})
