"""Parsers of /proc/PID/maps and /proc/PID/smaps, and which of its mappings are memory that is to be tracked. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)$", re.MULTILINE)
_DELETED = " (deleted)"
# Made by the kernel for each process; not memory of the program. They hold nothing that can be carried.
_KERNEL_MADE = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]", "[sigpage]", "[vectors]")
_SPECIAL = ("/anon_hugepage", "/[aio]", "anon_inode:", "socket:")
# Memory without a file of its own, by the names the kernel gives its files (mm/shmem.c, ipc/shm.c, mm/memfd.c).
_SHARED_MEMORY = ("/dev/zero", "/SYSV", "/memfd:", "[anon_shmem:")


class Kind(StrEnum):
    """What a mapping is to a tracker.

    ``anonymous``: private, no file: heap, stacks, arenas. ``private_file``: private pages over a file's content; only
    pages that were written are the process's own. ``shared_memory``: memory shared by mapping it, without a file that
    is carried otherwise. ``shared_file``: a file's content, carried with the file. ``special``: made by the kernel, a
    device, huge pages of hugetlbfs: left to the dump.
    """

    ANONYMOUS = "anonymous"
    PRIVATE_FILE = "private_file"
    SHARED_MEMORY = "shared_memory"
    SHARED_FILE = "shared_file"
    SPECIAL = "special"


class Mapping(NamedTuple):
    """One line of /proc/PID/maps. ``offset`` is in bytes; ``name`` is empty for memory without one."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    name: str
    kind: Kind

    @property
    def writable(self) -> bool:
        return self.permissions[1] == "w"

    @property
    def segment(self) -> tuple[str, int]:
        """Names what is mapped, for mappings of shared memory: device and inode."""
        return (self.device, self.inode)


def kind_of(permissions: str, inode: int, name: str) -> Kind:
    name = name.removesuffix(_DELETED)
    if name in _KERNEL_MADE or name.startswith(_SPECIAL):
        return Kind.SPECIAL
    if permissions[3] == "s":
        return Kind.SHARED_MEMORY if name.startswith(_SHARED_MEMORY) else _special_if_device(name, Kind.SHARED_FILE)
    # A private mapping of /dev/zero is anonymous memory, whatever its name.
    if inode == 0 or name == "/dev/zero":
        return Kind.ANONYMOUS
    return _special_if_device(name, Kind.PRIVATE_FILE)


def _special_if_device(name: str, kind: Kind) -> Kind:
    """Files below /dev are devices, but for those of its own tmpfs for shared memory."""
    return Kind.SPECIAL if name.startswith("/dev/") and not name.startswith("/dev/shm/") else kind


def parse_mappings(text: str) -> list[Mapping]:
    """Every mapping of /proc/PID/maps in order of address. A line that does not fit is skipped."""
    found = []
    for start, end, permissions, offset, device, inode, name in _LINE.findall(text):
        number = int(inode)
        kind = kind_of(permissions, number, name)
        found.append(Mapping(int(start, 16), int(end, 16), permissions, int(offset, 16), device, number, name, kind))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class MappingDetail:
    """One mapping of /proc/PID/smaps. ``flags`` are the two-letter codes of VmFlags (proc(5)); sizes are in bytes."""

    mapping: Mapping
    resident_bytes: int
    swapped_bytes: int
    huge_page_bytes: int
    flags: frozenset[str]

    @property
    def watched(self) -> bool:
        """Whether a userfaultfd is registered for writes here."""
        return "uw" in self.flags

    @property
    def locked(self) -> bool:
        return "lo" in self.flags

    @property
    def hugetlb(self) -> bool:
        return "ht" in self.flags

    @property
    def device_memory(self) -> bool:
        """VM_IO or VM_PFNMAP: not memory that can be read and put back."""
        return bool(self.flags & {"io", "pf"})


def parse_details(text: str) -> list[MappingDetail]:
    """Every mapping of /proc/PID/smaps; fields that a kernel does not print are 0 or empty."""
    found = []
    heads = list(_LINE.finditer(text))
    for head, after in zip(heads, [*heads[1:], None], strict=True):
        body = text[head.end() : after.start() if after else len(text)]
        fields = dict(line.split(":", 1) for line in body.splitlines() if ":" in line)
        found.append(
            MappingDetail(
                mapping=parse_mappings(head[0])[0],
                resident_bytes=_kib(fields, "Rss"),
                swapped_bytes=_kib(fields, "Swap"),
                huge_page_bytes=_kib(fields, "AnonHugePages"),
                flags=frozenset(fields.get("VmFlags", "").split()),
            )
        )
    return found


def _kib(fields: dict[str, str], name: str) -> int:
    number = fields.get(name, "0 kB").split()[0]
    return int(number) * 1024 if number.isdigit() else 0
