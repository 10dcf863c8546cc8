"""The place that root tests run in: CRIU works in it, and what is left in it is seen."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

from runtime.criu.binary import find_criu
from tests.leaks import SANDBOX, take_snapshot, wait_for_leaks_to_go


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=20, stdin=subprocess.DEVNULL)


def cgroup2_mount() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    raise AssertionError("this host has no cgroup v2 tree")


def test_the_criu_that_setup_chose_passes_its_own_check() -> None:
    done = subprocess.run(
        [*find_criu().argv, "check"], capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (0, "Looks good.\n"), done.stderr


def test_run_is_a_tmpfs_where_criu_can_keep_its_feature_list() -> None:
    fields = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    kinds = {place: kind for _, place, kind, *_ in fields}
    assert kinds.get("/run") == "tmpfs" or not SANDBOX


def test_a_left_mount_namespace_link_cgroup_and_table_are_each_named(tmp_path: Path) -> None:
    name = f"cmt{os.getpid()}"
    cgroup = cgroup2_mount() / f"cmigrate-leak-{os.getpid()}"
    before = take_snapshot(whole_host=True)
    with ExitStack() as undo:
        run("mount", "-t", "tmpfs", "tmpfs", str(tmp_path))
        undo.callback(run, "umount", str(tmp_path))
        run("ip", "netns", "add", name)
        undo.callback(run, "ip", "netns", "del", name)
        run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p")
        undo.callback(run, "ip", "link", "del", name)
        run("nft", "add", "table", "inet", name)
        undo.callback(run, "nft", "delete", "table", "inet", name)
        cgroup.mkdir()
        undo.callback(cgroup.rmdir)
        found = take_snapshot(whole_host=True).leaked_since(before)
        for line in (
            f"mount: {tmp_path} (tmpfs)",
            f"mount: /run/netns/{name} (nsfs)",
            f"network namespace: /run/netns/{name}",
            f"network link: {name}",
            f"nft table: table inet {name}",
            f"cgroup: {cgroup}",
        ):
            assert line in found
    assert wait_for_leaks_to_go(before, whole_host=True) == []
