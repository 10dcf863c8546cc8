"""Names of a user-defined network's containers, in /etc/hosts of each: they find each other without a name server.

Between two marks the file holds what cmigrate knows. A container takes its file along when it moves, and addresses move
with their containers, so what it knew stays true; where it arrives, it and its neighbours there get to know each other,
and they hear from it whom it knows elsewhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping

from runtime.address import host_address
from runtime.api import Container, Status
from runtime.errors import RuntimeFault
from runtime.linux.inroot import open_regular_in_root

BEGIN, END = "# cmigrate: names of this network", "# cmigrate: end"
HOSTS_FILE = "/etc/hosts"
MAX_BYTES = 1 << 20
"""A file that is larger is left alone."""


def _parted(text: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Lines before our part, the names in it, lines behind it."""
    lines = text.splitlines()
    if BEGIN not in lines or END not in lines[(begin := lines.index(BEGIN)) :]:
        return lines, {}, []
    end = lines.index(END, begin)
    names = {words[1]: words[0] for line in lines[begin + 1 : end] if len(words := line.split()) == 2}
    return lines[:begin], names, lines[end + 1 :]


def names_in(text: str) -> dict[str, str]:
    """Name -> address of all that a hosts file has from us. Pure."""
    return _parted(text)[1]


def with_names(
    text: str, known: Mapping[str, str], gone: Iterable[str] = (), heard: Mapping[str, str] | None = None
) -> str:
    """``text`` of a hosts file with ``known`` (name -> address) in it, and what was ``heard`` of others. Pure.

    Names that are there already and not known here stay, for they may be elsewhere, but for those ``gone`` and those
    whose address is another's now.
    """
    before, names, after = _parted(text)
    taken = set(known.values())
    elsewhere = {**(heard or {}), **names}
    kept = {name: address for name, address in elsewhere.items() if name not in gone and address not in taken}
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
    heard: dict[str, str] = {}
    for container in members:
        with contextlib.suppress(OSError, RuntimeFault), _hosts_file(container.state.init_pid) as file:
            heard |= names_in(_read(file))
    for container in members:
        with contextlib.suppress(OSError, RuntimeFault), _hosts_file(container.state.init_pid) as file:
            _rewrite(file, known, set(gone), heard)


@contextlib.contextmanager
def _hosts_file(init_pid: int) -> Iterator[int]:
    root = os.open(f"/proc/{init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        file = open_regular_in_root(root, HOSTS_FILE, os.O_RDWR)
    finally:
        os.close(root)
    try:
        yield file
    finally:
        os.close(file)


def _read(file: int) -> str:
    return os.pread(file, MAX_BYTES + 1, 0).decode(errors="surrogateescape")


def _rewrite(file: int, known: Mapping[str, str], gone: Iterable[str], heard: Mapping[str, str]) -> None:
    old = _read(file)
    text = with_names(old, known, gone, heard)
    new = text.encode(errors="surrogateescape")
    if text != old and len(old) <= MAX_BYTES:
        # In place: the file may be open, or another name may lead to it.
        os.pwrite(file, new, 0)
        os.ftruncate(file, len(new))
