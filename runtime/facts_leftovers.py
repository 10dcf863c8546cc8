"""What crashed commands and moves may have left on this host. Reading only; what is in use is not named."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from runtime.api import ID_PATTERN, Status
from runtime.container import Containers
from runtime.facts_host import PROGRAM_TIMEOUT_S, SEARCH_PATH
from runtime.network import in_network_namespace, link_name

# A move that has just begun or ended may hold nothing open for a moment.
SETTLE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """``what`` it is, and the command that removes it."""

    what: str
    remedy: str


def find_leftovers(containers: Containers) -> list[Leftover]:
    """Links, tables, cgroups, run directories and move directories that belong to nothing alive."""
    live = _live_ids(containers)
    found = dead_links([name for _index, name in socket.if_nameindex()], live)
    # A dump that is under way locks the network for good reason.
    locks_are_dead = not _criu_works()
    tables = [table for table in _nft_tables() if locks_are_dead or not is_criu_table(table)]
    found += dead_tables(tables, live)
    for container in containers.list(all_states=False) if locks_are_dead else ():
        with contextlib.suppress(OSError):
            inside = in_network_namespace(container.state.init_pid, _nft_tables)
            found += [
                Leftover(
                    what=f"the network of container {container.name} is still locked by a dead CRIU ({table})",
                    remedy=f"nsenter -t {container.state.init_pid} -n nft delete {table}",
                )
                for table in inside
                if is_criu_table(table)
            ]
    for path in containers.cgroup("0" * 12).paths():
        found += _dead_directories(path.parent, live, "cgroup", "rmdir")
    found += _dead_directories(containers.host.run_dir, live, "run directory", "rm -r")
    for base in (containers.host.run_dir, containers.host.state_dir):
        found += _dead_moves(base / "moves")
    return found


def _live_ids(containers: Containers) -> set[str]:
    """Containers that run, wait to run for the first time, or are on their way here."""
    dead = (Status.EXITED, Status.MOVED)
    live = {container.id for container in containers.list() if container.state.status not in dead}
    return live | {spec.id for _move, spec in containers.store.incoming()}


def dead_links(names: Collection[str], live: Collection[str]) -> list[Leftover]:
    """Host ends of veth pairs, by name."""
    return [
        Leftover(what=f"network link {name} of a container that does not run", remedy=f"ip link delete {name}")
        for name in sorted(names)
        if ID_PATTERN.fullmatch(name.removeprefix("cm")) and link_name(name.removeprefix("cm")) == name
        if name.removeprefix("cm") not in live
    ]


def dead_tables(tables: Collection[str], live: Collection[str]) -> list[Leftover]:
    """Lines of ``nft list tables`` ("table ip cmigrate-0123456789ab")."""
    found = []
    for table in sorted(tables):
        name = table.split()[-1]
        if table.split()[1] == "bridge":
            continue  # of a wire: `network wires` knows those, and whether they are over
        container_id = name.removeprefix("cmigrate-")
        if is_criu_table(table):
            found.append(Leftover(what=f"nft {table} of a dead CRIU blocks packets", remedy=f"nft delete {table}"))
        elif name != container_id and ID_PATTERN.fullmatch(container_id) and container_id not in live:
            what = f"nft {table} publishes ports of a container that does not run"
            found.append(Leftover(what=what, remedy=f"nft delete {table}"))
    return found


def is_criu_table(table: str) -> bool:
    """CRIU names its lock after the run: "table inet CRIU-<number>"."""
    return table.split()[-1].startswith("CRIU-")


def _nft_tables() -> list[str]:
    """Of the network namespace of the calling thread; none where nft does not work."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["nft", "list", "tables"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT_S,
            check=False,
            env={"PATH": SEARCH_PATH},
        )
        return [line for line in done.stdout.splitlines() if line.startswith("table ")]
    return []


def _criu_works() -> bool:
    """Whether a ``criu swrk`` is alive, whatever loader it was started by."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if b"swrk" in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                    return True
    return False


def _dead_directories(base: Path, live: Collection[str], kind: str, command: str) -> list[Leftover]:
    names = sorted(os.listdir(base)) if base.is_dir() else []
    return [
        Leftover(what=f"{kind} {base / name} of a container that does not run", remedy=f"{command} {base / name}")
        for name in names
        if ID_PATTERN.fullmatch(name) and name not in live and (base / name).is_dir()
    ]


def _dead_moves(base: Path) -> list[Leftover]:
    found = []
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > SETTLE_S
            if old and not _is_open(path):
                found.append(Leftover(what=f"files of a move that is over: {path}", remedy=f"rm -r {path}"))
    return found


def _is_open(directory: Path) -> bool:
    """Whether any process of this host has something below it open; CRIU and the agents do while a move is on."""
    wanted = os.path.realpath(directory)
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{name}/fd"):
                    with contextlib.suppress(OSError):
                        if os.readlink(f"/proc/{name}/fd/{number}").startswith(wanted):
                            return True
    return False
