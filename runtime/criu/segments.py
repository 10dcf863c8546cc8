"""Shared memory that a restoring CRIU takes from outside instead of making and filling it: in no time at any size.

CRIU asks for an inherited descriptor by a memory file's name before it makes that file for a mapping
(criu/files-reg.c, open_filemap). So a memory file that holds the content already is given a name of its own in the
images. Not where a process has a descriptor of it: CRIU would hand out one and the same to all of them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycriu.images import fdinfo_pb2, memfd_pb2, mm_pb2

from runtime.criu.images import _IMG_COMMON, _MAGICS, _add_record, _decode, _records, image_files

# criu/include/magic.h
_MEMFD_INODE = 0x48453499
_FILES = 0x56303138
_FDINFO = 0x56213732
_MM = 0x57492820
# criu/include/image.h
_FILE_SHARED = 1 << 7
_AREA_MEMFD = 1 << 14
# linux/fcntl.h: what a memory file has that was made without MFD_ALLOW_SEALING, as all anonymous shared memory is.
_F_SEAL_SEAL = 1
# What CRIU calls anonymous shared memory, whose name nobody has given it.
ANONYMOUS_NAME = "/dev/zero"
_PREFIX = "/memfd:"


@dataclass(frozen=True, kw_only=True)
class MemoryFile:
    """A memory file of an image set; ``id`` names its pages there."""

    id: int
    name: str
    uid: int
    gid: int
    mode: int
    size_bytes: int

    def prepare(self, fd: int) -> None:
        """Give a memory file of ours the size, owner and permissions of this one."""
        os.ftruncate(fd, self.size_bytes)
        os.fchown(fd, self.uid, self.gid)
        os.fchmod(fd, self.mode)


def takeable(images: Path) -> dict[int, MemoryFile]:
    """By id, what CRIU can be given. Raises CorruptData."""
    path = images / "memfd.img"
    if not path.exists():
        return {}
    inodes = {entry.inode_id: entry for entry in _all(path, _MEMFD_INODE, memfd_pb2.memfd_inode_entry)}
    inode_of = {
        entry.id: entry.memfd.inode_id
        for entry in _all(images / "files.img", _FILES, fdinfo_pb2.file_entry)
        if entry.type == fdinfo_pb2.MEMFD
    }
    unfit = {inode_of[file] for file in _held_by_descriptor(images) | _mapped_unusually(images) if file in inode_of}
    return {
        entry.shmid: MemoryFile(
            id=entry.shmid,
            name=entry.name,
            uid=entry.uid,
            gid=entry.gid,
            mode=stat.S_IMODE(entry.mode),
            size_bytes=entry.size,
        )
        for number, entry in inodes.items()
        if number not in unfit and entry.HasField("mode") and not entry.HasField("hugetlb_flag")
        if entry.seals == _F_SEAL_SEAL and entry.name == ANONYMOUS_NAME
    }


def _held_by_descriptor(images: Path) -> set[int]:
    found = set()
    for path in image_files(images, "fdinfo-"):
        entries = _all(path, _FDINFO, fdinfo_pb2.fdinfo_entry)
        found |= {entry.id for entry in entries if entry.type == fdinfo_pb2.MEMFD}
    return found


def _mapped_unusually(images: Path) -> set[int]:
    """Files of which a mapping is private, or has less rights than a descriptor of ours would give it."""
    found = set()
    for path in image_files(images, "mm-"):
        for entry in _all(path, _MM, mm_pb2.mm_entry):
            for vma in entry.vmas:
                shared = vma.status & _FILE_SHARED
                if vma.status & _AREA_MEMFD and not (shared and vma.fdflags & os.O_ACCMODE == os.O_RDWR):
                    found.add(vma.shmid)
    return found


def give_names(images: Path, names: Mapping[int, str]) -> dict[int, str]:
    """Make CRIU ask for these memory files by names that are theirs alone. The keys of its inherited descriptors, by
    id. Raises CorruptData."""
    path = images / "memfd.img"
    image = bytearray(_MAGICS.pack(_IMG_COMMON, _MEMFD_INODE))
    for entry in _all(path, _MEMFD_INODE, memfd_pb2.memfd_inode_entry):
        entry.name = names.get(entry.shmid, entry.name)
        _add_record(image, entry)
    path.write_bytes(image)
    return {number: _PREFIX + name for number, name in names.items()}


def _all(path: Path, magic: int, message: Any) -> list[Any]:
    return [_decode(message, record, path) for record in _records(path, magic)]
