"""How much was written to disks: what reached them, and what was put into the page cache to be written."""

import os
from dataclasses import dataclass
from pathlib import Path

SECTOR_BYTES = 512
# Not disks, or disks that lie on others: what is written to them would be counted twice or is memory.
NOT_DISKS = ("loop", "ram", "zram", "dm-", "md", "sr")


@dataclass(frozen=True, kw_only=True)
class Written:
    """``to_disks_bytes`` is the block layer's count of all disks. ``dirtied_bytes`` counts every page of a file on a
    disk's file system at the moment it is written to, also of files that are deleted before they reach the disk;
    tmpfs is not in it."""

    to_disks_bytes: int
    dirtied_bytes: int

    def __sub__(self, before: "Written") -> "Written":
        return Written(
            to_disks_bytes=self.to_disks_bytes - before.to_disks_bytes,
            dirtied_bytes=self.dirtied_bytes - before.dirtied_bytes,
        )


def written_so_far() -> Written:
    """Everything that waits is written first, so that it is counted."""
    os.sync()
    sectors = 0
    for line in Path("/proc/diskstats").read_text().splitlines():
        fields = line.split()
        is_partition = Path(f"/sys/class/block/{fields[2]}/partition").exists()
        if not fields[2].startswith(NOT_DISKS) and not is_partition:
            sectors += int(fields[9])
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return Written(
        to_disks_bytes=sectors * SECTOR_BYTES, dirtied_bytes=int(counters["nr_dirtied"]) * os.sysconf("SC_PAGE_SIZE")
    )
