"""Whatever a tree was, became and becomes while it is carried, the other side ends up with the same."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.tree import SentContent, Snapshot, compare, digest, scan
from runtime.tree_scan import TICK_SLACK_NS
from runtime.treesink import TreeSink
from tests.support.trees import FIRST_STEPS, carry, look, perform, send, steps

some_steps = st.lists(steps, max_size=12)
slow_is_fine = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@contextmanager
def two_places() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as base:
        source, target = Path(base, "source"), Path(base, "target")
        source.mkdir()
        target.mkdir()
        perform(source, *FIRST_STEPS)
        yield source, target


@slow_is_fine
@given(first=some_steps, second=some_steps, third=some_steps)
def test_three_passes_over_a_tree_that_changes_between_them_give_the_same_tree(
    first: list[Any], second: list[Any], third: list[Any]
) -> None:
    with two_places() as (source, target), TreeSink(target) as sink:
        sent, snapshot = SentContent(), None
        for steps_between in (first, second, third):
            perform(source, *steps_between)
            # Or every file would count as changed just now.
            time.sleep(TICK_SLACK_NS * 1.1e-9)
            snapshot, _changes, _bytes = carry(source, sink, snapshot, sent=sent)
            sink.finish()
            assert look(target) == look(source)
        assert digest(target) == digest(source)


@slow_is_fine
@given(first=some_steps, second=some_steps)
def test_without_memory_of_what_was_sent_the_second_pass_sends_changed_files_whole(
    first: list[Any], second: list[Any]
) -> None:
    with two_places() as (source, target), TreeSink(target) as sink:
        perform(source, *first)
        snapshot, _changes, _bytes = carry(source, sink)
        perform(source, *second)
        carry(source, sink, snapshot)
        sink.finish()
        assert look(target) == look(source)


@slow_is_fine
@given(first=some_steps, second=some_steps)
def test_passes_that_compare_every_file_by_its_content_give_the_same_tree(first: list[Any], second: list[Any]) -> None:
    with two_places() as (source, target), TreeSink(target) as sink:
        sent = SentContent()
        perform(source, *first)
        snapshot, _changes, _bytes = carry(source, sink, sent=sent)
        perform(source, *second)
        carry(source, sink, snapshot, sent=sent, always=lambda new: new.file_inodes())
        sink.finish()
        assert look(target) == look(source)


@slow_is_fine
@given(before=some_steps, meanwhile=some_steps)
def test_a_tree_that_changes_between_looking_and_reading_is_right_after_the_next_pass(
    before: list[Any], meanwhile: list[Any]
) -> None:
    with two_places() as (source, target), TreeSink(target) as sink:
        perform(source, *before)
        sent = SentContent()
        snapshot = scan_then(source, sink, sent, meanwhile)
        carry(source, sink, snapshot, sent=sent)
        sink.finish()
        assert look(target) == look(source)


def scan_then(source: Path, sink: TreeSink, sent: SentContent, meanwhile: list[Any]) -> Snapshot:
    snapshot = scan(source)
    changes = compare(None, snapshot)
    perform(source, *meanwhile)
    send(source, sink, changes, sent)
    return snapshot
