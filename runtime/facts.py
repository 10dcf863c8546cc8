"""What a running container is made of and needs: read from outside while it runs, nothing is stopped or changed.

``read_facts`` takes about 15 ms for ten processes. Everything is a moment's picture: the container goes on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.api import Container, ContainerSpec, Status
from runtime.container import Containers
from runtime.facts_obstacles import Obstacle, StrayEnd, find_obstacles, stray_ends
from runtime.facts_process import ProcessView, descriptors_of, look_at
from runtime.linux.elf import read_elf
from runtime.linux.procfs import DELETED, Mount, mount_of, parse_memory_stat, parse_mounts
from runtime.linux.sockdiag import unix_peers
from runtime.network import in_network_namespace

MAX_FILES = 1024
"""More lower-layer files than this are not compared beforehand; CRIU checks each at restore anyway."""
MAX_OBSTACLES = 200
WALK_BUDGET_S = 0.04
"""For the size of the upper layer: about ten thousand entries. Beyond, the size is a lower bound."""


@dataclass(frozen=True, kw_only=True)
class LowerFile:
    """A file of the lower layer that is mapped or open: it must be the same on a target. ``mode`` is st_mode."""

    path: str
    size_bytes: int
    mode: int
    build_id: str = ""


@dataclass(frozen=True, kw_only=True)
class ContainerFacts:
    """``memory_bytes`` is what has to be carried: anonymous and swapped pages of every process, shared memory once.

    ``upper_bytes`` is a lower bound when ``upper_complete`` is false. ``tmpfs_bytes`` is what /dev/shm and the other
    tmpfs mounts hold. ``exec_sessions`` counts programs that a ``cmigrate exec`` outside still waits for.

    Processes by name and pid: ``compat_tasks`` are 32-bit, ``followers`` are a ``tail -f``, ``other_users`` are not
    root's.
    """

    status: Status
    processes: int = 0
    threads: int = 0
    memory_bytes: int = 0
    hugetlb_bytes: int = 0
    tmpfs_bytes: int = 0
    upper_bytes: int = 0
    upper_complete: bool = True
    files: tuple[LowerFile, ...] = ()
    files_complete: bool = True
    obstacles: tuple[Obstacle, ...] = ()
    compat_tasks: tuple[str, ...] = ()
    followers: tuple[str, ...] = ()
    other_users: tuple[str, ...] = ()
    uses_ipv6: bool = False
    exec_sessions: int = 0


def read_facts(containers: Containers, container: Container, *, walk_budget_s: float = WALK_BUDGET_S) -> ContainerFacts:
    """For a container that runs or is paused; for another only its status is told."""
    state = container.state
    if state.status not in (Status.RUNNING, Status.PAUSED):
        return ContainerFacts(status=state.status)
    pids, waiters = member_pids(containers, container.id)
    processes = [view for pid in pids if (view := look_at(pid)) is not None]
    mounts = _mounts(processes, state.init_pid)
    own_mounts = mounts.get(_link(f"/proc/{state.init_pid}/ns/mnt"), [])
    mount_ids = {name: {mount.id for mount in found} for name, found in mounts.items()}
    obstacles = find_obstacles(processes, state.init_pid, mount_ids, waiters)
    obstacles += _unix_obstacles(processes, state.init_pid)
    upper = containers.store.directory(container.id) / "upper"
    files = lower_files(processes, upper, own_mounts)
    upper_bytes, upper_complete = size_of_tree(upper, walk_budget_s)
    return ContainerFacts(
        status=state.status,
        processes=len(processes),
        threads=sum(view.status.threads for view in processes),
        memory_bytes=_memory_bytes(processes, containers.cgroup(container.id).paths()),
        hugetlb_bytes=sum(view.status.hugetlb_bytes for view in processes),
        tmpfs_bytes=_tmpfs_bytes(container.spec, state.init_pid),
        upper_bytes=upper_bytes,
        upper_complete=upper_complete,
        files=tuple(files[:MAX_FILES]),
        files_complete=len(files) <= MAX_FILES,
        obstacles=tuple(obstacles[:MAX_OBSTACLES]),
        compat_tasks=tuple(view.label for view in processes if view.bits == 32),
        followers=tuple(view.label for view in processes if _follows_a_file(view)),
        other_users=tuple(view.label for view in processes if view.status.uid),
        uses_ipv6=any(d.protocol.endswith("v6") for view in processes for d in view.descriptors),
        exec_sessions=len(waiters),
    )


def member_pids(containers: Containers, container_id: str) -> tuple[list[int], set[int]]:
    """The container's processes, and the waiters of ``cmigrate exec``, which are left out of them.

    A waiter is ended before a dump (criu/dump.py), with the process outside that started it.
    """
    members = containers.cgroup(container_id).pids()
    directory = containers.run_dir(container_id) / "waiters"
    names = os.listdir(directory) if directory.exists() else []
    waiters = {int(name) for name in names if name.isdigit()} & set(members)
    helpers = waiters | {parent for pid in waiters if (parent := _parent(pid)) in members}
    return [pid for pid in members if pid not in helpers], waiters


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _mounts(processes: Sequence[ProcessView], init_pid: int) -> dict[str, list[Mount]]:
    """The mounts of each mount namespace; init's first, because a nested one must not stand for it."""
    found: dict[str, list[Mount]] = {}
    for view in sorted(processes, key=lambda view: view.host_pid != init_pid):
        if view.mounts and view.mounts not in found:
            with contextlib.suppress(OSError):
                found[view.mounts] = parse_mounts(Path(f"/proc/{view.host_pid}/mountinfo").read_text())
    return found


def _memory_bytes(processes: Sequence[ProcessView], cgroups: Iterable[Path]) -> int:
    """Images hold each process's anonymous pages, shared ones between parent and child too, and shared memory once."""
    private = sum(view.status.anonymous_bytes + view.status.swap_bytes for view in processes)
    # Every process that maps a page of shared memory counts it; the cgroup is charged once.
    shared = sum(view.status.shared_bytes for view in processes)
    for path in cgroups:
        with contextlib.suppress(OSError):
            charged = parse_memory_stat((path / "memory.stat").read_text())
            shared = shared if charged is None else min(shared, charged)
    return private + shared


def _tmpfs_bytes(spec: ContainerSpec, init_pid: int) -> int:
    total = 0
    for point in ("/dev/shm", *spec.tmpfs):
        with contextlib.suppress(OSError):
            status = os.statvfs(f"/proc/{init_pid}/root{point}")
            total += (status.f_blocks - status.f_bfree) * status.f_frsize
    return total


def size_of_tree(root: Path, budget_s: float) -> tuple[int, bool]:
    """Allocated bytes of the files below ``root``, and whether time sufficed to see all of them."""
    deadline = time.monotonic() + budget_s
    total = 0
    waiting = [os.fspath(root)]
    while waiting:
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        if waiting and time.monotonic() > deadline:
            return total, False
    return total, True


def lower_files(processes: Sequence[ProcessView], upper: Path, mounts: list[Mount]) -> list[LowerFile]:
    """Mapped and open files that are the lower layer's, by path. Those of upper layer and tmpfs travel."""
    found: dict[str, LowerFile] = {}
    known: dict[str, bool] = {}

    def of_lower(path: str) -> bool:
        if path not in known:
            known[path] = _is_lower(path, upper, mounts)
        return known[path]

    for view in processes:
        base = f"/proc/{view.host_pid}"
        for mapping in view.mappings:
            if mapping.path not in found and of_lower(mapping.path):
                # This link leads to the very file that is mapped, whatever its path may name by now.
                with contextlib.suppress(OSError):
                    found[mapping.path] = _mapped_file(mapping.path, f"{base}/map_files/{mapping.span}")
        for descriptor in view.descriptors:
            path = descriptor.link
            if path not in found and stat.S_ISREG(descriptor.mode) and of_lower(path):
                found[path] = LowerFile(path=path, size_bytes=descriptor.size_bytes, mode=descriptor.mode)
    return [found[path] for path in sorted(found)]


def _is_lower(path: str, upper: Path, mounts: list[Mount]) -> bool:
    if not path.startswith("/") or path.endswith(DELETED):
        return False
    mount = mount_of(path, mounts)
    return mount is not None and mount.point == "/" and not os.path.lexists(f"{upper}{path}")


def _mapped_file(path: str, link: str) -> LowerFile:
    descriptor = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        elf = read_elf(functools.partial(os.pread, descriptor)) if stat.S_ISREG(status.st_mode) else None
        return LowerFile(
            path=path, size_bytes=status.st_size, mode=status.st_mode, build_id=elf.build_id.hex() if elf else ""
        )
    finally:
        os.close(descriptor)


def _follows_a_file(view: ProcessView) -> bool:
    return view.status.name == "tail" and any("inotify" in d.link for d in view.descriptors)


def _unix_obstacles(processes: Sequence[ProcessView], init_pid: int) -> list[Obstacle]:
    """Unix sockets that lead out of the container, with the process at the other end."""
    if not any(d.protocol.startswith("UNIX") for view in processes for d in view.descriptors):
        return []
    strays = stray_ends(processes, _peers(init_pid))
    if strays:
        # The pictures of descriptors and of sockets are not of one moment: only what stays is true.
        strays = _still_stray(strays, processes, _peers(init_pid))
    holders = find_holders({stray.peer for stray in strays if stray.peer}) if strays else {}
    members = {view.host_pid for view in processes}
    found = []
    for stray in strays:
        holder = holders.get(stray.peer)
        if stray.peer and (holder is None or holder[0] in members):
            continue  # on its way inside a message between two of the container's processes, or just accepted
        what = f"connected to {holder[1]} outside" if holder else "made outside the container"
        found.append(Obstacle(kind="unix socket", who=stray.who, what=what))
    return found


def _peers(init_pid: int) -> dict[int, int]:
    with contextlib.suppress(FileNotFoundError):
        return in_network_namespace(init_pid, unix_peers)
    return {}


def _still_stray(
    strays: Sequence[StrayEnd], processes: Sequence[ProcessView], peers: Mapping[int, int]
) -> list[StrayEnd]:
    now: set[int] = set()
    for view in processes:
        with contextlib.suppress(OSError):
            now |= {descriptor.inode for descriptor in descriptors_of(view.host_pid) if descriptor.protocol}
    return [s for s in strays if s.inode in now and s.peer not in now and peers.get(s.inode, 0) == s.peer]


def find_holders(inodes: Collection[int]) -> dict[int, tuple[int, str]]:
    """inode of a socket -> (pid, name (pid)) of a process of this host that has it open."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, tuple[int, str]] = {}
    read: Callable[[str], str] = os.readlink
    for name in os.listdir("/proc") if wanted else ():
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{name}/fd"):
                with contextlib.suppress(OSError):
                    inode = wanted.get(read(f"/proc/{name}/fd/{number}"))
                    if inode is not None:
                        comm = Path(f"/proc/{name}/comm").read_text().strip()
                        found.setdefault(inode, (int(name), f"{comm} ({name})"))
    return found
