"""Build ids out of bytes: real programs, hand-made ones, and hostile ones."""

import functools
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.linux.elf import MAX_SEGMENTS, Elf, read_elf

BUILD_ID = bytes(range(20))


def note(name: bytes = b"GNU\0", value: bytes = BUILD_ID, kind: int = 3) -> bytes:
    padding = b"\0" * (-len(name) % 4), b"\0" * (-len(value) % 4)
    return struct.pack("<III", len(name), len(value), kind) + name + padding[0] + value + padding[1]


def elf64(notes: bytes, *, segments: int = 1, offset: int = 120, length: int | None = None) -> bytes:
    head = b"\x7fELF" + bytes([2, 1, 1]) + b"\0" * 9 + struct.pack("<HHIQQQ", 3, 62, 1, 0, 64, 0)
    head += struct.pack("<IHHHHHH", 0, 64, 56, segments, 0, 0, 0)
    size = len(notes) if length is None else length
    return head + struct.pack("<IIQQQQQQ", 4, 4, offset, 0, 0, size, size, 4) + notes


def elf32(notes: bytes) -> bytes:
    head = b"\x7fELF" + bytes([1, 1, 1]) + b"\0" * 9 + struct.pack("<HHIIII", 3, 3, 1, 0, 52, 0)
    head += struct.pack("<IHHHHHH", 0, 52, 32, 1, 0, 0, 0)
    return head + struct.pack("<IIIIIIII", 4, 84, 0, 0, len(notes), len(notes), 4, 4) + notes


def read(data: bytes) -> Elf | None:
    return read_elf(lambda length, offset: data[offset : offset + length])


def test_a_program_of_this_machine_has_a_build_id() -> None:
    descriptor = os.open(os.path.realpath("/bin/sh"), os.O_RDONLY)
    try:
        found = read_elf(functools.partial(os.pread, descriptor))
    finally:
        os.close(descriptor)
    assert found is not None
    assert found.bits == struct.calcsize("P") * 8
    assert len(found.build_id) == 20


@pytest.mark.parametrize(("make", "bits"), [(elf64, 64), (elf32, 32)])
def test_both_classes_are_read(make: object, bits: int) -> None:
    assert callable(make)
    assert read(make(note())) == Elf(bits=bits, build_id=BUILD_ID)


def test_the_build_id_is_found_behind_other_notes() -> None:
    notes = note(b"Linux\0", b"\x01\x02\x03", 1) + note(kind=1) + note()
    assert read(elf64(notes)) == Elf(bits=64, build_id=BUILD_ID)


def test_a_program_without_one_is_still_a_program() -> None:
    assert read(elf64(note(b"Go\0\0", b"x" * 8, 4))) == Elf(bits=64, build_id=b"")


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF" + b"\x09" * 60])
def test_what_is_no_program_is_none(data: bytes) -> None:
    assert read(data) is None


def test_lengths_that_lie_do_no_harm() -> None:
    assert read(elf64(note(), length=1 << 60)) == Elf(bits=64, build_id=BUILD_ID)
    assert read(elf64(note(), offset=1 << 63)) == Elf(bits=64, build_id=b"")
    assert read(elf64(note(), segments=MAX_SEGMENTS + 1)) == Elf(bits=64, build_id=b"")
    assert read(elf64(note(value=b"x" * 65))) == Elf(bits=64, build_id=b"")
    assert read(elf64(struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 3))) == Elf(bits=64, build_id=b"")


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_it_fail(data: bytes) -> None:
    read(data)
    read(elf64(note())[:64] + data)
    read(elf64(data))
