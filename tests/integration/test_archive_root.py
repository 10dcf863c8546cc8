"""Checkpoint files on full disks, and with what only root can put into them."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from runtime.archive import ArchiveReader, ArchiveWriter
from runtime.errors import NoRoom
from runtime.linux import calls
from tests.support.trees import look

MIB = 1 << 20
TOP = Path(__file__).parents[2]

Small = Callable[[str], Path]


@pytest.fixture
def disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def small(disk: Path) -> Iterator[Small]:
    """A file system with room for a mebibyte."""
    with ExitStack() as undo:

        def mount(name: str) -> Path:
            (disk / name).mkdir()
            calls.mount("tmpfs", str(disk / name), "tmpfs", 0, "size=1m")
            undo.callback(calls.unmount, str(disk / name), calls.MNT_DETACH)
            return disk / name

        yield mount


@pytest.fixture
def source(disk: Path) -> Path:
    """More than there is room for, of a kind that does not compress."""
    (disk / "source").mkdir()
    (disk / "source/big").write_bytes(os.urandom(3 * MIB))
    return disk / "source"


@pytest.mark.parametrize("what", ["file", "tree", "json"])
def test_a_full_disk_leaves_no_part_of_a_file(small: Small, source: Path, what: str) -> None:
    place = small("place")
    with pytest.raises(NoRoom, match=r"web1\.ckpt") as caught, ArchiveWriter(place / "web1.ckpt") as archive:
        {
            "file": lambda: archive.add_file("a", source / "big"),
            "tree": lambda: archive.add_tree("a", source),
            "json": lambda: archive.add_json("a", os.urandom(2 * MIB).hex()),
        }[what]()
    assert "make room" in caught.value.hint
    assert os.listdir(place) == []


def test_a_disk_that_is_full_at_the_very_end_leaves_no_part_of_a_file(small: Small) -> None:
    """Every member has found room; the manifest, which lists very many, has not."""
    place = small("place")
    with pytest.raises(NoRoom, match=r"web1\.ckpt"):
        fill_up_then_end(place)
    assert os.listdir(place) == ["filler"]


def fill_up_then_end(place: Path) -> None:
    with ArchiveWriter(place / "web1.ckpt") as archive:
        for number in range(200):
            archive.add_json(f"json-{number}", number)
        with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))


def test_what_does_not_fit_where_it_is_extracted_is_told_as_such(disk: Path, small: Small, source: Path) -> None:
    with ArchiveWriter(disk / "web1.ckpt") as archive:
        archive.add_file("file", source / "big")
        archive.add_tree("tree", source)
    place = small("place")
    with ArchiveReader(disk / "web1.ckpt") as reader:
        with pytest.raises(NoRoom, match="extracted"):
            reader.extract_file("file", place / "extracted")
        assert os.listdir(place) == []
        with pytest.raises(NoRoom, match="big"):
            reader.extract_tree("tree", place)


def test_all_that_an_upper_layer_can_hold_survives(disk: Path) -> None:
    source, target = disk / "upper", disk / "again"
    source.mkdir()
    target.mkdir()
    os.mknod(source / "whiteout", stat.S_IFCHR, 0)
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(source / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mknod(source / "socket", stat.S_IFSOCK | 0o777)
    (source / "opaque").mkdir(mode=0o700)
    os.setxattr(source / "opaque", "trusted.overlay.opaque", b"y")
    (source / "capable").write_bytes(b"x")
    os.setxattr(source / "capable", "security.capability", b"\1\0\0\2\0\4\0\0" + bytes(12))
    (source / "suid").write_bytes(b"x")
    os.chown(source / "suid", 100_000, 2**32 - 2)
    (source / "suid").chmod(0o6755)
    with ArchiveWriter(disk / "web1.ckpt") as archive:
        archive.add_tree("upper", source)
    with ArchiveReader(disk / "web1.ckpt") as reader:
        reader.extract_tree("upper", target)
    assert look(target) == look(source)
    listed = subprocess.run(
        ["tar", "--zstd", "-tf", str(disk / "web1.ckpt")], capture_output=True, timeout=60, check=True, text=True
    )
    assert {"upper/whiteout", "upper/null", "upper/socket"} < set(listed.stdout.split())


def test_a_writer_that_is_killed_leaves_nothing_under_the_name(disk: Path, source: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom runtime.archive import ArchiveWriter\n"
        "with ArchiveWriter(Path(sys.argv[1])) as archive:\n"
        "    archive.add_file('a', Path(sys.argv[2]))\n    print('half way', flush=True)\n    time.sleep(60)\n"
    )
    (disk / "out").mkdir()
    command = [sys.executable, "-c", program, str(disk / "out/web1.ckpt"), str(source / "big")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=TOP) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half way\n"
        writer.send_signal(signal.SIGKILL)
    assert not (disk / "out/web1.ckpt").exists()
