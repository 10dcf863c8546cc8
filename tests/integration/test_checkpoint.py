"""A container in a file: written on one host, brought back on the same or another, and what goes wrong on the way."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.linux import calls
from tests.support.lab import TwoHosts, nothing_left_on

# Counts in memory and says so; what it holds open, and where it stands in its log, must be there afterwards.
COUNTER = (
    "import itertools, os, time\n"
    "secret = os.urandom(1 << 20)\n"
    "shared = open('/dev/shm/state', 'w+')\n"
    "gone = open('/etc/motd.gone', 'w+'); os.unlink('/etc/motd.gone'); gone.write('still here'); gone.flush()\n"
    "open('/root/file', 'w').write('mine'); os.chmod('/root/file', 0o640); os.chown('/root/file', 33, 33)\n"
    "os.mkfifo('/root/pipe'); os.unlink('/etc/issue')\n"
    "for number in itertools.count():\n"
    "    shared.seek(0); shared.write(str(number)); shared.flush(); gone.seek(0)\n"
    "    print(number, hash(secret) % 1000000, gone.read(), flush=True)\n"
    "    time.sleep(0.05)\n"
)
NAME = "counter"


@pytest.fixture
def counter(two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    two_hosts.cmigrate("host1", "run", "-d", "--name", NAME, "--rootfs", "host", "--", "python3", "-c", COUNTER)
    wait_for_lines(two_hosts, "host1", 3)
    try:
        yield two_hosts
    finally:
        for host in ("host1", "host2"):
            two_hosts.cmigrate(host, "rm", "-f", NAME, check=False)


@pytest.fixture
def directory() -> Iterator[Path]:
    """On the disk that both hosts see."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def log_of(hosts: TwoHosts, host: str) -> list[list[str]]:
    return [line.split(" ", 2) for line in hosts.cmigrate(host, "logs", NAME).stdout.splitlines()]


def wait_for_lines(hosts: TwoHosts, host: str, count: int) -> list[list[str]]:
    deadline = time.monotonic() + 10
    while len(lines := log_of(hosts, host)) < count:
        assert time.monotonic() < deadline, f"{host}: {len(lines)} lines of {count}"
        time.sleep(0.05)
    return lines


def status_on(hosts: TwoHosts, host: str) -> list[str]:
    found = hosts.lines(host, "ps", "-a", "--json")
    return [str(line.get("status")) for line in found if line.get("name") == NAME]


def it_goes_on(hosts: TwoHosts, host: str, before: int) -> None:
    """From where it stood, with what it held, without a gap or a line twice in its log."""
    lines = wait_for_lines(hosts, host, before + 5)
    assert [int(number) for number, _secret, _gone in lines] == list(range(len(lines)))
    assert {(secret, gone) for _number, secret, gone in lines} == {(lines[0][1], "still here")}
    script = "stat -c '%a %u %F' /root/file /root/pipe; cat /root/file; test ! -e /etc/issue; echo; cat /dev/shm/state"
    facts = hosts.cmigrate(host, "exec", NAME, "sh", "-c", script).stdout.split("\n")
    assert facts[:3] == ["640 33 regular file", "644 0 fifo", "mine"]
    assert int(facts[3]) >= before


def test_a_container_goes_on_on_another_host_where_it_stood(counter: TwoHosts, directory: Path) -> None:
    file = directory / "counter.ckpt"
    counter.cmigrate("host1", "checkpoint", NAME, "-o", str(file))
    assert file.stat().st_mode & 0o7777 == 0o600
    assert os.listdir(directory) == ["counter.ckpt"]
    assert status_on(counter, "host1") == ["exited"]
    before = len(log_of(counter, "host1"))
    counter.cmigrate("host2", "restore", str(file))
    it_goes_on(counter, "host2", before)


def test_a_container_goes_on_on_its_own_host(counter: TwoHosts, directory: Path) -> None:
    file = directory / "counter.ckpt"
    counter.cmigrate("host1", "checkpoint", NAME, "-o", str(file))
    before = len(log_of(counter, "host1"))
    counter.cmigrate("host1", "restore", str(file))
    it_goes_on(counter, "host1", before)


def test_a_container_that_is_left_running_runs_on_and_the_file_is_good(counter: TwoHosts, directory: Path) -> None:
    file = directory / "counter.ckpt"
    counter.cmigrate("host1", "checkpoint", NAME, "-o", str(file), "--leave-running")
    assert status_on(counter, "host1") == ["running"]
    it_goes_on(counter, "host1", len(log_of(counter, "host1")))
    counter.cmigrate("host1", "rm", "-f", NAME)
    counter.cmigrate("host2", "restore", str(file))
    it_goes_on(counter, "host2", 3)


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "other"])
def test_a_damaged_file_is_refused_and_leaves_nothing(counter: TwoHosts, directory: Path, damage: str) -> None:
    file = directory / "counter.ckpt"
    counter.cmigrate("host1", "checkpoint", NAME, "-o", str(file))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    contents = {"flipped": bytes(content), "short": bytes(content[:-1000]), "empty": b"", "other": b"x" * 5000}
    file.write_bytes(contents[damage])
    with nothing_left_on(counter, "host2"):
        done = counter.cmigrate("host2", "restore", str(file), check=False)
        assert done.returncode == 10, done.stderr
        assert "damaged" in done.stderr
        assert status_on(counter, "host2") == []


def test_a_full_disk_lets_the_container_run_on_and_leaves_no_file(counter: TwoHosts, directory: Path) -> None:
    small = directory / "small"
    small.mkdir()
    # The lab's hosts have mount namespaces of their own: they reach it through this process.
    calls.mount("tmpfs", str(small), "tmpfs", 0, "size=256k")
    try:
        done = counter.cmigrate("host1", "checkpoint", NAME, "-o", f"/proc/{os.getpid()}/root{small}/file", check=False)
        assert done.returncode == 9, (done.returncode, done.stderr)
        assert "no room" in done.stderr
        assert os.listdir(small) == []
    finally:
        calls.unmount(str(small), calls.MNT_DETACH)
    assert status_on(counter, "host1") == ["running"]
    it_goes_on(counter, "host1", len(log_of(counter, "host1")))


def test_a_place_that_can_not_be_written_to_lets_the_container_run_on(counter: TwoHosts, directory: Path) -> None:
    for place in (str(directory), "/dev/null", str(directory / "missing/file")):
        done = counter.cmigrate("host1", "checkpoint", NAME, "-o", place, check=False)
        assert done.returncode == 2, (place, done.stderr)
    assert status_on(counter, "host1") == ["running"]
    it_goes_on(counter, "host1", len(log_of(counter, "host1")))


def test_what_runs_here_is_not_restored_over(counter: TwoHosts, directory: Path) -> None:
    file = directory / "counter.ckpt"
    counter.cmigrate("host1", "checkpoint", NAME, "-o", str(file), "--leave-running")
    done = counter.cmigrate("host1", "restore", str(file), check=False)
    assert done.returncode == 4, done.stderr
    it_goes_on(counter, "host1", len(log_of(counter, "host1")))
