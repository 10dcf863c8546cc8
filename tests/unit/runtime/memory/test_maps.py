"""Parsers of maps and smaps, on a text captured from a process that holds every kind of mapping."""

from pathlib import Path

import pytest

from runtime.memory.maps import Kind, Mapping, kind_of, parse_details, parse_mappings

SMAPS = (Path(__file__).resolve().parents[3] / "data" / "proc" / "smaps.txt").read_text()
MAPPINGS = parse_mappings(SMAPS)


def named(name: str) -> list[Mapping]:
    return [mapping for mapping in MAPPINGS if mapping.name == name]


def test_a_line_gives_addresses_permissions_and_what_is_mapped() -> None:
    found = named("/usr/lib/x86_64-linux-gnu/libc.so.6")
    assert [each.permissions for each in found] == ["r--p", "r-xp", "r--p", "r--p", "rw-p"]
    second = found[1]
    assert (second.start, second.end, second.offset) == (0x7F2A89C44000, 0x7F2A89D9A000, 0x26000)
    assert (second.device, second.inode, second.writable, found[4].writable) == ("fe:00", 339380, False, True)


def test_only_the_heads_of_smaps_are_mappings_and_all_of_them() -> None:
    assert len(MAPPINGS) == len(parse_details(SMAPS)) == SMAPS.count("VmFlags:")
    assert sorted(MAPPINGS) == MAPPINGS


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("[heap]", [Kind.ANONYMOUS]),
        ("[stack]", [Kind.ANONYMOUS]),
        ("[vdso]", [Kind.SPECIAL]),
        ("[vvar]", [Kind.SPECIAL]),
        ("[vvar_vclock]", [Kind.SPECIAL]),
        ("[vsyscall]", [Kind.SPECIAL]),
        ("/[aio] (deleted)", [Kind.SPECIAL]),
        ("/dev/zero (deleted)", [Kind.SHARED_MEMORY, Kind.SHARED_MEMORY]),
        ("/dev/zero", [Kind.ANONYMOUS]),
        ("/SYSV00000000 (deleted)", [Kind.SHARED_MEMORY]),
        ("/memfd:ring buffer (deleted)", [Kind.PRIVATE_FILE, Kind.SHARED_MEMORY]),
        ("/tmp/odd\\012name with blanks (deleted)", [Kind.SHARED_FILE, Kind.PRIVATE_FILE]),
        ("/dev/shm/k_seg (deleted)", [Kind.SHARED_FILE]),
    ],
)
def test_the_kind_of_a_mapping_follows_from_its_name_and_whether_it_is_shared(name: str, kinds: list[Kind]) -> None:
    assert [mapping.kind for mapping in named(name)] == kinds


@pytest.mark.parametrize(
    ("permissions", "inode", "name", "kind"),
    [
        ("rw-p", 0, "[anon:arena: x]", Kind.ANONYMOUS),
        ("rw-s", 9, "[anon_shmem:buffers]", Kind.SHARED_MEMORY),
        ("rw-p", 7, "/anon_hugepage (deleted)", Kind.SPECIAL),
        ("rw-s", 7, "/dev/dri/card0", Kind.SPECIAL),
        ("rw-s", 7, "anon_inode:[perf_event]", Kind.SPECIAL),
        ("rw-s", 7, "socket:[1234]", Kind.SPECIAL),
        ("rw-p", 7, "/devices.db", Kind.PRIVATE_FILE),
    ],
)
def test_kinds_that_were_not_captured(permissions: str, inode: int, name: str, kind: Kind) -> None:
    assert kind_of(permissions, inode, name) == kind


def test_details_are_in_bytes_and_flags_are_named() -> None:
    details = {each.mapping.name: each for each in parse_details(SMAPS)}
    assert details["[stack]"].resident_bytes == 32 << 10
    assert details["[vvar]"].device_memory
    assert not details["[stack]"].device_memory
    (locked,) = [each for each in parse_details(SMAPS) if each.locked]
    assert locked.mapping.end - locked.mapping.start == 4096
    assert not any(each.watched or each.hugetlb for each in details.values())
    assert {each.swapped_bytes for each in details.values()} == {0}


def test_what_does_not_fit_is_left_out() -> None:
    assert parse_mappings("") == []
    assert parse_mappings("7fff-zz rw-p 0 0:0 0\nnonsense\n") == []
