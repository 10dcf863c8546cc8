"""The line that two hosts exchange, and who may come in by SSH afterwards."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from migrate.inventory import Inventory
from migrate.trust import answer_exchange, authorize, deauthorize, parse_card
from runtime.errors import CorruptData, NameTaken
from runtime.host import HostConfig
from transport.api import Deadline
from transport.identity import create_identity

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
OTHER_KEY = KEY[:-1] + "B"


def card(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "host1",
        "version": "0.1.0",
        "address": "",
        "ssh_port": 22,
        "ssh_host_keys": [["ssh-ed25519", "AAAA"]],
        "agent_key": KEY,
        "command": ["/opt/cmigrate", "serve", "--stdio"],
        "stream_port": 7477,
        "certificate_pem": create_identity("host1").cert_pem,
    } | changes


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostConfig:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return HostConfig(name="host2", config_dir=tmp_path / "etc")


def exchange(host: HostConfig, line: dict[str, Any], environment: dict[str, str] | None = None, **options: Any) -> Any:
    # An expired deadline: this host's own SSH server, if it has one, is not asked.
    answer = answer_exchange(
        host,
        json.dumps(line).encode(),
        environment or {"SSH_CONNECTION": "192.0.2.1 50000 192.0.2.2 1"},
        replace=bool(options.get("replace")),
        deadline=Deadline.after(0),
    )
    return json.loads(answer)


def test_who_asks_is_stored_under_the_address_it_came_from(host: HostConfig) -> None:
    exchange(host, card())
    entry = Inventory(host).get("host1")
    assert (entry.ssh_text, entry.stream_text) == ("ssh://root@192.0.2.1:22", "stream://192.0.2.1:7477")
    assert entry.command == ("/opt/cmigrate", "serve", "--stdio")


def test_an_address_that_it_gives_comes_first(host: HostConfig) -> None:
    exchange(host, card(address="gate.example"))
    assert Inventory(host).get("host1").stream_text == "stream://gate.example:7477"


def test_a_host_without_an_ssh_server_is_reached_by_stream_alone(host: HostConfig) -> None:
    exchange(host, card(ssh_host_keys=[]))
    assert Inventory(host).get("host1").ssh_text == ""


def test_the_answer_is_a_card_itself(host: HostConfig) -> None:
    answer = exchange(host, card())
    parsed = parse_card(json.dumps(answer).encode())
    inventory = Inventory(host)
    assert parsed.entry.name == "host2"
    assert parsed.entry.certificate_pem == inventory.identity().cert_pem
    assert parsed.agent_key == inventory.ssh_public_key()
    assert parsed.entry.command[-2:] == ("serve", "--stdio")


def test_the_configuration_in_use_is_part_of_the_command(host: HostConfig) -> None:
    assert f"CMIGRATE_CONFIG={host.config_dir}" in exchange(host, card())["command"]


def test_another_machine_under_a_known_name_is_refused_and_not_let_in(host: HostConfig, tmp_path: Path) -> None:
    exchange(host, card())
    before = (tmp_path / "home/.ssh/authorized_keys").read_text()
    with pytest.raises(NameTaken):
        exchange(host, card(agent_key=OTHER_KEY))
    assert (tmp_path / "home/.ssh/authorized_keys").read_text() == before
    exchange(host, card(agent_key=OTHER_KEY), replace=True)
    assert OTHER_KEY in (tmp_path / "home/.ssh/authorized_keys").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"name": "../x"},
        {"name": 'x" '},
        {"certificate_pem": ""},
        {"certificate_pem": "x"},
        {"agent_key": "ssh-ed25519"},
        {"agent_key": f"{KEY} more"},
        {"agent_key": 'command="sh" x'},
        {"agent_key": f"{KEY}\nssh-ed25519"},
        {"ssh_port": "22"},
        {"command": "cmigrate"},
    ],
)
def test_a_card_that_does_not_fit_is_refused_and_changes_nothing(
    host: HostConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(CorruptData):
        exchange(host, card(**changes))
    assert Inventory(host).list() == ()
    assert not (tmp_path / "home/.ssh/authorized_keys").exists()


@pytest.mark.parametrize("line", [b"", b"\n", b"[]", b"null", b"{}", b"not json", b"\xff\xfe", b"{" * 300_000])
def test_what_is_no_card_at_all_is_refused(line: bytes) -> None:
    with pytest.raises(CorruptData):
        parse_card(line)


def test_words_of_a_login_script_before_the_card_do_no_harm() -> None:
    assert parse_card(b"Welcome!\n" + json.dumps(card()).encode() + b"\n").entry.name == "host1"


def test_an_agent_key_opens_the_door_for_the_agent_alone(host: HostConfig, tmp_path: Path) -> None:
    path = tmp_path / "authorized_keys"
    authorize(host, "host1", KEY, path)
    (line,) = path.read_text().splitlines()
    options, _, rest = line.partition(" ssh-ed25519 ")
    assert options.startswith('command="')
    assert options.endswith(' serve --stdio --peer host1",restrict')
    assert rest.endswith(" cmigrate:host1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_other_lines_of_authorized_keys_stay_as_they_are(host: HostConfig, tmp_path: Path) -> None:
    path = tmp_path / "authorized_keys"
    others = '# mine\n\nssh-rsa AAAA me@home\ncommand="x" ssh-ed25519 BBBB cmigrate:host10\n'
    path.write_text(others)
    path.chmod(0o640)
    authorize(host, "host1", KEY, path)
    authorize(host, "host1", OTHER_KEY, path)
    text = path.read_text()
    assert text.startswith(others)
    assert (KEY in text, text.count(OTHER_KEY)) == (False, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert deauthorize("host1", path)
    assert path.read_text() == others
    assert not deauthorize("host1", path)


def test_a_key_that_is_let_in_under_another_name_moves_to_the_new_one(host: HostConfig, tmp_path: Path) -> None:
    path = tmp_path / "authorized_keys"
    authorize(host, "old", KEY, path)
    authorize(host, "new", KEY, path)
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ["cmigrate:new"]


def test_a_symbolic_link_to_the_real_file_stays_one(host: HostConfig, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to("real")
    authorize(host, "host1", KEY, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert KEY in (tmp_path / "real").read_text()
