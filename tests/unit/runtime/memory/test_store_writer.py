"""Writing into stores beside receiving: order, errors, the end."""

from __future__ import annotations

import os

import pytest

from runtime.errors import CorruptData
from runtime.memory.store import PAGE_BYTES, Store
from runtime.memory.store_writer import BUFFERS, StoreWriter

BASE = 0x7F0000000000


def put(
    writer: StoreWriter, store: Store, address: int, content: bytes, zeros: tuple[tuple[int, int], ...] = ()
) -> None:
    with writer.receiving(store, [(address, len(content))] if content else [], zeros) as view:
        view[:] = content


def read(store: Store, address: int, length: int) -> bytes:
    found = bytearray(length)
    store.read_into(address, memoryview(found))
    return bytes(found)


def test_what_was_received_is_in_the_store_when_it_is_finished() -> None:
    contents = [os.urandom(PAGE_BYTES * pages) for pages in (1, 3, 7, 2, 5, 1)]
    writer = StoreWriter()
    with Store("one") as store:
        for index, content in enumerate(contents):
            put(writer, store, BASE + index * 16 * PAGE_BYTES, content)
        writer.finish()
        for index, content in enumerate(contents):
            assert read(store, BASE + index * 16 * PAGE_BYTES, len(content)) == content


def test_the_newest_of_many_versions_stays() -> None:
    writer = StoreWriter()
    with Store("one") as store:
        for version in range(200):
            put(writer, store, BASE, bytes([version]) * PAGE_BYTES)
        writer.finish()
        assert read(store, BASE, PAGE_BYTES) == bytes([199]) * PAGE_BYTES


def test_zeros_come_after_what_was_there_and_before_what_follows() -> None:
    writer = StoreWriter()
    with Store("one") as store:
        put(writer, store, BASE, b"a" * 2 * PAGE_BYTES)
        put(writer, store, 0, b"", ((BASE, 2 * PAGE_BYTES),))
        put(writer, store, BASE + PAGE_BYTES, b"b" * PAGE_BYTES)
        writer.finish()
        assert list(store.runs()) == [(BASE + PAGE_BYTES, PAGE_BYTES)]


def test_runs_of_one_message_go_to_their_places() -> None:
    writer = StoreWriter()
    spans = [(BASE, PAGE_BYTES), (BASE + 9 * PAGE_BYTES, 2 * PAGE_BYTES)]
    content = os.urandom(3 * PAGE_BYTES)
    with Store("one") as store:
        with writer.receiving(store, spans, []) as view:
            view[:] = content
        writer.finish()
        assert list(store.runs()) == spans
        assert read(store, *spans[1]) == content[PAGE_BYTES:]


def test_a_failed_write_is_raised_by_later_calls_and_nothing_is_written_after_it() -> None:
    writer = StoreWriter()
    with Store("one") as store:
        put(writer, store, BASE + 1, b"x" * PAGE_BYTES)
        with pytest.raises(CorruptData, match="whole pages"):
            writer.finish()
        with pytest.raises(CorruptData, match="whole pages"):
            put(writer, store, BASE, b"y" * PAGE_BYTES)
        assert not list(store.runs())
        writer.close()


def test_what_was_not_received_whole_is_not_written_and_costs_no_buffer() -> None:
    writer = StoreWriter()
    with Store("one") as store:
        for _ in range(2 * BUFFERS):
            with pytest.raises(ConnectionError), writer.receiving(store, [(BASE, PAGE_BYTES)], []):
                raise ConnectionError
        put(writer, store, BASE + PAGE_BYTES, b"z" * PAGE_BYTES)
        writer.finish()
        assert list(store.runs()) == [(BASE + PAGE_BYTES, PAGE_BYTES)]


def test_closing_twice_or_without_a_write_is_fine() -> None:
    writer = StoreWriter()
    writer.close()
    writer.finish()
    writer.close()
