"""Parsers of what /proc says, proc(5). They take text and touch nothing; a line that does not fit is skipped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_MAPPING = re.compile(r"^([0-9a-f]+-[0-9a-f]+) (\S{4}) \S+ (\S+) (\d+) +(\S.*)$", re.MULTILINE)
# tcp_states.h: a TCP socket that listens; a UDP socket that is bound shows as "closed".
TCP_LISTEN = "0A"
UDP_BOUND = "07"
DELETED = " (deleted)"


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """From /proc/PID/status. ``pid`` is the number in its own pid namespace; memory is in bytes."""

    name: str
    pid: int
    state: str
    parent_pid: int
    tracer_pid: int
    uid: int
    threads: int
    anonymous_bytes: int
    shared_bytes: int
    swap_bytes: int
    hugetlb_bytes: int


def parse_status(text: str) -> ProcessStatus:
    """Raises ValueError or KeyError for text that is no status."""
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    return ProcessStatus(
        name=fields["Name"],
        # A kernel without pid namespaces has no NSpid.
        pid=int(fields.get("NSpid", fields["Pid"]).split()[-1]),
        state=fields["State"].split()[0],
        parent_pid=int(fields["PPid"]),
        tracer_pid=int(fields["TracerPid"]),
        uid=int(fields["Uid"].split()[0]),
        threads=int(fields["Threads"]),
        anonymous_bytes=_kib(fields, "RssAnon"),
        shared_bytes=_kib(fields, "RssShmem"),
        swap_bytes=_kib(fields, "VmSwap"),
        hugetlb_bytes=_kib(fields, "HugetlbPages"),
    )


def _kib(fields: Mapping[str, str], name: str) -> int:
    # A zombie has no memory lines.
    return int(fields.get(name, "0 kB").split()[0]) * 1024


@dataclass(frozen=True, kw_only=True)
class FileMapping:
    """One mapping with a name: a file, a device or an anonymous inode. ``span`` names it in /proc/PID/map_files."""

    span: str
    permissions: str
    device: str
    inode: int
    path: str


def parse_maps(text: str) -> list[FileMapping]:
    """Named mappings of /proc/PID/maps that have an inode: not [heap], [stack], [vdso]."""
    found = []
    for span, permissions, device, inode, path in _MAPPING.findall(text):
        if inode != "0":
            # The path has newlines escaped as \012, and nothing else.
            found.append(
                FileMapping(
                    # maps pads addresses to eight digits, map_files does not.
                    span="-".join(f"{int(address, 16):x}" for address in span.split("-")),
                    permissions=permissions,
                    device=device,
                    inode=int(inode),
                    path=path.replace("\\012", "\n"),
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One line of /proc/PID/mountinfo."""

    id: int
    point: str
    kind: str


def parse_mounts(text: str) -> list[Mount]:
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) >= 5 and kinds and fields[0].isdigit():
            found.append(Mount(id=int(fields[0]), point=_unescaped(fields[4]), kind=kinds[0]))
    return found


def _unescaped(path: str) -> str:
    """Space, tab, newline and backslash are \\040 and so on in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def mount_of(path: str, mounts: list[Mount]) -> Mount | None:
    """The mount that holds ``path``: the longest point above it, the last of several at one point."""
    found: Mount | None = None
    for mount in mounts:
        base = mount.point.rstrip("/")
        inside = path == mount.point or path.startswith(base + "/")
        if inside and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def parse_mount_id(fdinfo: str) -> int | None:
    """``mnt_id`` of /proc/PID/fdinfo/FD."""
    for line in fdinfo.splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    return None


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo in bytes (huge page counts as they are)."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        fields = rest.split()
        if fields and fields[0].isdigit():
            found[name] = int(fields[0]) * (1024 if fields[1:] == ["kB"] else 1)
    return found


def parse_cpu_flags(text: str) -> tuple[str, ...]:
    """What the first processor of /proc/cpuinfo can do: ``flags`` on x86, ``Features`` on ARM. Sorted."""
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(set(rest.split())))
    return ()


def parse_bound_ports(text: str, state: str) -> frozenset[int]:
    """Local ports of /proc/net/{tcp,tcp6,udp,udp6} whose socket is in ``state``."""
    found = set()
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == state:
            found.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(found)


def parse_memory_stat(text: str) -> int | None:
    """Shared memory a cgroup and all below it is charged for: ``total_shmem`` of memory.stat on v1, ``shmem`` on v2."""
    fields = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    number = fields.get("total_shmem", fields.get("shmem", ""))
    return int(number) if number.isdigit() else None


def parse_capabilities(status: str) -> int:
    """The effective set of /proc/PID/status as a bit mask; 0 when the line is missing."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def parse_shared_writable(maps: str) -> set[str]:
    """From the text of /proc/PID/maps: paths of files mapped shared and writable, as the process sees them.

    A file that was deleted has no path any more and is CRIU's to carry.
    """
    found = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/") or fields[5].endswith(" (deleted)"):
            continue
        if fields[1][1] == "w" and fields[1][3] == "s":
            found.add(fields[5])
    return found
