"""The last steps of a process before it becomes the container's own: user, capabilities, seccomp, exec. Stdlib only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import BadInput
from runtime.linux import calls

LAST_CAPABILITY_FILE = "/proc/sys/kernel/cap_last_cap"
# What a shell answers for a program that cannot be run, and for one that is not there.
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whom a process runs as inside the container."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def look_up_user(user: str, passwd: str, group: str) -> Identity:
    """Read ``name|uid[:group|gid]`` against the texts of /etc/passwd and /etc/group.

    A number need not be listed; a name must be. Raises BadInput.
    """
    name, _, group_name = user.partition(":")
    rows = [line.split(":") for line in passwd.splitlines() if line.count(":") >= 6]
    row = next((row for row in rows if name in (row[0], row[2])), None)
    if row is None and not name.isdigit():
        raise BadInput(
            f"no user {name!r} in the container's /etc/passwd", hint="give a uid, or add the user to the image"
        )
    uid, gid, home = (int(row[2]), int(row[3]), row[5]) if row else (int(name), 0, "/")
    group_rows = [line.split(":") for line in group.splitlines() if line.count(":") >= 3]
    if group_name:
        match = next((r for r in group_rows if group_name in (r[0], r[2])), None)
        if match is None and not group_name.isdigit():
            raise BadInput(f"no group {group_name!r} in the container's /etc/group")
        gid = int(match[2]) if match else int(group_name)
        return Identity(uid=uid, gid=gid, groups=(gid,), home=home)
    login = row[0] if row else None
    groups = tuple(sorted({gid} | {int(r[2]) for r in group_rows if login and login in r[3].split(",")}))
    return Identity(uid=uid, gid=gid, groups=groups, home=home)


def read_text(path: str) -> str:
    """The file's text, empty when it is not there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def become(identity: Identity, capabilities: Sequence[int], seccomp: bytes) -> None:
    """Keep only ``capabilities`` (none at all unless uid is 0), change user, load the seccomp filter.

    The order matters: the filter is loaded while CAP_SYS_ADMIN is still there, so that no_new_privs is not needed
    and setuid programs of the image work as in docker.
    """
    last = int(read_text(LAST_CAPABILITY_FILE) or 40)
    for number in range(last + 1):
        if number not in capabilities:
            calls.prctl(calls.PR_CAPBSET_DROP, number)
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    if seccomp:
        calls.install_seccomp_filter(seccomp)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    mask = sum(1 << number for number in capabilities if number <= last) if identity.uid == 0 else 0
    calls.set_capabilities(mask, mask, 0)


def find_program(name: str, path: str, cwd: str) -> str:
    """The file that ``name`` means, as a shell would look it up; raises FileNotFoundError or PermissionError."""
    if "/" in name:
        target = name if name.startswith("/") else os.path.join(cwd, name)
        if not os.path.exists(target):
            raise FileNotFoundError(2, "no such file or directory", name)
        return target
    found = shutil.which(name, path=path)
    if not found:
        raise FileNotFoundError(2, "executable file not found in $PATH", name)
    return found
