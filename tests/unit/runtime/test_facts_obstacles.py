"""Each rule about what CRIU cannot carry, one by one."""

import stat

import pytest

from runtime.facts_obstacles import (
    Obstacle,
    StrayEnd,
    descriptor_obstacle,
    find_obstacles,
    mapping_obstacle,
    stray_ends,
)
from runtime.facts_process import Descriptor, ProcessView
from runtime.linux.procfs import FileMapping, ProcessStatus

OWN = ("user:[1]", "pid:[2]", "uts:[3]", "ipc:[4]", "cgroup:[5]", "time:[6]")
MOUNTS = {606, 607}


def process(
    host_pid: int = 100,
    *,
    parent: int = 1,
    tracer: int = 0,
    namespaces: tuple[str, ...] = OWN,
    descriptors: tuple[Descriptor, ...] = (),
    mappings: tuple[FileMapping, ...] = (),
) -> ProcessView:
    status = ProcessStatus(
        name=f"p{host_pid}",
        pid=host_pid - 99,
        state="S",
        parent_pid=parent,
        tracer_pid=tracer,
        uid=0,
        threads=1,
        anonymous_bytes=0,
        shared_bytes=0,
        swap_bytes=0,
        hugetlb_bytes=0,
    )
    return ProcessView(
        host_pid=host_pid,
        status=status,
        bits=64,
        namespaces=namespaces,
        mounts="mnt:[7]",
        mappings=mappings,
        descriptors=descriptors,
    )


def find(*processes: ProcessView, waiters: tuple[int, ...] = ()) -> list[Obstacle]:
    return find_obstacles(processes, 100, {"mnt:[7]": MOUNTS}, waiters)


def path(link: str, *, mode: int = stat.S_IFREG, rdev: tuple[int, int] = (0, 0), mount_id: int = 606) -> Descriptor:
    return Descriptor(number=3, link=link, mode=mode, rdev=rdev, mount_id=mount_id)


def mapping(name: str) -> FileMapping:
    return FileMapping(span="1-2", permissions="rw-s", device="00:10", inode=1, path=name)


@pytest.mark.parametrize(
    "descriptor",
    [
        Descriptor(number=0, link="pipe:[1]"),
        Descriptor(number=0, link="anon_inode:[eventfd]"),
        Descriptor(number=0, link="anon_inode:inotify"),
        Descriptor(number=0, link="anon_inode:[pidfd]"),
        Descriptor(number=0, link="socket:[1]", inode=1, protocol="TCPv6"),
        Descriptor(number=0, link="socket:[1]", inode=1, protocol="UNIX-STREAM"),
        Descriptor(number=0, link="net:[4026531833]"),
        path("/etc/passwd"),
        path("/memfd:x (deleted)", mount_id=1),
        path("/SYSV00000000 (deleted)", mount_id=1),
        path("/dev/null", mode=stat.S_IFCHR, rdev=(1, 3), mount_id=607),
        path("/dev/pts/0", mode=stat.S_IFCHR, rdev=(136, 0), mount_id=607),
        path("/dev/ptmx", mode=stat.S_IFCHR, rdev=(5, 2), mount_id=607),
    ],
    ids=lambda descriptor: f"{descriptor.link} {descriptor.protocol}",
)
def test_what_criu_carries_is_no_obstacle(descriptor: Descriptor) -> None:
    assert descriptor_obstacle("p", descriptor, MOUNTS) is None


@pytest.mark.parametrize(
    ("descriptor", "kind", "what"),
    [
        (Descriptor(number=0, link="anon_inode:[io_uring]"), "io_uring", "io_uring"),
        (Descriptor(number=0, link="anon_inode:[userfaultfd]"), "kernel object", "userfaultfd"),
        (Descriptor(number=0, link="anon_inode:bpf-prog"), "kernel object", "bpf-prog"),
        (Descriptor(number=0, link="anon_inode:[perf_event]"), "kernel object", "perf_event"),
        (Descriptor(number=0, link="anon_inode:[something-new]"), "kernel object", "something-new"),
        (Descriptor(number=0, link="socket:[1]", inode=1, protocol="MPTCP"), "socket", "MPTCP"),
        (Descriptor(number=0, link="socket:[1]", inode=1, protocol="SCTP"), "socket", "SCTP"),
        (Descriptor(number=0, link="socket:[1]", inode=1, protocol="AF_VSOCK"), "socket", "AF_VSOCK"),
        (path("/dev/kvm", mode=stat.S_IFCHR, rdev=(10, 232), mount_id=607), "device", "/dev/kvm"),
        (path("/dev/vda", mode=stat.S_IFBLK, mount_id=607), "device", "/dev/vda"),
        (path("/var/log/x", mount_id=29), "outside file", "/var/log/x"),
        (path("/dev/null", mode=stat.S_IFCHR, rdev=(1, 3), mount_id=29), "outside file", "/dev/null"),
        (path("/dev/pts/4", mode=stat.S_IFCHR, rdev=(136, 4), mount_id=29), "terminal", "/dev/pts/4"),
        (path("/secretmem (deleted)", mount_id=15), "outside file", "/secretmem (deleted)"),
    ],
)
def test_what_criu_refuses_is_an_obstacle_of_its_kind(descriptor: Descriptor, kind: str, what: str) -> None:
    found = descriptor_obstacle("p (1)", descriptor, MOUNTS)
    assert found is not None
    assert (found.kind, found.who, found.what) == (kind, "p (1)", what)


@pytest.mark.parametrize("name", ["/usr/lib/libc.so", "/dev/zero (deleted)", "/dev/shm/x", "/memfd:x (deleted)"])
def test_ordinary_mappings_are_no_obstacle(name: str) -> None:
    assert mapping_obstacle("p", mapping(name)) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [("anon_inode:[io_uring]", "io_uring"), ("anon_inode:[perf_event]", "kernel object"), ("/dev/nvidia0", "device")],
)
def test_a_mapping_may_be_an_obstacle_after_its_descriptor_is_closed(name: str, kind: str) -> None:
    found = mapping_obstacle("p", mapping(name))
    assert found is not None
    assert found.kind == kind


def test_a_traced_process_is_named() -> None:
    (found,) = find(process(), process(101, parent=100, tracer=5))
    assert (found.kind, found.who) == ("traced", "p101 (2)")


@pytest.mark.parametrize("number", range(len(OWN)))
def test_a_nested_namespace_is_named_with_its_kind(number: int) -> None:
    nested = tuple("other:[9]" if index == number else name for index, name in enumerate(OWN))
    (found,) = find(process(), process(101, parent=100, namespaces=nested))
    assert (found.kind, found.what) == ("namespace", OWN[number].partition(":")[0])


def test_grandchildren_belong_to_the_container() -> None:
    assert find(process(102, parent=101), process(101, parent=100), process()) == []


def test_a_process_from_outside_is_named() -> None:
    (found,) = find(process(), process(101, parent=7))
    assert (found.kind, found.who) == ("outside process", "p101 (2)")


def test_what_exec_started_belongs_to_the_container() -> None:
    assert find(process(), process(102, parent=101), waiters=(101,)) == []


def test_a_process_that_is_ending_and_has_left_its_namespaces_is_no_obstacle() -> None:
    gone = tuple("" for _name in process().namespaces)
    assert find(process(), process(101, parent=100, namespaces=gone)) == []
    half = (process().namespaces[0], *gone[1:])
    assert find(process(), process(101, parent=100, namespaces=half)) == []


def test_a_zombie_is_no_obstacle() -> None:
    assert find(process(), process(101, parent=100, namespaces=())) == []


def test_the_same_thing_in_one_process_is_named_once() -> None:
    ring = Descriptor(number=3, link="anon_inode:[io_uring]")
    found = find(process(descriptors=(ring, ring), mappings=(mapping("anon_inode:[io_uring]"),)))
    assert len(found) == 1


def unix(inode: int) -> Descriptor:
    return Descriptor(number=3, link=f"socket:[{inode}]", inode=inode, protocol="UNIX-STREAM")


def test_a_pair_inside_the_container_is_not_stray() -> None:
    one, two = process(descriptors=(unix(1),)), process(101, descriptors=(unix(2),))
    assert stray_ends([one, two], {1: 2, 2: 1, 8: 9, 9: 8}) == []


def test_a_socket_without_peer_is_not_stray() -> None:
    assert stray_ends([process(descriptors=(unix(1),))], {1: 0}) == []


def test_a_peer_that_nobody_inside_has_is_stray() -> None:
    found = stray_ends([process(descriptors=(unix(1), unix(1)))], {1: 2, 2: 1})
    assert found == [StrayEnd(who="p100 (1)", inode=1, peer=2)]


def test_a_socket_of_another_network_namespace_is_stray() -> None:
    assert stray_ends([process(descriptors=(unix(1),))], {}) == [StrayEnd(who="p100 (1)", inode=1, peer=0)]


def test_other_sockets_have_no_stray_ends() -> None:
    tcp = Descriptor(number=3, link="socket:[1]", inode=1, protocol="TCP")
    assert stray_ends([process(descriptors=(tcp,))], {}) == []
