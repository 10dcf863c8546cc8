"""Reading this very process, temporary trees, and frames: what needs neither root nor a container."""

import os
import socket
import struct
import tempfile
from pathlib import Path

import pytest

from runtime.api import NetworkSpec
from runtime.facts import LowerFile, find_holders, lower_files, size_of_tree
from runtime.facts_host import is_on_tmpfs, missing_namespaces
from runtime.facts_leftovers import dead_links, dead_tables
from runtime.facts_process import ProcessView, look_at
from runtime.facts_target import AddressProbe, arp_probe, arp_sender, lower_files_at
from runtime.linux.inroot import open_regular_in_root
from runtime.linux.procfs import Mount
from runtime.linux.sockdiag import unix_peers

ADDRESS = bytes([10, 88, 0, 5])
MAC = bytes.fromhex("0242 0a58 0005")


def own() -> ProcessView:
    view = look_at(os.getpid())
    assert view is not None
    return view


def test_looking_at_this_process_sees_its_descriptors_and_mappings(tmp_path: Path) -> None:
    with open(tmp_path / "f", "w") as file, socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        view = own()
        seen = {descriptor.number: descriptor for descriptor in view.descriptors}
        assert seen[file.fileno()].link == str(tmp_path / "f")
        assert seen[file.fileno()].mount_id is not None
        assert seen[tcp.fileno()].protocol == "TCP"
        assert seen[unix.fileno()].protocol == "UNIX-STREAM"
    assert view.bits == struct.calcsize("P") * 8
    assert view.status.pid == int(os.readlink("/proc/self"))
    assert any(mapping.path.endswith(".so.6") for mapping in view.mappings)


def test_a_process_that_is_gone_is_none() -> None:
    assert look_at(2**22 + 1) is None


def test_both_ends_of_a_pair_name_each_other() -> None:
    one, two = socket.socketpair()
    with one, two:
        inodes = [os.fstat(end.fileno()).st_ino for end in (one, two)]
        peers = unix_peers()
    assert (peers[inodes[0]], peers[inodes[1]]) == (inodes[1], inodes[0])


def test_the_holder_of_a_socket_is_found() -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        inode = os.fstat(unix.fileno()).st_ino
        pid, name = find_holders({inode})[inode]
    assert pid == os.getpid()
    assert name.endswith(f"({pid})")
    assert find_holders({1}) == {}


def test_the_size_of_a_tree_counts_blocks_and_knows_when_time_was_short(tmp_path: Path) -> None:
    for number in range(3):
        directory = tmp_path / f"d{number}"
        directory.mkdir()
        (directory / "f").write_bytes(b"x" * 10_000)
    with open(tmp_path / "hole", "w") as file:
        file.truncate(1 << 30)
    total, complete = size_of_tree(tmp_path, 10)
    assert complete
    assert 30_000 <= total < 200_000
    assert size_of_tree(tmp_path, 0)[1] is False
    assert size_of_tree(tmp_path / "nothing", 10) == (0, True)


def test_files_of_the_upper_layer_and_of_other_mounts_are_not_the_lower_layers(tmp_path: Path) -> None:
    view = own()
    libraries = [m.path for m in view.mappings if "/lib" in m.path and m.path.startswith("/usr") and ".so" in m.path]
    moved = libraries[0]
    (tmp_path / moved[1:]).parent.mkdir(parents=True)
    (tmp_path / moved[1:]).touch()
    with open("/etc/passwd") as _open_file:
        found = {file.path: file for file in lower_files([own()], tmp_path, [Mount(id=1, point="/", kind="overlay")])}
    assert moved not in found
    assert found["/etc/passwd"].size_bytes == os.path.getsize("/etc/passwd")
    elsewhere = [Mount(id=1, point="/", kind="overlay"), Mount(id=2, point="/usr", kind="ext4")]
    assert all(not file.path.startswith("/usr/") for file in lower_files([view], tmp_path, elsewhere))


def test_a_path_of_a_peer_stays_below_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "etc").mkdir(parents=True)
    outside.write_text("secret")
    (root / "etc/real").write_text("inside")
    (root / "absolute").symlink_to("/etc/real")
    (root / "up").symlink_to("../../../outside")
    os.mkfifo(root / "pipe")
    wanted = [
        LowerFile(path=path, size_bytes=0, mode=0)
        for path in ("/etc/real", "/absolute", "/up", "/pipe", "/etc", "/none", "/../outside")
    ]
    found = lower_files_at(str(root), wanted)
    assert {path: file.size_bytes for path, file in found.items() if file} == {"/etc/real": 6, "/absolute": 6}
    assert lower_files_at(str(tmp_path / "none"), wanted[:1]) == {"/etc/real": None}


def test_a_device_is_not_even_opened() -> None:
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        with pytest.raises(FileNotFoundError):
            open_regular_in_root(root, "/dev/null")
    finally:
        os.close(root)


def reply(operation: int = 2, sender: bytes = ADDRESS) -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + MAC + sender + b"\0" * 6 + ADDRESS
    return b"\xff" * 6 + MAC + b"\x08\x06" + body


def test_who_answers_for_an_address_is_read_from_replies_and_from_questions() -> None:
    assert arp_sender(reply(), ADDRESS) == "02:42:0a:58:00:05"
    assert arp_sender(reply(operation=1), ADDRESS) == "02:42:0a:58:00:05"


@pytest.mark.parametrize("frame", [b"", b"x" * 20, reply(sender=bytes(4)), reply(operation=3), b"x" * 42])
def test_other_frames_are_no_answer(frame: bytes) -> None:
    assert arp_sender(frame, ADDRESS) == ""


def test_a_probe_names_no_sender_so_that_no_cache_changes() -> None:
    frame = arp_probe(MAC, ADDRESS)
    assert len(frame) == 42
    assert arp_sender(frame, bytes(4)) == "02:42:0a:58:00:05"
    assert arp_sender(frame, ADDRESS) == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="packet sockets are root's")
def test_without_a_bridge_nobody_answers() -> None:
    network = NetworkSpec(address="10.88.0.5/16", mac="02:42:0a:58:00:05", gateway="10.88.0.1")
    with AddressProbe("no-such-bridge", network) as probe:
        assert probe.answer(5.0) == ""


def test_proc_is_no_tmpfs() -> None:
    assert not is_on_tmpfs(Path("/proc"))


def test_dev_shm_is_a_tmpfs() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        assert is_on_tmpfs(Path(directory))
        assert is_on_tmpfs(Path(directory, "not", "there", "yet"))


def test_a_namespace_nobody_knows_is_missing() -> None:
    assert missing_namespaces(["no-such"]) == ("no-such",)


def test_links_are_dead_when_their_container_is() -> None:
    names = ["lo", "eth0", "cmigrate0", "cm0123456789ab", "cmaaaaaaaaaaaa", "cm123"]
    (found,) = dead_links(names, {"aaaaaaaaaaaa"})
    assert found.remedy == "ip link delete cm0123456789ab"


def test_tables_are_dead_when_their_container_or_criu_is() -> None:
    tables = [
        "table ip cmigrate",
        "table ip cmigrate-0123456789ab",
        "table ip cmigrate-aaaaaaaaaaaa",
        "table inet CRIU-7",
        "table ip filter",
    ]
    found = dead_tables(tables, {"aaaaaaaaaaaa"})
    assert [leftover.remedy for leftover in found] == [
        "nft delete table inet CRIU-7",
        "nft delete table ip cmigrate-0123456789ab",
    ]
