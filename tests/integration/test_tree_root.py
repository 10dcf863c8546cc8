"""Trees with all that only root can make, on real file systems: an overlay's upper layer, a tmpfs, a full disk; and
while programs write to them."""

import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from runtime.errors import CorruptData, MissingFeature, NoRoom
from runtime.linux import calls
from runtime.tree import Change, Kind, Op, SentContent, Snapshot, digest
from runtime.treesink import TreeSink
from tests.support.trees import carry, look, no_inodes, over_the_wire

CHURN = Path(__file__).parents[1] / "workloads/file_churn.py"
MIB = 1 << 20
# linux/capability.h, struct vfs_cap_data, revision 2, effective: CAP_NET_BIND_SERVICE
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
# linux/posix_acl_xattr.h, version 2: owner rw, user 1234 r, group r, mask rw, others none
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 6, 2**32 - 1), (2, 4, 1234), (4, 4, 2**32 - 1), (0x10, 6, 2**32 - 1), (0x20, 0, 2**32 - 1))
)

Mount = Callable[..., Path]


@pytest.fixture
def disk() -> Iterator[Path]:
    """/tmp may be a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def mount(disk: Path) -> Iterator[Mount]:
    with ExitStack() as undo:

        def do_mount(name: str, fstype: str, data: str) -> Path:
            point = disk / name
            point.mkdir()
            calls.mount(fstype, str(point), fstype, 0, data)
            undo.callback(calls.unmount, str(point), calls.MNT_DETACH)
            return point

        yield do_mount


def make_lower(lower: Path) -> None:
    for directory in ("gone", "emptied", "kept", "kept/deep"):
        (lower / directory).mkdir(parents=True)
        (lower / directory / "file").write_text(directory)
    (lower / "program").write_bytes(b"\x7fELF")
    (lower / "program").chmod(0o4755)
    (lower / "removed").write_text("removed")


def use_container(merged: Path) -> None:
    """What programs do to a root: each leaves its own mark in the upper layer."""
    (merged / "removed").unlink()
    (merged / "gone/file").unlink()
    (merged / "gone").rmdir()
    (merged / "emptied/file").unlink()
    (merged / "emptied").rmdir()
    (merged / "emptied").mkdir(mode=0o700)
    (merged / "emptied/new").write_text("in an opaque directory")
    (merged / "kept/deep/file").write_text("changed")
    os.chown(merged / "program", 1000, 2000)
    (merged / "program").chmod(0o6755)
    (merged / "capable").write_bytes(b"x" * 100)
    os.setxattr(merged / "capable", "security.capability", CAPABILITY)
    (merged / "shared").mkdir()
    os.setxattr(merged / "shared", "system.posix_acl_default", ACL)
    (merged / "shared/inherits").write_text("x")
    os.mknod(merged / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mkfifo(merged / "pipe", 0o620)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(merged / "socket"))
    (merged / "second").hardlink_to(merged / "kept/deep/file")
    merged.chmod(0o711)


def test_a_container_root_looks_the_same_through_the_overlay_of_the_other_host(disk: Path, mount: Mount) -> None:
    for name in ("lower", "upper", "work", "upper2", "work2"):
        (disk / name).mkdir()
    make_lower(disk / "lower")
    options = "redirect_dir=off,metacopy=off,index=off,xino=off"
    merged = mount("merged", "overlay", f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work,{options}")
    os.setxattr(disk / "upper", "trusted.overlay.uuid", b"of this host only")
    with TreeSink(disk / "upper2") as sink:
        sent = SentContent()
        first, _changes, _bytes = carry(disk / "upper", sink, sent=sent, settle=True)
        use_container(merged)
        carry(disk / "upper", sink, first, sent=sent)
        sink.finish()
        sink.sync()
        sink.verify(digest(disk / "upper"))
    assert os.listxattr(disk / "upper2") == []
    target = mount("target", "overlay", f"lowerdir={disk}/lower,upperdir={disk}/upper2,workdir={disk}/work2,{options}")
    there, here = look(target), look(merged)
    assert there == here
    assert not {"removed", "gone", "gone/file", "emptied/file"} & there.keys()
    assert os.getxattr(target / "capable", "security.capability") == CAPABILITY
    assert os.getxattr(target / "shared/inherits", "system.posix_acl_access") == ACL
    assert (target / "program").stat().st_mode & 0o7777 == 0o6755


def test_a_full_target_is_told_as_such(disk: Path, mount: Mount) -> None:
    (disk / "source").mkdir()
    (disk / "source/big").write_bytes(os.urandom(2 * MIB))
    small = mount("small", "tmpfs", "size=1m")
    with TreeSink(small) as sink, pytest.raises(NoRoom, match="big"):
        carry(disk / "source", sink)


def test_a_target_without_inodes_is_full_too(disk: Path, mount: Mount) -> None:
    (disk / "source").mkdir()
    for number in range(20):
        (disk / f"source/{number}").touch()
    small = mount("small", "tmpfs", "nr_inodes=10")
    with TreeSink(small) as sink, pytest.raises(NoRoom):
        carry(disk / "source", sink)


def test_a_mount_below_the_root_is_not_written_to(disk: Path, mount: Mount) -> None:
    """A change can not lead out of the tree by a mount either."""
    inner = mount("inner", "tmpfs", "size=1m")
    change = Change(op=Op.PUT, path="inner/file", mode=0o644)
    with TreeSink(disk) as sink, pytest.raises(CorruptData, match="inner/file"):
        sink.apply(over_the_wire(change))
    assert os.listdir(inner) == []


def test_a_file_mounted_into_the_tree_is_not_carried(disk: Path, mount: Mount) -> None:
    tmpfs = mount("tmpfs", "tmpfs", "size=1m")
    (disk / "volume").write_text("of the host")
    (tmpfs / "volume").touch()
    calls.mount(str(disk / "volume"), str(tmpfs / "volume"), "", calls.MS_BIND)
    try:
        (disk / "target").mkdir()
        with TreeSink(disk / "target") as sink:
            carry(tmpfs, sink)
    finally:
        calls.unmount(str(tmpfs / "volume"))
    assert os.listdir(disk / "target") == []


def test_whatever_owner_a_file_has_it_keeps(disk: Path) -> None:
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    for number, owner in enumerate((0, 1, 65534, 100_000, 2**32 - 2)):
        (source / f"{number}").write_text("x")
        os.chown(source / f"{number}", owner, owner)
        (source / f"{number}").chmod(0o6711)
    with TreeSink(target) as sink:
        carry(source, sink)
        sink.finish()
    assert look(target) == look(source)


def test_a_whiteout_is_no_device_of_its_own(disk: Path) -> None:
    """Overlay links its whiteouts with each other; removing one and making another must not matter."""
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    os.mknod(source / "a", stat.S_IFCHR, 0)
    os.link(source / "a", source / "b")
    with TreeSink(target) as sink:
        first, changes, _bytes = carry(source, sink)
        assert [(change.op, change.kind) for change in changes[1:]] == [(Op.PUT, Kind.WHITEOUT)] * 2
        os.link(source / "b", source / "c")
        _second, changes, _bytes = carry(source, sink, first)
        sink.finish()
    assert [change.path for change in changes] == ["", "c"]
    assert look(target) == look(source)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("on", ["disk", "tmpfs"])
def test_a_tree_that_programs_write_to_is_right_after_a_pass_without_them(
    disk: Path, mount: Mount, seed: int, on: str
) -> None:
    """What a move does: a pass while they run, and one when they are frozen, with their mappings open."""
    source = mount("source", "tmpfs", "size=64m") if on == "tmpfs" else disk / "source"
    source.mkdir(exist_ok=True)
    (disk / "target").mkdir()
    sent = SentContent()
    with (
        TreeSink(disk / "target") as sink,
        subprocess.Popen([sys.executable, CHURN, source, str(seed)], stdout=subprocess.PIPE) as churn,
    ):
        try:
            assert churn.stdout is not None
            assert churn.stdout.readline() == b"ready\n"
            time.sleep(0.3)
            first, _changes, whole_bytes = carry(source, sink, sent=sent, settle=on == "disk")
            time.sleep(0.1)
            churn.send_signal(signal.SIGSTOP)
            assert os.waitid(os.P_PID, churn.pid, os.WSTOPPED) is not None
            always = Snapshot.file_inodes if on == "tmpfs" else no_inodes
            _second, changes, rest_bytes = carry(source, sink, first, sent=sent, always=always)
            sink.finish()
            assert digest(disk / "target") == digest(source)
            assert look(disk / "target") == look(source)
        finally:
            churn.send_signal(signal.SIGCONT)
            churn.terminate()
    assert changes
    assert whole_bytes
    assert rest_bytes


def test_xattrs_that_the_target_can_not_hold_are_a_missing_feature(disk: Path, mount: Mount) -> None:
    """Ramfs has none, whatever the kernel."""
    ramfs = mount("ramfs", "ramfs", "")
    change = Change(op=Op.PUT, path="f", mode=0o644, xattrs=(("user.a", b"b"),))
    with TreeSink(ramfs) as sink:
        sink.apply(change)
        with pytest.raises(MissingFeature, match="can not hold all of 'f'"):
            sink.finish()


def test_errors_of_the_kernel_that_are_nobodys_lie_keep_their_number(disk: Path, mount: Mount) -> None:
    read_only = mount("read-only", "tmpfs", "size=1m")
    calls.mount("", str(read_only), "", calls.MS_REMOUNT | calls.MS_RDONLY)
    with TreeSink(read_only) as sink, pytest.raises(Exception, match="EROFS") as caught:
        sink.apply(Change(op=Op.PUT, path="f"))
    assert getattr(caught.value, "errno", None) == errno.EROFS
