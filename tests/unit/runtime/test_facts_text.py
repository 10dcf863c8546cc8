"""Parsers of /proc, on texts captured from a container."""

from pathlib import Path

import pytest

from runtime.linux.procfs import (
    TCP_LISTEN,
    mount_of,
    parse_bound_ports,
    parse_capabilities,
    parse_cpu_flags,
    parse_maps,
    parse_meminfo,
    parse_memory_stat,
    parse_mount_id,
    parse_mounts,
    parse_status,
)

DATA = Path(__file__).resolve().parents[2] / "data" / "proc"


def text(name: str) -> str:
    return (DATA / name).read_text()


def test_a_status_gives_the_pid_inside_and_memory_in_bytes() -> None:
    status = parse_status(text("status.txt"))
    assert (status.name, status.pid, status.parent_pid, status.uid, status.threads) == ("python3.11", 2, 14, 999, 3)
    assert (status.anonymous_bytes, status.shared_bytes) == (4216 << 10, 4 << 10)
    assert (status.swap_bytes, status.hugetlb_bytes, status.tracer_pid) == (12 << 10, 2 << 20, 0)


def test_a_zombie_has_no_memory_lines() -> None:
    lines = [line for line in text("status.txt").splitlines() if not line.startswith(("Vm", "Rss", "Huge"))]
    assert parse_status("\n".join(lines)).anonymous_bytes == 0


def test_a_name_of_many_words_does_not_disturb_a_status() -> None:
    assert parse_status(text("status.txt").replace("python3.11", "a:\\tb (c)")).name == "a:\\tb (c)"


def test_what_is_no_status_is_an_error() -> None:
    with pytest.raises((KeyError, ValueError)):
        parse_status("nothing")


def test_maps_give_what_has_an_inode_with_spans_as_map_files_has_them() -> None:
    mappings = parse_maps(text("maps.txt"))
    assert [mapping.path for mapping in mappings] == [
        "/usr/bin/python3.11",
        "/usr/bin/python3.11",
        "/memfd:x y (deleted)",
        "/d (deleted)",
        "/dev/shm/s",
        "/usr/lib/x86_64-linux-gnu/libc.so.6",
        "/dev/zero (deleted)",
        "anon_inode:[io_uring]",
    ]
    assert mappings[0].span == "400000-41f000"
    assert (mappings[1].permissions, mappings[1].inode, mappings[1].device) == ("r-xp", 260811, "00:53")


def test_a_newline_in_a_mapped_name_comes_back() -> None:
    (mapping,) = parse_maps("00400000-0041f000 r--p 00000000 00:53 26  /a\\012b\n")
    assert mapping.path == "/a\nb"


def test_the_mount_of_a_path_is_the_longest_above_it() -> None:
    mounts = parse_mounts(text("mountinfo.txt"))
    points = {path: mount.point for path in PATHS if (mount := mount_of(path, mounts))}
    assert points == PATHS


PATHS = {
    "/usr/bin/x": "/",
    "/dev/null": "/dev",
    "/dev/shm/s": "/dev/shm",
    "/dev/shmem": "/dev",
    "/mnt/my data/f": "/mnt/my data",
    "/proc/sys/net": "/proc/sys",
    "/proc/keys": "/proc/keys",
    "/": "/",
}


def test_of_two_mounts_at_one_point_the_upper_one_counts() -> None:
    mounts = parse_mounts("1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / / rw - tmpfs b rw\n")
    assert mount_of("/x", mounts) == mounts[1]


def test_no_mount_no_answer() -> None:
    assert mount_of("/x", []) is None
    assert parse_mounts("garbage\n") == []


def test_the_mount_id_of_a_descriptor() -> None:
    assert parse_mount_id("pos:\t0\nflags:\t0100002\nmnt_id:\t607\nino:\t2\n") == 607
    assert parse_mount_id("pos:\t0\n") is None


def test_listening_ports_are_not_those_of_connections() -> None:
    assert parse_bound_ports(text("net-tcp.txt"), TCP_LISTEN) == {0x1538, 22}
    assert parse_bound_ports("", TCP_LISTEN) == frozenset()


def test_meminfo_is_in_bytes_and_counts_stay_counts() -> None:
    found = parse_meminfo("MemTotal:       24684084 kB\nHugePages_Free:        3\nHugepagesize:       2048 kB\n")
    assert found == {"MemTotal": 24684084 * 1024, "HugePages_Free": 3, "Hugepagesize": 2 << 20}


def test_cpu_flags_of_both_architectures() -> None:
    assert parse_cpu_flags("processor\t: 0\nflags\t\t: sse2 avx fpu\n\nprocessor\t: 1\nflags\t\t: other\n") == (
        "avx",
        "fpu",
        "sse2",
    )
    assert parse_cpu_flags("processor\t: 0\nFeatures\t: fp asimd\n") == ("asimd", "fp")
    assert parse_cpu_flags("") == ()


def test_shared_memory_of_a_cgroup_of_either_version() -> None:
    assert parse_memory_stat("cache 5\nshmem 10\ntotal_cache 6\ntotal_shmem 20\n") == 20
    assert parse_memory_stat("anon 5\nshmem 10\n") == 10
    assert parse_memory_stat("anon 5\n") is None


def test_the_effective_capabilities() -> None:
    assert parse_capabilities(text("status.txt")) == 0xA80425FB
    assert parse_capabilities("") == 0
