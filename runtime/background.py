"""Copying beside what runs: a cgroup whose members get little of a processor that others want, and all of an idle one.

A nice value would not do: between sessions (sched_autogroup) and between cgroups the kernel weighs groups, not tasks.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from runtime.cgroup_layout import CgroupLayout
from runtime.errors import MissingFeature

# At the root, beside the groups of everything else on the host: that is whom it has to give way to.
GROUP = "cmigrate-copying"
# An eighth of what a group has that nobody has said anything about: 1024 of v1, 100 of v2 (cgroup-v2.rst).
V1_SHARES = 128
V2_WEIGHT = 12
# The last member of another command may remove the group between our making and our entering it.
ATTEMPTS = 5
# In cgroup.procs: whoever writes it, with all threads.
_MYSELF = "0"


class Background:
    """This process, from ``enter`` to ``leave``, and what it starts meanwhile for good. Both are idempotent, both take
    milliseconds, and where the kernel does not know of weights they do nothing."""

    def __init__(self, layout: CgroupLayout | None = None, cgroup_text: str | None = None) -> None:
        """``cgroup_text``: of /proc/self/cgroup."""
        self._entered = False
        self._group: Path | None = None
        self._home = Path()
        self._weight = ("cpu.weight", V2_WEIGHT)
        with contextlib.suppress(MissingFeature, OSError):
            found = layout or CgroupLayout.probe()
            text = Path("/proc/self/cgroup").read_text() if cgroup_text is None else cgroup_text
            v1 = dict(found.v1).get("cpu")
            top, own = v1 or found.v2, _own_path(text, "cpu" if v1 else "")
            # From inside a cgroup namespace the way back could not be named.
            if top is not None and own is not None and ".." not in own:
                self._group, self._home = top / GROUP, top / own.lstrip("/")
                if v1 is not None:
                    self._weight = ("cpu.shares", V1_SHARES)

    def enter(self) -> None:
        if self._group is None or self._entered:
            return
        name, weight = self._weight
        # Only v2 has this file. Where the controller is not for us to turn on, there is no weight either.
        with contextlib.suppress(OSError):
            _write(self._group.parent / "cgroup.subtree_control", "+cpu")
        for _attempt in range(ATTEMPTS):
            try:
                self._group.mkdir(exist_ok=True)
                _write(self._group / name, str(weight))
                _write(self._group / "cgroup.procs", _MYSELF)
                self._entered = True
                return
            except FileNotFoundError:
                continue
            except OSError:
                break
        self.sweep()

    def leave(self) -> None:
        if self._entered:
            self._entered = False
            # Where its own group has gone it stays, which makes it slow at worst.
            with contextlib.suppress(OSError):
                _write(self._home / "cgroup.procs", _MYSELF)
            self.sweep()

    def sweep(self) -> None:
        """Remove the group where nobody is in it any more: a killed process leaves it behind."""
        if self._group is not None:
            with contextlib.suppress(OSError):
                self._group.rmdir()

    def __enter__(self) -> Self:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


def _own_path(text: str, controller: str) -> str | None:
    """Of the line of the hierarchy that has the controller; "" for version 2."""
    for line in text.splitlines():
        _number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None


def _write(file: Path, value: str) -> None:
    """Into a file that exists: the kernel makes them."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)
