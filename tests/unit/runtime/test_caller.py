"""Which connection an SSH server started this process by; of a real server in tests/integration/test_dead_links.py."""

import pytest

from runtime.caller import _end, ssh_socket


@pytest.mark.parametrize("value", ["", "UNKNOWN 65535 UNKNOWN 65535", "10.0.0.1 1", "10.0.0.1 1 10.0.0.2 22"])
def test_who_was_started_by_nobody_or_by_what_is_no_network_has_none(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", value)
    assert ssh_socket() is None


@pytest.mark.parametrize("address", ["10.0.0.1", "::ffff:10.0.0.1"])
def test_a_server_for_both_families_writes_addresses_of_the_old_one_as_they_are(address: str) -> None:
    assert _end(address, "22") == ("10.0.0.1", 22)


def test_a_zone_is_no_part_of_an_address() -> None:
    assert _end("fe80::1%eth0", 22) == _end("fe80::1", "22") == ("fe80::1", 22)
