"""What a sparse file holds, asked once and again."""

import os
from collections.abc import Iterator

import pytest

from runtime.memory.sparse import KnownRuns, data_runs, first_pages

PAGE = 4096


@pytest.fixture
def file() -> Iterator[int]:
    """Pages 2, 3 and 6 of ten."""
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 10 * PAGE)
    for page in (2, 3, 6):
        os.pwrite(fd, b"x" * PAGE, page * PAGE)
    yield fd
    os.close(fd)


def test_runs_are_found_in_order_and_cut_to_what_was_asked(file: int) -> None:
    assert list(data_runs(file, 0, 10 * PAGE)) == [(2 * PAGE, 2 * PAGE), (6 * PAGE, PAGE)]
    assert list(data_runs(file, 3 * PAGE, 6 * PAGE)) == [(3 * PAGE, PAGE)]


def test_a_remembered_run_answers_as_the_file_did(file: int) -> None:
    runs = KnownRuns(file)
    for _ in range(2):
        assert runs.next(0, 10 * PAGE) == (2 * PAGE, 2 * PAGE)
        assert runs.next(3 * PAGE, 10 * PAGE) == (3 * PAGE, PAGE)
        assert runs.next(2 * PAGE, 3 * PAGE) == (2 * PAGE, PAGE)
        assert runs.next(4 * PAGE, 6 * PAGE) is None
        assert runs.next(7 * PAGE, 10 * PAGE) is None


def test_an_empty_stretch_has_no_run_even_within_a_remembered_one(file: int) -> None:
    runs = KnownRuns(file)
    assert runs.next(2 * PAGE, 4 * PAGE) == (2 * PAGE, 2 * PAGE)
    assert runs.next(3 * PAGE, 3 * PAGE) is None


def test_what_comes_later_is_found_although_its_neighbour_was_remembered(file: int) -> None:
    runs = KnownRuns(file)
    assert runs.next(2 * PAGE, 10 * PAGE) == (2 * PAGE, 2 * PAGE)
    os.pwrite(file, b"y" * PAGE, 4 * PAGE)
    assert runs.next(4 * PAGE, 10 * PAGE) == (4 * PAGE, PAGE)


def test_page_by_page_the_same_is_found(file: int) -> None:
    for start in range(10):
        for end in range(start, 13):
            wanted = KnownRuns(file).next(start * PAGE, end * PAGE)
            assert first_pages(file, start * PAGE, end * PAGE, PAGE) == wanted
