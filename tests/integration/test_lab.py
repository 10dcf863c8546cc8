"""The lab: hosts that are apart where hosts are, and of which nothing stays."""

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.lab.cgroups import LabCgroup, find_hierarchies
from migrate.lab.lab import Lab
from migrate.lab.record import read_record
from runtime.errors import BadInput, NotFound, WrongState
from tests.support.netns import in_netns

TIMEOUT_S = 30.0
CMIGRATE = Path(sys.executable).with_name("cmigrate")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """On a disk, as a lab should be."""
    directory = Path(tempfile.mkdtemp(prefix="cmigrate-lab-", dir="/var/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def lab(place: Path) -> Iterator[Lab]:
    lab = Lab(place / "module")
    lab.up()
    yield lab
    lab.down()


@pytest.fixture
def other(place: Path) -> Iterator[Lab]:
    """A lab that is down; taken down afterwards whatever a test does with it."""
    lab = Lab(place / "other")
    yield lab
    lab.down()


def said(lab: Lab, host: str, *argv: str) -> str:
    done = lab.exec(host, argv, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return str(done.stdout).strip()


def cmigrate(lab: Lab, *argv: str) -> subprocess.CompletedProcess[str]:
    """The command as a person calls it, on the machine itself."""
    return subprocess.run(
        [str(CMIGRATE), "lab", *argv],
        env={**os.environ, "CMIGRATE_LAB_DIR": str(lab.directory)},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def tree_of(lab: Lab) -> LabCgroup:
    return LabCgroup(find_hierarchies(), lab.id)


def test_each_host_has_its_own_name_address_run_and_state(lab: Lab) -> None:
    script = "hostname; ip -4 -o address show dev cmigrate0; touch /run/mark /var/lib/cmigrate/mark; ls /run"
    for number, host in enumerate(lab.hosts, start=1):
        seen = said(lab, host.name, "sh", "-c", script)
        assert seen.splitlines()[0] == f"host{number}"
        assert f" 10.88.255.{number}/16 " in seen
        assert (lab.directory / host.name / "state" / "mark").exists()
        said(lab, host.name, "rm", "/run/mark", "/var/lib/cmigrate/mark")
    assert [host.name for host in lab.hosts] == ["host1", "host2"]


def test_what_one_host_writes_below_run_no_other_host_sees(lab: Lab) -> None:
    said(lab, "host1", "touch", "/run/only-here")
    assert "only-here" not in said(lab, "host2", "ls", "/run")
    assert not Path("/run/only-here").exists()
    said(lab, "host1", "rm", "/run/only-here")


def test_hosts_know_each_other_both_ways_over_both_transports(lab: Lab) -> None:
    for here, there in (("host1", "host2"), ("host2", "host1")):
        lines = [json.loads(line) for line in said(lab, here, "cmigrate", "host", "test", there, "--json").splitlines()]
        assert {line["transport"]: (line["ok"], line["peer"]) for line in lines} == {
            "ssh": (True, there),
            "stream": (True, there),
        }


def test_hosts_and_client_find_each_other_by_name(lab: Lab) -> None:
    # As programs ask; "hosts" would ask for IPv6 first, of name servers that no lab has.
    for here in ("host1", "client"):
        assert said(lab, here, "getent", "ahosts", "host2").split()[0] == "10.88.255.2"


def test_the_client_is_in_the_same_network_as_the_hosts(lab: Lab) -> None:
    connect = lambda: socket.create_connection(("10.88.255.2", 22), 5)  # noqa: E731
    with in_netns(lab.host("client").holder.pid, connect) as connection:
        assert connection.recv(4) == b"SSH-"


def test_a_host_cannot_reach_the_machine_that_it_is_on(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 3)"
        done = lab.exec("host1", [sys.executable, "-c", program], capture_output=True, timeout=TIMEOUT_S)
    assert b"ConnectionRefusedError" in done.stderr


def test_exec_gives_streams_exit_code_directory_and_environment_through(lab: Lab, tmp_path: Path) -> None:
    done = lab.exec(
        "host1",
        ["sh", "-c", 'cat; pwd; echo "$GREETING"; exit 7'],
        input="in\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"GREETING": "hello"},
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stdout) == (7, f"in\n{tmp_path}\nhello\n")


def test_the_command_line_passes_arguments_and_exit_code_through(lab: Lab) -> None:
    done = cmigrate(lab, "exec", "host1", "--", "sh", "-c", 'printf "%s|" "$@"; exit 9', "sh", "a b", "--json", "")
    assert (done.returncode, done.stdout) == (9, "a b|--json||")
    missing = cmigrate(lab, "exec", "client", "no-such-program")
    assert missing.returncode == 127
    assert "no-such-program: not found" in missing.stderr


def test_a_terminal_stays_a_terminal(lab: Lab) -> None:
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [str(CMIGRATE), "lab", "exec", "host1", "--", "test", "-t", "0"],
            stdin=theirs,
            env={**os.environ, "CMIGRATE_LAB_DIR": str(lab.directory)},
        )
        assert process.wait(TIMEOUT_S) == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_signal_reaches_the_command_itself(lab: Lab) -> None:
    process = lab.popen("host1", ["sleep", "100"], stdin=subprocess.DEVNULL)
    while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == -signal.SIGTERM


def test_this_checkouts_command_comes_first_in_path(lab: Lab) -> None:
    assert said(lab, "host1", "sh", "-c", "command -v cmigrate") == str(CMIGRATE)


def test_up_again_says_that_it_is_up_and_changes_nothing(lab: Lab) -> None:
    before = lab.record
    done = cmigrate(lab, "up")
    assert (done.returncode, done.stdout) == (0, "the lab is up already: host1, host2\n")
    assert lab.record == before


def test_up_with_another_shape_is_refused(lab: Lab) -> None:
    with pytest.raises(WrongState, match="host1, host2"):
        lab.up(3)
    with pytest.raises(WrongState):
        lab.up(2, rate="1gbit")


def test_status_names_every_host(lab: Lab) -> None:
    done = cmigrate(lab, "status", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [(line["name"], line["address"], line["up"]) for line in lines] == [
        ("client", "10.88.0.1", True),
        ("host1", "10.88.255.1", True),
        ("host2", "10.88.255.2", True),
    ]


def test_a_host_that_is_not_there_is_told_with_those_that_are(lab: Lab) -> None:
    with pytest.raises(NotFound) as caught:
        lab.exec("host9", ["true"])
    assert "host1, host2" in caught.value.hint


def test_a_lab_is_not_changed_from_inside_a_lab(lab: Lab) -> None:
    for word in ("up", "down"):
        done = lab.exec("host1", ["cmigrate", "lab", word], capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (done.returncode, "host of a lab" in done.stderr) == (4, True)


def test_two_labs_at_once_share_nothing(lab: Lab, other: Lab) -> None:
    assert other.up(1)
    said(other, "host1", "touch", "/var/lib/cmigrate/theirs")
    assert "theirs" not in said(lab, "host1", "ls", "/var/lib/cmigrate")
    assert other.id != lab.id
    other.down()
    assert said(lab, "host1", "hostname") == "host1"
    assert "config.toml" in said(lab, "host1", "ls", "/etc/cmigrate")


def test_down_ends_everything_that_ran_and_removes_what_was_made(other: Lab) -> None:
    assert other.up(1)
    # What a container may leave: a frozen process in a group of its own, in both kinds of hierarchy; a detached one.
    detached = other.popen("host1", ["setsid", "--fork", "sleep", "1000"], stdin=subprocess.DEVNULL)
    detached.wait(TIMEOUT_S)
    frozen = other.popen("host1", ["sleep", "1000"], stdin=subprocess.DEVNULL)
    group = tree_of(other).root / "host1" / "containers" / "0123456789ab"
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text(str(frozen.pid))
    (group / "cgroup.freeze").write_text("1")
    holder = other.host("host1").holder
    assert other.down()
    assert frozen.wait(TIMEOUT_S) == -signal.SIGKILL
    assert not holder.alive()
    assert not tree_of(other).exists()
    assert not other.directory.exists()
    assert not other.down()


def test_down_works_without_the_records(other: Lab) -> None:
    other.up(1)
    holder = other.host("host1").holder
    (other.directory / "lab.json").write_text("{")
    assert other.down()
    assert not holder.alive()
    assert not other.directory.exists()


def test_a_lab_of_which_a_part_has_died_is_told_and_made_anew(other: Lab) -> None:
    other.up(1)
    agent = other.hosts[0].daemons["serve"]
    os.kill(agent.pid, signal.SIGKILL)
    while agent.alive():
        time.sleep(0.01)
    status = cmigrate(other, "status")
    assert (status.returncode, "dead: serve" in status.stdout) == (4, True)
    assert other.up(1)
    assert cmigrate(other, "status").returncode == 0


def test_a_command_that_is_killed_while_it_brings_a_lab_up_leaves_nothing_that_down_does_not_remove(other: Lab) -> None:
    process = subprocess.Popen(
        [str(CMIGRATE), "lab", "up"], env={**os.environ, "CMIGRATE_LAB_DIR": str(other.directory)}
    )
    while not (other.directory / "host1" / "sshd.log").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait(TIMEOUT_S)
    record = read_record(other.directory)
    assert record is not None
    assert not record.complete
    with pytest.raises(WrongState):
        other.exec("host1", ["true"])
    assert other.down()
    assert not other.directory.exists()


def test_an_interrupted_up_takes_down_what_it_has_made(other: Lab) -> None:
    process = subprocess.Popen(
        [str(CMIGRATE), "lab", "up"],
        env={**os.environ, "CMIGRATE_LAB_DIR": str(other.directory)},
        stderr=subprocess.DEVNULL,
    )
    while not (other.directory / "host1" / "sshd.log").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130
    assert not tree_of(other).exists()
    assert not any(other.directory.iterdir())


def test_a_directory_with_other_things_in_it_is_left_alone(place: Path) -> None:
    directory = place / "precious"
    directory.mkdir()
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="holds other things"):
        Lab(directory).up(1)
    assert not Lab(directory).down()
    assert [path.name for path in directory.iterdir()] == ["thesis.txt"]


def test_a_link_is_as_slow_as_asked_for(other: Lab) -> None:
    other.up(1, rate="40mbit")
    size = 2_000_000

    def listening() -> socket.socket:
        return socket.create_server(("10.88.255.1", 9000))

    with in_netns(other.host("host1").holder.pid, listening) as server:
        connect = lambda: socket.create_connection(("10.88.255.1", 9000), 5)  # noqa: E731
        with in_netns(other.host("client").holder.pid, connect) as ours, server.accept()[0] as theirs:
            for sender, receiver in ((ours, theirs), (theirs, ours)):
                took_s = transfer_s(sender, receiver, size)
                assert 0.3 * size * 8 / 40e6 < took_s
    assert other.record is not None
    assert other.record.rate == "40mbit"


def transfer_s(sender: socket.socket, receiver: socket.socket, size: int) -> float:
    sender.setblocking(False)
    left_to_send, left_to_come = memoryview(bytes(size)), size
    begin = time.monotonic()
    receiver.settimeout(10)
    while left_to_come:
        with contextlib.suppress(BlockingIOError):
            left_to_send = left_to_send[sender.send(left_to_send) :]
        left_to_come -= len(receiver.recv(1 << 20))
    return time.monotonic() - begin
