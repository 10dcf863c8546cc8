"""Known hosts and own identity on disk."""

import stat
import threading
from pathlib import Path

import paramiko
import pytest

from migrate.errors import UnknownHost
from migrate.inventory import (
    HostEntry,
    Inventory,
    entry_from_toml,
    known_host_keys,
    parse_ssh_url,
    public_key_file,
    write_ssh_key,
)
from runtime.errors import BadInput, CorruptData, NameTaken
from runtime.host import HostConfig
from transport.identity import create_identity

CERTIFICATE = create_identity("host2").cert_pem


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    return Inventory(HostConfig(name="host1", config_dir=tmp_path / "etc"))


def an_entry(name: str = "host2", **changes: object) -> HostEntry:
    values: dict[str, object] = {
        "ssh_host": "192.0.2.2",
        "ssh_host_keys": (("ssh-ed25519", "AAAA"),),
        "command": ("/opt/a b/cmigrate", "serve", "--stdio"),
        "stream_host": "192.0.2.2",
        "stream_port": 7477,
        "certificate_pem": CERTIFICATE,
        "added_at": "2026-11-21T00:00:00Z",
    }
    return HostEntry(name=name, **(values | changes))  # type: ignore[arg-type]


def test_an_entry_comes_back_as_it_was_added(inventory: Inventory) -> None:
    inventory.add(an_entry())
    assert inventory.get("host2") == an_entry()
    assert inventory.list() == (an_entry(),)


def test_odd_characters_survive_the_file(inventory: Inventory) -> None:
    odd = an_entry(command=('q"uote', "back\\slash", "ünï\x7f\x01\n"))
    inventory.add(odd)
    assert inventory.get("host2") == odd


def test_the_file_of_an_entry_is_for_root_alone(inventory: Inventory) -> None:
    inventory.add(an_entry())
    path = inventory.host.config_dir / "hosts" / "host2.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["host2.toml"]


def test_an_unknown_host_is_told_with_the_known_ones(inventory: Inventory) -> None:
    inventory.add(an_entry())
    with pytest.raises(UnknownHost) as caught:
        inventory.get("hots2")
    assert "did you mean host2?" in caught.value.hint


def test_with_no_host_known_the_hint_says_how_to_add_one(inventory: Inventory) -> None:
    with pytest.raises(UnknownHost) as caught:
        inventory.get("host2")
    assert "cmigrate host add" in caught.value.hint


@pytest.mark.parametrize("name", ["", "../host2", "a/b", ".hidden", "x" * 64, "a b"])
def test_a_name_that_is_no_name_is_neither_stored_nor_looked_up(inventory: Inventory, name: str) -> None:
    with pytest.raises(BadInput):
        an_entry(name)
    with pytest.raises(UnknownHost):
        inventory.get(name)


def test_another_certificate_under_a_known_name_is_refused(inventory: Inventory) -> None:
    inventory.add(an_entry())
    other = an_entry(certificate_pem=create_identity("host2").cert_pem)
    with pytest.raises(NameTaken) as caught:
        inventory.add(other)
    assert "cmigrate host rm host2" in caught.value.hint
    assert inventory.get("host2") == an_entry()
    inventory.add(other, replace=True)
    assert inventory.get("host2") == other


def test_a_new_address_with_the_same_certificate_is_an_update(inventory: Inventory) -> None:
    inventory.add(an_entry())
    inventory.add(an_entry(ssh_host="192.0.2.9"))
    assert inventory.get("host2").ssh_host == "192.0.2.9"


def test_a_host_cannot_know_another_one_of_its_own_name(inventory: Inventory) -> None:
    with pytest.raises(NameTaken):
        inventory.add(an_entry("host1"))


def test_a_removed_host_is_unknown(inventory: Inventory) -> None:
    inventory.add(an_entry())
    assert inventory.remove("host2") == an_entry()
    assert inventory.trusted() == {}
    with pytest.raises(UnknownHost):
        inventory.remove("host2")


def test_a_damaged_file_is_named_and_hides_no_other_host(inventory: Inventory) -> None:
    inventory.add(an_entry())
    broken = inventory.host.config_dir / "hosts" / "host3.toml"
    broken.write_text("ssh_port = 'twenty-two'\n")
    assert list(inventory.trusted()) == ["host2"]
    assert [str(broken) in problem.what for problem in inventory.problems()] == [True]
    with pytest.raises(CorruptData):
        inventory.get("host3")
    inventory.remove("host3")
    assert inventory.problems() == ()


@pytest.mark.parametrize(
    "line",
    [
        "ssh_port = 70000",
        "ssh_port = true",
        "ssh_host = 1",
        'command = "cmigrate"',
        "command = [1]",
        'ssh_host_keys = [["ssh-ed25519"]]',
        "ssh_host_keys = [[1, 2]]",
        'certificate_pem = "no certificate"',
        'login = "guest"',
        "= 1",
    ],
)
def test_a_value_that_does_not_fit_is_refused(line: str) -> None:
    with pytest.raises((ValueError, TypeError, BadInput)):
        entry_from_toml("host2", line)


def test_an_unknown_key_of_a_newer_version_is_ignored() -> None:
    assert entry_from_toml("host2", 'ssh_host = "a"\nfuture = 1\n') == HostEntry(name="host2", ssh_host="a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.2", ("root", "192.0.2.2", 22)),
        ("admin@box", ("admin", "box", 22)),
        ("ssh://admin@box:2222", ("admin", "box", 2222)),
        ("root@[2001:db8::1]:22", ("root", "2001:db8::1", 22)),
    ],
)
def test_ssh_addresses_are_read_as_people_write_them(text: str, expected: tuple[str, str, int]) -> None:
    url = parse_ssh_url(text)
    assert (url.user, url.host, url.port) == expected


@pytest.mark.parametrize("text", ["", "stream://box", "box:port", "box:99999", "box/path", "ssh://", "a:secret@box"])
def test_what_is_no_ssh_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_ssh_url(text)


def test_a_host_is_found_by_its_addresses(inventory: Inventory) -> None:
    inventory.add(an_entry())
    assert inventory.get("ssh://root@192.0.2.2").name == "host2"
    assert inventory.get("stream://192.0.2.2:7477").name == "host2"
    assert inventory.get("stream://192.0.2.2").name == "host2"


def test_a_stream_address_that_was_never_added_is_unknown(inventory: Inventory) -> None:
    with pytest.raises(UnknownHost) as caught:
        inventory.get("stream://192.0.2.3:7477")
    assert "cmigrate host add" in caught.value.hint


def test_an_ssh_address_that_was_never_added_needs_its_key_in_known_hosts(
    inventory: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UnknownHost) as caught:
        inventory.get("ssh://root@192.0.2.7:2222")
    assert "cmigrate host add NAME root@192.0.2.7:2222" in caught.value.hint
    write_ssh_key(tmp_path / "key", "x")
    kind, text, _ = public_key_file(tmp_path / "key").read_text().split()
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "known_hosts").write_text(f"[192.0.2.7]:2222 {kind} {text}\n")
    entry = inventory.get("ssh://root@192.0.2.7:2222")
    assert (entry.ssh_host_keys, entry.login) == (((kind, text),), "operator")
    assert entry.stream_text == ""


def test_hashed_names_in_known_hosts_are_found(tmp_path: Path) -> None:
    write_ssh_key(tmp_path / "key", "x")
    kind, text, _ = public_key_file(tmp_path / "key").read_text().split()
    hashed = paramiko.HostKeys.hash_host("box")
    (tmp_path / "known_hosts").write_text(f"{hashed} {kind} {text}\n")
    assert known_host_keys("box", 22, tmp_path / "known_hosts") == ((kind, text),)
    assert known_host_keys("other", 22, tmp_path / "known_hosts") == ()
    assert known_host_keys("box", 22, tmp_path / "none") == ()


def test_the_identity_is_made_once_and_stays(inventory: Inventory) -> None:
    assert inventory.identity() == inventory.identity()
    key = inventory.ssh_key_file()
    first = (key.read_text(), inventory.ssh_public_key())
    assert (inventory.ssh_key_file().read_text(), inventory.ssh_public_key()) == first
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    loaded = paramiko.Ed25519Key.from_private_key_file(str(key))
    assert f"{loaded.get_name()} {loaded.get_base64()}" == first[1]


def test_a_lost_public_part_is_made_again_from_the_private_one(inventory: Inventory) -> None:
    before = inventory.ssh_public_key()
    public_key_file(inventory.ssh_key_file()).unlink()
    assert inventory.ssh_public_key() == before


def test_of_several_that_ask_first_at_once_all_get_the_same_key(inventory: Inventory) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(inventory.ssh_public_key())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found))) == (8, 1)
