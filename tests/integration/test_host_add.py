"""Two hosts come to trust each other, and nobody else comes in. On real SSH servers and agents of a lab."""

import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from migrate.inventory import write_ssh_key
from migrate.lab.lab import Lab
from tests.support.netns import in_netns

TIMEOUT_S = 40.0
HOST2 = "root@10.88.255.2"
STREAM_PORT = 7477


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    directory = Path(tempfile.mkdtemp(prefix="cmigrate-lab-", dir="/var/tmp"))
    lab = Lab(directory / "lab")
    lab.up()
    yield lab
    lab.down()
    shutil.rmtree(directory)


@pytest.fixture
def strangers(lab: Lab, tmp_path: Path) -> Iterator[Lab]:
    """The lab with two hosts that do not know each other; afterwards all their files are as they were before."""
    places = [lab.directory / host / part for host in ("host1", "host2") for part in ("etc", "home/.ssh")]
    for number, place in enumerate(places):
        shutil.copytree(place, tmp_path / str(number))
    let_in = (lab.directory / "operator" / "id_ed25519.pub").read_text()
    for host in ("host1", "host2"):
        shutil.rmtree(lab.directory / host / "etc" / "hosts")
        (lab.directory / host / "home" / ".ssh" / "authorized_keys").write_text(let_in)
    yield lab
    for number, place in enumerate(places):
        # The directory itself stays: the host has it mounted.
        for entry in place.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(tmp_path / str(number), place, dirs_exist_ok=True)


def cmigrate(lab: Lab, host: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return lab.exec(
        host,
        ["cmigrate", *argv],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )


def operator(lab: Lab) -> tuple[str, str]:
    return "--identity", str(lab.directory / "operator" / "id_ed25519")


def host_key(lab: Lab, host: str) -> str:
    """Its fingerprint, as a person would look at it on the host itself."""
    shown = subprocess.run(
        ["ssh-keygen", "-lf", str(lab.directory / host / "ssh_host_ed25519_key.pub")],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    return shown.stdout.split()[1]


def both_ways(lab: Lab, here: str, there: str) -> dict[str, dict[str, Any]]:
    lines = cmigrate(lab, here, "host", "test", there, "--json").stdout.splitlines()
    return {line["transport"]: line for line in map(json.loads, lines) if line["type"] == "host-test"}


def add(lab: Lab, *options: str, name: str = "host2", address: str = HOST2) -> subprocess.CompletedProcess[str]:
    return cmigrate(lab, "host1", "host", "add", name, address, *options)


def test_one_add_makes_both_hosts_trust_each_other_over_both_transports(strangers: Lab) -> None:
    added = add(strangers, "--fingerprint", host_key(strangers, "host2"), *operator(strangers))
    assert added.returncode == 0, added.stderr
    assert added.stdout.startswith("host2 added: stream://10.88.255.2:7477 and ssh://root@10.88.255.2:22")
    for here, there in (("host1", "host2"), ("host2", "host1")):
        assert {way: line["ok"] for way, line in both_ways(strangers, here, there).items()} == {
            "ssh": True,
            "stream": True,
        }


def test_adding_twice_changes_nothing(lab: Lab) -> None:
    keys = lab.directory / "host2" / "home" / ".ssh" / "authorized_keys"
    before = keys.read_text()
    added = add(lab, *operator(lab), "--json")  # known by now: nothing is asked
    assert added.returncode == 0, added.stderr
    line = json.loads(added.stdout)
    assert (line["type"], line["name"], line["stream"]) == ("host", "host2", "stream://10.88.255.2:7477")
    assert keys.read_text() == before


def test_hosts_are_listed_as_a_table_and_as_json(lab: Lab) -> None:
    table = cmigrate(lab, "host1", "host", "ls").stdout.splitlines()
    assert table[0].split() == ["NAME", "STREAM", "SSH", "ADDED"]
    assert table[1].split()[:3] == ["host2", "stream://10.88.255.2:7477", "ssh://root@10.88.255.2:22"]
    line = json.loads(cmigrate(lab, "host1", "host", "ls", "--json").stdout)
    assert line["certificate"].startswith("SHA256:")


def test_another_host_key_than_the_operator_expects_is_refused_and_both_are_named(strangers: Lab) -> None:
    done = add(strangers, "--fingerprint", "SHA256:" + "A" * 43, *operator(strangers))
    assert done.returncode == 7
    assert host_key(strangers, "host2") in done.stderr
    assert "SHA256:" + "A" * 43 in done.stderr
    assert cmigrate(strangers, "host1", "host", "ls", "--json").stdout == ""


def test_an_unknown_host_key_that_nobody_confirms_is_refused(strangers: Lab) -> None:
    done = add(strangers, *operator(strangers))
    assert done.returncode == 7
    assert host_key(strangers, "host2") in done.stderr
    assert "--fingerprint" in done.stderr
    assert cmigrate(strangers, "host2", "host", "ls", "--json").stdout == ""


def test_a_host_key_that_has_changed_is_refused_even_with_yes(strangers: Lab) -> None:
    known = strangers.directory / "host1" / "home" / ".ssh" / "known_hosts"
    write_ssh_key(strangers.directory / "host1" / "home" / "other", "x")
    kind, text, _ = (strangers.directory / "host1" / "home" / "other.pub").read_text().split()
    known.write_text(f"10.88.255.2 {kind} {text}\n")
    try:
        done = add(strangers, "--yes", *operator(strangers))
    finally:
        known.unlink()
    assert done.returncode == 7
    assert "not the one known here" in done.stderr


def test_a_login_that_fails_names_the_keys_that_were_tried(strangers: Lab) -> None:
    stranger = strangers.directory / "host1" / "home" / "stranger"
    write_ssh_key(stranger, "x")
    done = add(strangers, "--yes", "--identity", str(stranger))
    assert done.returncode == 7
    assert f"{stranger} refused" in done.stderr


def test_a_host_without_cmigrate_is_told_as_such(strangers: Lab) -> None:
    done = add(strangers, "--yes", "--remote-command", "/nowhere/cmigrate", *operator(strangers))
    assert done.returncode == 8
    assert "--remote-command" in done.stderr


def test_nobody_at_the_address_is_an_error_of_the_connection(strangers: Lab) -> None:
    done = add(strangers, "--yes", *operator(strangers), address="root@10.88.255.2:2222")
    assert done.returncode == 7
    assert "is an SSH server running there?" in done.stderr


def test_a_host_is_not_added_under_this_hosts_own_name(strangers: Lab) -> None:
    done = add(strangers, "--yes", *operator(strangers), name="host1")
    assert done.returncode == 4
    assert "this host itself is called host1" in done.stderr


def test_a_host_that_was_set_up_again_is_taken_only_with_replace(strangers: Lab) -> None:
    assert add(strangers, "--yes", *operator(strangers)).returncode == 0
    (strangers.directory / "host2" / "etc" / "identity" / "stream.pem").unlink()
    done = add(strangers, *operator(strangers))
    assert done.returncode == 4
    assert "another certificate" in done.stderr
    failed = both_ways(strangers, "host1", "host2")["stream"]
    assert (failed["ok"], "expected is SHA256:" in failed["error"]) == (False, True)
    assert add(strangers, "--replace", "--yes", *operator(strangers)).returncode == 0
    assert both_ways(strangers, "host1", "host2")["stream"]["ok"]


def test_the_agents_key_opens_the_agent_and_nothing_else(lab: Lab) -> None:
    key = lab.directory / "host1" / "etc" / "identity" / "id_ed25519"
    ssh = ["ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes"]
    done = lab.exec(
        "host1",
        [*ssh, "-i", str(key), HOST2, "id; touch /run/was-here"],
        capture_output=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    assert b"uid=" not in done.stdout
    assert done.stdout.startswith(b"CMG1")  # the agent's greeting, whatever was asked for
    assert lab.exec("host2", ["test", "-e", "/run/was-here"]).returncode == 1


def test_a_host_that_was_removed_comes_in_no_more(strangers: Lab) -> None:
    assert add(strangers, "--yes", *operator(strangers)).returncode == 0
    assert cmigrate(strangers, "host2", "host", "rm", "host1").returncode == 0
    ways = both_ways(strangers, "host1", "host2")
    assert {way: line["ok"] for way, line in ways.items()} == {"ssh": False, "stream": False}
    assert "cmigrate host add" in ways["stream"]["error"]
    assert cmigrate(strangers, "host1", "host", "test", "host2").returncode == 7


def test_an_unknown_host_is_not_found(lab: Lab) -> None:
    done = cmigrate(lab, "host1", "host", "test", "host7")
    assert done.returncode == 3
    assert "known: host2" in done.stderr
    assert cmigrate(lab, "host1", "host", "rm", "host7").returncode == 3


def test_an_address_whose_key_is_in_known_hosts_needs_no_add(strangers: Lab) -> None:
    home = strangers.directory / "host1" / "home" / ".ssh"
    kind, text, _ = (strangers.directory / "host2" / "ssh_host_ed25519_key.pub").read_text().split()
    (home / "known_hosts").write_text(f"10.88.255.2 {kind} {text}\n")
    shutil.copy(strangers.directory / "operator" / "id_ed25519", home / "id_ed25519")
    try:
        assert both_ways(strangers, "host1", f"ssh://{HOST2}")["ssh"]["ok"]
    finally:
        (home / "known_hosts").unlink()
        (home / "id_ed25519").unlink()


@contextmanager
def connections(lab: Lab, count: int) -> Iterator[list[socket.socket]]:
    """TCP connections from the client to the agent of host2, on which nothing is said."""
    found: list[socket.socket] = []

    def connect() -> None:
        found.extend(socket.create_connection(("10.88.255.2", STREAM_PORT), 5) for _ in range(count))

    in_netns(lab.host("client").holder.pid, connect)
    try:
        yield found
    finally:
        for connection in found:
            connection.close()


def test_silent_and_mad_clients_keep_nobody_waiting(lab: Lab) -> None:
    with connections(lab, 6) as found:
        for connection in found[:3]:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(range(256)) * 20)
        assert both_ways(lab, "host1", "host2")["stream"]["ok"]


ASK_AUTO = """
import time
from migrate.links import connect
from runtime.host import load_host_config
from transport.api import Deadline
begin = time.monotonic()
with connect(load_host_config(), "host2", deadline=Deadline.after(20)) as session:
    print(session.transport, round(time.monotonic() - begin), *session.notes)
"""


def auto(lab: Lab) -> str:
    done = lab.exec("host1", ["python", "-c", ASK_AUTO], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_auto_takes_the_stream(lab: Lab) -> None:
    assert auto(lab).startswith("stream ")


def test_where_no_agent_listens_auto_goes_by_ssh(strangers: Lab) -> None:
    assert add(strangers, "--yes", "--stream-port", "7999", *operator(strangers)).returncode == 0
    ways = both_ways(strangers, "host1", "host2")
    assert {way: line["ok"] for way, line in ways.items()} == {"ssh": True, "stream": False}
    transport, _, note = auto(strangers).split(maxsplit=2)
    assert (transport, "port 7999" in note) == ("ssh", True)


def test_where_a_firewall_swallows_the_stream_auto_goes_by_ssh_after_two_seconds(lab: Lab) -> None:
    rules = (
        "add table ip t; add chain ip t c { type filter hook input priority 0; }; add rule ip t c tcp dport 7477 drop"
    )
    assert lab.exec("host2", ["nft", rules]).returncode == 0
    try:
        transport, took_s, _ = auto(lab).split(maxsplit=2)
        assert transport == "ssh"
        assert 2 <= int(took_s) < 30
    finally:
        lab.exec("host2", ["nft", "delete table ip t"])


def test_when_both_ways_fail_the_error_tells_both(strangers: Lab) -> None:
    assert add(strangers, "--yes", "--stream-port", "7999", *operator(strangers)).returncode == 0
    assert cmigrate(strangers, "host2", "host", "rm", "host1").returncode == 0
    done = strangers.exec("host1", ["python", "-c", ASK_AUTO], capture_output=True, text=True, timeout=TIMEOUT_S)
    last = done.stderr.strip().splitlines()[-1]
    assert "AuthenticationFailed: host2 cannot be reached: stream: " in last
    assert "; ssh: no key lets root in" in last
