"""What a test may leave behind: nothing. Two pictures of this process and host, and what the later one has more."""

import gc
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Set by scripts/test: this pytest has a PID and a network namespace of its own, so that every process and every link in
# sight is a test's.
SANDBOX = os.environ.get("CMIGRATE_TEST_SANDBOX") == "1"

# Removing a network namespace goes on in a kernel worker after the call that asked for it.
GRACE_S = 5.0
POLL_S = 0.05

NETNS_DIR = "/run/netns"
OUR_CGROUP = re.compile(r"cmigrate")
# The parent of all containers' cgroups stays, as it does on a host that once ran one.
STANDING_CGROUP = "cmigrate"
# The parent of all labs' cgroups; the last lab on the machine removes it.
LABS = "cmigrate-lab"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything of each kind, by a key that a new one cannot share; the value is how to name it in a message."""

    kinds: Mapping[str, Mapping[object, str]]

    def leaked_since(self, before: "Snapshot") -> list[str]:
        """Lines that name what is here and was not there."""
        return [
            f"{kind}: {text}"
            for kind, now in self.kinds.items()
            for key, text in now.items()
            if key not in before.kinds.get(kind, {})
        ]


def take_snapshot(*, whole_host: bool) -> Snapshot:
    """Look at this process; with `whole_host` also at mounts, network, cgroups and every process in the sandbox."""
    kinds = {"file descriptor": file_descriptors(), "thread": threads(), "process": processes(whole_host=whole_host)}
    if whole_host:
        kinds |= {
            "mount": mounts(Path("/proc/self/mountinfo").read_text()),
            "network namespace": network_namespaces(),
            "network link": links(),
            "cgroup": cgroups(),
            "nft table": nft_tables(),
        }
    return Snapshot(kinds=kinds)


def wait_for_leaks_to_go(
    before: Snapshot, *, whole_host: bool, clock: Callable[[], float] = time.monotonic
) -> list[str]:
    """Lines that name what has leaked since `before` and is still there after a short grace; empty when clean."""
    deadline = clock() + GRACE_S
    leaked = take_snapshot(whole_host=whole_host).leaked_since(before)
    while leaked and clock() < deadline:
        # An exception that a test caught keeps its frames, and what they hold, in a cycle.
        gc.collect()
        time.sleep(POLL_S)
        leaked = take_snapshot(whole_host=whole_host).leaked_since(before)
    return leaked


def file_descriptors() -> dict[object, str]:
    found: dict[object, str] = {}
    listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(listing):
            target = _readlink(f"/proc/self/fd/{name}")
            if target is not None and int(name) != listing:
                found[(name, target)] = f"{name} -> {target}"
    finally:
        os.close(listing)
    return found


def threads() -> dict[object, str]:
    return {thread: thread.name for thread in threading.enumerate()}


def processes(*, whole_host: bool) -> dict[object, str]:
    """Our descendants; in the sandbox everything, so that a daemon that left us is seen too."""
    everything = whole_host and SANDBOX
    if not everything and not has_children():
        return {}
    stats: dict[int, tuple[int, str, str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _read(f"/proc/{entry}/stat")):
            # The name may hold blanks and parentheses; the rest cannot.
            head, _, tail = stat.rpartition(")")
            fields = tail.split()
            stats[int(entry)] = (int(fields[1]), fields[19], f"{head.partition('(')[2]} ({fields[0]})")
    own = os.getpid()
    ours = set(stats) if everything else descendants({pid: stat[0] for pid, stat in stats.items()}, own)
    found: dict[object, str] = {}
    for pid in ours - {own}:
        _, started, name = stats[pid]
        command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
        found[(pid, started)] = f"{pid} {command or name}"
    return found


def has_children() -> bool:
    """Whether this process has any. Before and after each of thousands of tests, reading all of /proc takes long."""
    try:
        lists = [Path(f"/proc/self/task/{thread}/children") for thread in os.listdir("/proc/self/task")]
        return any(path.read_bytes() for path in lists)
    except OSError:
        return True  # a thread has ended meanwhile: its children are another's


def descendants(parents: Mapping[int, int], ancestor: int) -> set[int]:
    """Every pid below `ancestor` in a map from pid to parent."""
    found: set[int] = set()
    size = -1
    while len(found) != size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent == ancestor or parent in found}
    return found


def mounts(mountinfo: str) -> dict[object, str]:
    found: dict[object, str] = {}
    for line in mountinfo.splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if fields[4] == NETNS_DIR:
            continue  # `ip netns add` binds it over itself the first time, to share what is mounted below
        found[(fields[0], fields[4])] = f"{fields[4]} ({kind})"
    return found


def network_namespaces() -> dict[object, str]:
    return {name: f"{NETNS_DIR}/{name}" for name in os.listdir(NETNS_DIR)} if os.path.isdir(NETNS_DIR) else {}


def links() -> dict[object, str]:
    return {(index, name): name for index, name in socket.if_nameindex()}


def cgroups() -> dict[object, str]:
    """Directories of ours in every hierarchy; not those that hold only processes of others (they read as pid 0)."""
    found: dict[object, str] = {}
    tops: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind in ("cgroup", "cgroup2"):
            tops[fields[4]] = kind
    foreign_labs = {
        name
        for top, kind in tops.items()
        if kind == "cgroup2"
        for name in _labs(top)
        if _held_by_others(f"{top}/{name}")
    }
    for top in tops:
        for directory, names, _ in os.walk(top):
            inside = os.path.relpath(directory, top)
            lab = "/".join(inside.split("/")[:2])
            if inside in (STANDING_CGROUP, LABS) or lab in foreign_labs:
                continue
            if OUR_CGROUP.search(inside) and not _held_by_others(directory):
                found[directory] = directory
            names.sort()
    return found


def _labs(top: str) -> list[str]:
    """A lab that is up outside of the sandbox has all its processes below one directory of the v2 tree."""
    parent = os.path.join(top, LABS)
    return [f"{LABS}/{name}" for name in os.listdir(parent)] if os.path.isdir(parent) else []


def _held_by_others(directory: str) -> bool:
    return any("0" in _read(os.path.join(path, "cgroup.procs")).split() for path, _, _ in os.walk(directory))


def nft_tables() -> dict[object, str]:
    nft = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin")
    if nft is None:
        return {}
    done = subprocess.run([nft, "list", "tables"], capture_output=True, text=True, timeout=10, check=False)
    return {line: line for line in done.stdout.splitlines()}


def _read(path: str) -> str:
    """The file's text, or nothing where the process it belongs to has gone."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _readlink(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
