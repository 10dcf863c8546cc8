"""What in a container CRIU can not carry. Pure: views of processes in, obstacles out.

Each rule was tried with CRIU 4.2.1 on Linux 6.18 (docs/preflight.md has the table); what CRIU carries is not named.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.facts_process import NAMESPACES, Descriptor, ProcessView
from runtime.linux.procfs import DELETED, FileMapping

Kind = Literal[
    "io_uring",
    "kernel object",
    "device",
    "socket",
    "unix socket",
    "terminal",
    "outside file",
    "namespace",
    "traced",
    "outside process",
]

CARRIED_ANONYMOUS = frozenset({"eventfd", "eventpoll", "inotify", "fanotify", "signalfd", "timerfd", "pidfd"})
CARRIED_PROTOCOLS = frozenset(
    {
        *("TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6", "PING", "PINGv6"),
        *("UNIX", "UNIX-STREAM", "UNIX-SEQPACKET", "PACKET", "NETLINK"),
    }
)
# Major numbers of Documentation/admin-guide/devices.txt. 1: null, zero, random ... 5: tty, console, ptmx. 136: pts.
MEMORY_MAJOR = 1
TERMINAL_MAJORS = frozenset({4, 5, *range(136, 144)})
# Under these names the kernel keeps files that have no mount anybody could look up, and CRIU knows them.
MOUNTLESS = ("/memfd:", "/dev/zero" + DELETED, "/SYSV", "/anon_hugepage", "/i915", "/[aio]")


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """``who`` is the process as an operator knows it, ``what`` the thing as the kernel names it."""

    kind: Kind
    who: str
    what: str


def find_obstacles(
    processes: Sequence[ProcessView],
    init_pid: int,
    mounts: Mapping[str, Collection[int]],
    waiters: Collection[int] = (),
) -> list[Obstacle]:
    """All but unix sockets, in the processes' order.

    ``mounts`` are the mount ids of each mount namespace in it. Children of ``waiters`` count as init's own, which they
    become before a dump (criu/dump.py).
    """
    init = next((process for process in processes if process.host_pid == init_pid), None)
    found: list[Obstacle] = []
    inside = _descendants(processes, {init_pid, *waiters})
    for process in processes:
        if process.host_pid not in inside:
            found.append(
                Obstacle(kind="outside process", who=process.label, what="it was not started by the container")
            )
        elif init is not None:
            found += _of_process(process, init)
        known = mounts.get(process.mounts, ())
        found += (o for d in process.descriptors if (o := descriptor_obstacle(process.label, d, known)) is not None)
        found += (o for m in process.mappings if (o := mapping_obstacle(process.label, m)) is not None)
    return list(dict.fromkeys(found))


def _descendants(processes: Sequence[ProcessView], roots: set[int]) -> set[int]:
    inside = set(roots)
    grown = True
    while grown:
        more = {p.host_pid for p in processes if p.status.parent_pid in inside} - inside
        inside |= more
        grown = bool(more)
    return inside


def _of_process(process: ProcessView, init: ProcessView) -> Iterator[Obstacle]:
    if process.status.tracer_pid:
        yield Obstacle(kind="traced", who=process.label, what="a debugger or tracer holds it")
    for name, own, whole in zip(NAMESPACES, process.namespaces, init.namespaces, strict=False):
        # None at all: it is ending, and has let go of its own already.
        if own and own != whole:
            yield Obstacle(kind="namespace", who=process.label, what=name)


def descriptor_obstacle(who: str, descriptor: Descriptor, mounts: Collection[int]) -> Obstacle | None:
    """The rule for one descriptor of a process whose mount namespace has ``mounts``."""
    link = descriptor.link
    if link.startswith("anon_inode:"):
        return _anonymous(who, link)
    if descriptor.protocol:
        carried = descriptor.protocol in CARRIED_PROTOCOLS
        return None if carried else Obstacle(kind="socket", who=who, what=descriptor.protocol)
    if not link.startswith("/") or link.startswith(MOUNTLESS):
        return None
    major = descriptor.rdev[0]
    if descriptor.mount_id is not None and descriptor.mount_id not in mounts:
        terminal = stat.S_ISCHR(descriptor.mode) and major in TERMINAL_MAJORS
        return Obstacle(kind="terminal" if terminal else "outside file", who=who, what=link)
    if stat.S_ISBLK(descriptor.mode):
        return Obstacle(kind="device", who=who, what=link)
    if stat.S_ISCHR(descriptor.mode) and major not in (MEMORY_MAJOR, *TERMINAL_MAJORS):
        return Obstacle(kind="device", who=who, what=link)
    return None


def mapping_obstacle(who: str, mapping: FileMapping) -> Obstacle | None:
    """A mapping may outlive the descriptor it was made from."""
    if mapping.path.startswith("anon_inode:"):
        return _anonymous(who, mapping.path)
    if mapping.path.startswith("/dev/") and not mapping.path.startswith(("/dev/shm/", "/dev/zero", "/dev/hugepages/")):
        return Obstacle(kind="device", who=who, what=mapping.path)
    return None


def _anonymous(who: str, link: str) -> Obstacle | None:
    name = link.removeprefix("anon_inode:").removesuffix(DELETED).strip("[]")
    if name == "io_uring":
        return Obstacle(kind="io_uring", who=who, what=name)
    return None if name in CARRIED_ANONYMOUS else Obstacle(kind="kernel object", who=who, what=name)


@dataclass(frozen=True, kw_only=True)
class StrayEnd:
    """A unix socket of the container whose other end is not among the container's own descriptors.

    ``peer`` is the inode of that end; 0 when the socket itself is of another network namespace.
    """

    who: str
    inode: int
    peer: int


def stray_ends(processes: Sequence[ProcessView], peers: Mapping[int, int]) -> list[StrayEnd]:
    """``peers`` are the unix sockets of the container's network namespace (sockdiag.unix_peers)."""
    own = {d.inode for process in processes for d in process.descriptors if d.protocol}
    found = {}
    for process in processes:
        for descriptor in process.descriptors:
            if not descriptor.protocol.startswith("UNIX"):
                continue
            peer = peers.get(descriptor.inode)
            if peer is None:
                found[descriptor.inode] = StrayEnd(who=process.label, inode=descriptor.inode, peer=0)
            elif peer and peer not in own:
                found[descriptor.inode] = StrayEnd(who=process.label, inode=descriptor.inode, peer=peer)
    return list(found.values())
