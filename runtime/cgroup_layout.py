"""Where this host's cgroup hierarchies are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import MissingFeature

WANTED_V1 = ("memory", "cpu", "cpuacct", "pids", "freezer")


@dataclass(frozen=True, kw_only=True)
class CgroupLayout:
    """Where the hierarchies are mounted: ``v2`` (None when there is none) and v1 controllers by name."""

    v2: Path | None
    v1: tuple[tuple[str, Path], ...]

    @classmethod
    def probe(cls) -> CgroupLayout:
        """Of this process's mount namespace. Raises MissingFeature without any cgroup mount."""
        layout = parse_layout(Path("/proc/self/mountinfo").read_text())
        if layout.v2 is None and "freezer" not in dict(layout.v1):
            raise MissingFeature("no cgroup hierarchy is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup")
        return layout


_OCTAL = re.compile(r"\\([0-7]{3})")  # how blanks and the like are written in mountinfo


def parse_layout(mountinfo: str) -> CgroupLayout:
    """Read the text of /proc/PID/mountinfo. A hierarchy seen from inside a cgroup namespace counts as it is."""
    v2: Path | None = None
    v1: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        point = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4]))
        if kinds[0] == "cgroup2" and v2 is None:
            v2 = point
        if kinds[0] == "cgroup":
            for name in kinds[2].split(","):
                if name in WANTED_V1:
                    v1.setdefault(name, point)
    return CgroupLayout(v2=v2, v1=tuple(sorted(v1.items())))
