"""The store of received pages."""

import os
import struct

import pytest

from runtime.errors import CorruptData
from runtime.memory.digests import MemoryDigest
from runtime.memory.ranges import PageRanges
from runtime.memory.store import MAX_ADDRESS, Store

PAGE = 4096
HIGH = 0x7FFF_0000_0000


def test_a_page_is_read_back_from_its_own_address_and_what_is_not_there_is_zeros() -> None:
    with Store("test") as store:
        content = os.urandom(2 * PAGE)
        store.write(HIGH, content)
        buffer = bytearray(b"x" * 4 * PAGE)
        store.read_into(HIGH - PAGE, memoryview(buffer))
        assert buffer == bytes(PAGE) + content + bytes(PAGE)
        assert list(store.runs()) == [(HIGH, 2 * PAGE)]
        assert store.bytes == 2 * PAGE


def test_reserved_memory_is_in_the_store_when_the_block_ends_well_only() -> None:
    with Store("test") as store:
        with store.reserve(PAGE, PAGE) as view:
            view[:] = b"a" * PAGE
        with pytest.raises(ConnectionError), store.reserve(2 * PAGE, PAGE):
            raise ConnectionError
        assert list(store.runs()) == [(PAGE, PAGE)]


def test_a_later_write_replaces_and_a_punched_page_is_gone() -> None:
    with Store("test") as store:
        store.write(0, b"a" * 4 * PAGE)
        store.write(PAGE, b"b" * PAGE)
        store.punch([(0, PAGE), (3 * PAGE, PAGE)])
        assert list(store.runs()) == [(PAGE, 2 * PAGE)]
        assert list(store.runs(2 * PAGE, 3 * PAGE)) == [(2 * PAGE, PAGE)]
        assert store.bytes == 2 * PAGE


@pytest.mark.parametrize("address", [1, -PAGE, MAX_ADDRESS, 1 << 64])
def test_impossible_addresses_are_refused(address: int) -> None:
    with Store("test") as store, pytest.raises(CorruptData):
        store.write(address, bytes(PAGE))


def test_half_a_page_is_refused() -> None:
    with Store("test") as store, pytest.raises(CorruptData):
        store.write(0, bytes(100))


def test_digests_agree_whether_zeros_are_stored_or_not_and_however_memory_is_cut() -> None:
    content = os.urandom(PAGE) + bytes(PAGE) + os.urandom(2 * PAGE)
    with Store("with zeros") as one, Store("without") as other:
        one.write(HIGH, content)
        other.write(HIGH, content[:PAGE])
        other.write(HIGH + 2 * PAGE, content[2 * PAGE :])
        assert one.digest() == other.digest()
        digest = MemoryDigest()
        for page in range(4):
            digest.add(HIGH + page * PAGE, content[page * PAGE : (page + 1) * PAGE])
        assert digest.hexdigest() == one.digest()
        assert digest.pages == 3
        assert one.digest([(HIGH, 4 * PAGE)]) == one.digest()
        other.write(HIGH, struct.pack("<Q", 1) + content[8:PAGE])
        assert one.digest() != other.digest()
        assert one.digest([(HIGH + PAGE, 3 * PAGE)]) == other.digest([(HIGH + PAGE, 3 * PAGE)])


def test_what_is_not_to_be_kept_is_no_more() -> None:
    with Store("s") as store:
        for page in range(8):
            store.write(page * PAGE, bytes([page + 1]) * PAGE)
        store.write(1 << 46, b"x" * PAGE)
        store.keep_only(PageRanges.from_spans([(PAGE, 3 * PAGE), (6 * PAGE, 20 * PAGE)]))
        assert list(store.runs()) == [(PAGE, 2 * PAGE), (6 * PAGE, 2 * PAGE)]
        store.keep_only(PageRanges.from_spans([]))
        assert not store.bytes
