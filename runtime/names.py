"""Names of a user-defined network's containers, in /etc/hosts of each: they find each other without a name server.

Between two marks the file holds what cmigrate knows. A container takes its file along when it moves, and addresses move
with their containers, so what it knew stays true; where it arrives, it and its neighbours there get to know each other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

from runtime.address import host_address
from runtime.api import Container, Status
from runtime.errors import RuntimeFault
from runtime.linux.inroot import open_regular_in_root

BEGIN, END = "# cmigrate: names of this network", "# cmigrate: end"
HOSTS_FILE = "/etc/hosts"
MAX_BYTES = 1 << 20
"""A file that is larger is left alone."""


def with_names(text: str, known: Mapping[str, str], gone: Iterable[str] = ()) -> str:
    """``text`` of a hosts file with ``known`` (name -> address) in it. Pure.

    Names that are there already and not known here stay, for they may be elsewhere, but for those ``gone`` and those
    whose address is another's now.
    """
    lines = text.splitlines()
    before, after, names = lines, list[str](), dict[str, str]()
    if BEGIN in lines and END in lines[(begin := lines.index(BEGIN)) :]:
        end = lines.index(END, begin)
        before, after = lines[:begin], lines[end + 1 :]
        names = {words[1]: words[0] for line in lines[begin + 1 : end] if len(words := line.split()) == 2}
    taken = set(known.values())
    kept = {name: address for name, address in names.items() if name not in gone and address not in taken}
    entries = [f"{address} {name}" for name, address in sorted({**kept, **known}.items())]
    block = [BEGIN, *entries, END] if entries else []
    return "".join(f"{line}\n" for line in [*before, *block, *after])


def refresh_names(containers: Iterable[Container], network: str, gone: Iterable[str] = ()) -> None:
    """Let the running containers of a network know each other. What can not be written to (a read-only root, no
    /etc/hosts) is left as it is."""
    members = [
        container
        for container in containers
        if container.state.status in (Status.RUNNING, Status.PAUSED)
        and container.spec.network is not None
        and container.spec.network.name == network
    ]
    known = {c.name: host_address(c.spec.network) for c in members if c.spec.network is not None}
    for container in members:
        with contextlib.suppress(OSError, RuntimeFault):
            _rewrite(container.state.init_pid, known, gone)


def _rewrite(init_pid: int, known: Mapping[str, str], gone: Iterable[str]) -> None:
    root = os.open(f"/proc/{init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        file = open_regular_in_root(root, HOSTS_FILE, os.O_RDWR)
    finally:
        os.close(root)
    try:
        old = os.pread(file, MAX_BYTES + 1, 0)
        new = with_names(old.decode(errors="surrogateescape"), known, gone).encode(errors="surrogateescape")
        if new != old and len(old) <= MAX_BYTES:
            # In place: the file may be open, or another name may lead to it.
            os.pwrite(file, new, 0)
            os.ftruncate(file, len(new))
    finally:
        os.close(file)
