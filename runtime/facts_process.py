"""One look at one process of a container from outside: memory, mapped files, descriptors, namespaces. Reading only."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from runtime.linux.procfs import FileMapping, ProcessStatus, parse_maps, parse_mount_id, parse_status

# Those that CRIU can not have more than one of in a container; net and mnt may be nested.
NAMESPACES = ("user", "pid", "uts", "ipc", "cgroup", "time")


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """One open descriptor. ``link`` is what /proc/PID/fd shows.

    ``protocol`` is set for sockets (the kernel's name: TCP, UNIX-STREAM, MPTCP ...). ``mode``, ``rdev`` and
    ``size_bytes`` are the file's and ``mount_id`` its mount's, for links that are paths.
    """

    number: int
    link: str
    inode: int = 0
    protocol: str = ""
    mount_id: int | None = None
    mode: int = 0
    rdev: tuple[int, int] = (0, 0)
    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ProcessView:
    """``host_pid`` is the pid here, ``status.pid`` the one inside. ``mounts`` names its mount namespace.

    ``bits`` is 32 or 64, 0 when its program could not be read (a zombie).
    """

    host_pid: int
    status: ProcessStatus
    bits: int
    namespaces: tuple[str, ...]
    mounts: str
    mappings: tuple[FileMapping, ...]
    descriptors: tuple[Descriptor, ...]

    @property
    def label(self) -> str:
        """How an operator knows it: name and pid inside the container."""
        return f"{self.status.name} ({self.status.pid})"


def look_at(host_pid: int) -> ProcessView | None:
    """None when it has gone meanwhile. A zombie has no mappings and no descriptors."""
    directory = f"/proc/{host_pid}"
    try:
        status = parse_status(Path(directory, "status").read_text(errors="replace"))
        if status.state in "ZX":
            return ProcessView(
                host_pid=host_pid, status=status, bits=0, namespaces=(), mounts="", mappings=(), descriptors=()
            )
        return ProcessView(
            host_pid=host_pid,
            status=status,
            bits=_bits(directory),
            namespaces=tuple(_link(f"{directory}/ns/{name}") for name in NAMESPACES),
            mounts=_link(f"{directory}/ns/mnt"),
            mappings=tuple(parse_maps(Path(directory, "maps").read_text(errors="surrogateescape"))),
            descriptors=tuple(descriptors_of(host_pid)),
        )
    except (FileNotFoundError, ProcessLookupError):
        return None


def _link(path: str) -> str:
    """Empty for a namespace this kernel does not have."""
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def _bits(directory: str) -> int:
    """From the ELF header of its program: byte 4 is the class."""
    with contextlib.suppress(OSError), open(f"{directory}/exe", "rb", buffering=0) as program:
        return {1: 32, 2: 64}.get((program.read(5) + b"\0" * 5)[4], 0)
    return 0


def descriptors_of(host_pid: int) -> list[Descriptor]:
    """Every descriptor that is still open when its turn comes."""
    base = f"/proc/{host_pid}/fd"
    found = []
    for name in os.listdir(base):
        with contextlib.suppress(OSError):
            found.append(_descriptor(host_pid, int(name), os.readlink(f"{base}/{name}")))
    return found


def _descriptor(host_pid: int, number: int, link: str) -> Descriptor:
    path = f"/proc/{host_pid}/fd/{number}"
    if link.startswith("socket:["):
        # The kernel names the protocol of any socket in this attribute, whatever namespace it was made in.
        protocol = os.getxattr(path, "system.sockprotoname").rstrip(b"\0").decode(errors="replace")
        return Descriptor(number=number, link=link, inode=int(link[8:-1]), protocol=protocol)
    if link.startswith("/"):
        status = os.stat(path)
        info = Path(f"/proc/{host_pid}/fdinfo/{number}").read_text()
        return Descriptor(
            number=number,
            link=link,
            inode=status.st_ino,
            mount_id=parse_mount_id(info),
            mode=status.st_mode,
            rdev=(os.major(status.st_rdev), os.minor(status.st_rdev)) if stat.S_ISCHR(status.st_mode) else (0, 0),
            size_bytes=status.st_size,
        )
    return Descriptor(number=number, link=link)
