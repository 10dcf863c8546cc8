import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pycriu.images import fdinfo_pb2, fown_pb2, memfd_pb2, mm_pb2, vma_pb2

from runtime.criu.images import _IMG_COMMON, _MAGICS, _add_record
from runtime.criu.segments import _FDINFO, _FILES, _MEMFD_INODE, _MM, give_names, takeable

SHARED, PRIVATE, MEMFD = 1 << 7, 1 << 6, 1 << 14
NOT_SEALABLE = 1


def write(path: Path, magic: int, entries: Sequence[Any]) -> None:
    image = bytearray(_MAGICS.pack(_IMG_COMMON, magic))
    for entry in entries:
        _add_record(image, entry)
    path.write_bytes(image)


def inode(number: int, **fields: Any) -> Any:
    usual: dict[str, Any] = {"name": "/dev/zero", "uid": 5, "gid": 6, "size": 8192, "shmid": 100 + number}
    usual |= {"seals": NOT_SEALABLE, "inode_id": number, "mode": 0o100600}
    return memfd_pb2.memfd_inode_entry(**(usual | fields))


def vma(file: int, **fields: Any) -> Any:
    usual: dict[str, Any] = {"start": 0, "end": 4096, "pgoff": 0, "shmid": file, "prot": 3, "flags": 1, "fd": -1}
    return vma_pb2.vma_entry(**(usual | {"status": SHARED | MEMFD, "fdflags": os.O_RDWR} | fields))


def images(
    directory: Path, inodes: Sequence[Any], *, vmas: Sequence[Any] = (), descriptors: Sequence[int] = ()
) -> Path:
    """Of one task. File 10 + N is of inode N."""
    fown = fown_pb2.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    files = []
    for entry in inodes:
        number = 10 + entry.inode_id
        memfd = memfd_pb2.memfd_file_entry(id=number, flags=2, pos=0, fown=fown, inode_id=entry.inode_id)
        files.append(fdinfo_pb2.file_entry(type=fdinfo_pb2.MEMFD, id=number, memfd=memfd))
    write(directory / "memfd.img", _MEMFD_INODE, inodes)
    write(directory / "files.img", _FILES, files)
    entries = [fdinfo_pb2.fdinfo_entry(id=file, flags=0, type=fdinfo_pb2.MEMFD, fd=3) for file in descriptors]
    write(directory / "fdinfo-2.img", _FDINFO, entries)
    mm = mm_pb2.mm_entry(
        vmas=vmas, **{field.name: 0 for field in mm_pb2.mm_entry.DESCRIPTOR.fields if field.is_required}
    )
    write(directory / "mm-1.img", _MM, [mm])
    return directory


def test_anonymous_shared_memory_can_be_taken(tmp_path: Path) -> None:
    (found,) = takeable(images(tmp_path, [inode(1)], vmas=[vma(11)])).values()
    assert (found.id, found.uid, found.gid, found.mode, found.size_bytes) == (101, 5, 6, 0o600, 8192)


@pytest.mark.parametrize(
    ("entry", "mapped"),
    [
        (inode(1, name="mine"), vma(11)),
        (inode(1, seals=0), vma(11)),
        (inode(1, hugetlb_flag=4), vma(11)),
        (inode(1), vma(11, status=PRIVATE | MEMFD)),
        (inode(1), vma(11, fdflags=os.O_RDONLY)),
    ],
    ids=["named", "sealable", "of huge pages", "mapped privately", "mapped by a descriptor that reads only"],
)
def test_what_would_not_be_the_same_afterwards_is_left_to_criu(tmp_path: Path, entry: Any, mapped: Any) -> None:
    assert takeable(images(tmp_path, [entry, inode(2)], vmas=[mapped, vma(12)])).keys() == {102}


def test_what_a_process_has_a_descriptor_of_is_left_to_criu(tmp_path: Path) -> None:
    assert takeable(images(tmp_path, [inode(1), inode(2)], vmas=[vma(11)], descriptors=[12])).keys() == {101}


def test_images_without_memory_files_have_nothing_to_take(tmp_path: Path) -> None:
    assert takeable(tmp_path) == {}


def test_criu_asks_for_what_has_got_a_name_by_that_name(tmp_path: Path) -> None:
    directory = images(tmp_path, [inode(1), inode(2)])
    assert give_names(directory, {102: "ours"}) == {102: "/memfd:ours"}
    assert takeable(directory).keys() == {101}
