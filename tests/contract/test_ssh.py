"""What is special about SSH: keys on both sides, commands, and servers that do not behave."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.contract.pairs import connector_to
from tests.contract.sshd import SshServer, fingerprint_of, make_key, public_part
from transport.api import (
    AuthenticationFailed,
    ChannelClosed,
    ConnectFailed,
    Deadline,
    DeadlineExpired,
    TransportError,
)
from transport.ssh import SshAddress, fetch_host_key, run

pytestmark = pytest.mark.usefixtures("ssh_server")


def soon() -> Deadline:
    return Deadline.after(20)


def refused(server: SshServer, **changes: object) -> AuthenticationFailed:
    connector = replace(connector_to(server, ["true"]), **changes)  # type: ignore[arg-type]
    with pytest.raises(AuthenticationFailed) as caught:
        connector.connect(deadline=soon())
    return caught.value


@contextmanager
def server_that_says(greeting: bytes) -> Iterator[SshAddress]:
    """Accepts one connection, says something, and then nothing until the client leaves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(ConnectionResetError):
                sock.sendall(greeting)
                while sock.recv(65536):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        yield SshAddress(host="127.0.0.1", port=listener.getsockname()[1])
        thread.join()


def test_the_host_key_can_be_fetched_for_a_person_to_compare(ssh_server: SshServer) -> None:
    kind, text, fingerprint = fetch_host_key(ssh_server.address, deadline=soon())
    assert (kind, text) == ssh_server.host_key
    assert fingerprint == ssh_server.fingerprint


def test_a_wrong_host_key_is_refused_and_both_are_named(ssh_server: SshServer) -> None:
    wrong = public_part(ssh_server.stranger)
    error = refused(ssh_server, host_keys=[wrong])
    assert ssh_server.fingerprint in error.what
    assert fingerprint_of(wrong) in error.what
    assert "cmigrate host add" in error.hint


def test_an_unknown_host_key_is_refused(ssh_server: SshServer) -> None:
    error = refused(ssh_server, host_keys=[])
    assert ssh_server.fingerprint in error.what
    assert "no key of that host is known" in error.what


def test_a_known_key_of_another_type_does_not_count(ssh_server: SshServer, tmp_path: Path) -> None:
    other = public_part(make_key(tmp_path / "ecdsa", "ecdsa"))
    assert ssh_server.fingerprint in refused(ssh_server, host_keys=[other]).what


def test_one_right_key_among_others_is_enough(ssh_server: SshServer) -> None:
    keys = [public_part(ssh_server.stranger), ("ssh-rsa", "not base64!"), ssh_server.host_key]
    replace(connector_to(ssh_server, ["true"]), host_keys=keys).connect(deadline=soon()).close()


def test_a_key_that_is_not_authorized_is_named(ssh_server: SshServer) -> None:
    error = refused(ssh_server, identity_files=[ssh_server.stranger])
    assert f"{ssh_server.stranger} refused" in error.what
    assert "authorized_keys" in error.hint


def test_all_keys_are_tried_until_one_fits(ssh_server: SshServer) -> None:
    files = [ssh_server.stranger, ssh_server.identity]
    replace(connector_to(ssh_server, ["true"]), identity_files=files).connect(deadline=soon()).close()


def test_a_server_that_hangs_up_after_too_many_keys_is_said(ssh_server: SshServer) -> None:
    error = refused(ssh_server, identity_files=[ssh_server.stranger] * 6)
    assert "hung up" in error.what


def test_key_files_that_cannot_be_used_are_explained(ssh_server: SshServer, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase="secret")
    garbage = tmp_path / "garbage"
    garbage.write_text("this is no key")
    error = refused(ssh_server, identity_files=[tmp_path / "missing", locked, garbage])
    assert f"{tmp_path / 'missing'} No such file" in error.what
    assert f"{locked} has a passphrase" in error.what
    assert f"{garbage} is not a private key" in error.what


def test_having_no_key_at_all_is_said(ssh_server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "there is none to try" in refused(ssh_server, identity_files=None).what


def test_the_usual_key_files_are_found(ssh_server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").write_bytes(ssh_server.identity.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    replace(connector_to(ssh_server, ["true"]), identity_files=None).connect(deadline=soon()).close()


def remote(
    server: SshServer, *argv: str, stdin: bytes = b"", deadline: Deadline | None = None
) -> tuple[int, bytes, bytes]:
    done = run(
        server.address,
        argv,
        host_keys=[server.host_key],
        identity_files=[server.identity],
        allow_agent=False,
        stdin=stdin,
        deadline=deadline or soon(),
    )
    return done.exit_code, done.stdout, done.stderr


def test_a_remote_command_gives_its_output_and_exit_code(ssh_server: SshServer) -> None:
    assert remote(ssh_server, "sh", "-c", "cat; echo problem >&2; exit 3", stdin=b"in") == (3, b"in", b"problem")


def test_arguments_reach_the_remote_command_unchanged(ssh_server: SshServer) -> None:
    words = ["a b", "$HOME", "it's", "", "*", 'q"q', "\n"]
    code, stdout, _ = remote(ssh_server, sys.executable, "-c", "import sys; print(sys.argv[1:])", *words)
    assert (code, stdout.decode().strip()) == (0, repr(words))


def test_much_input_and_output_at_once_do_not_block_each_other(ssh_server: SshServer) -> None:
    data = os.urandom(6 * 1024 * 1024)
    assert remote(ssh_server, "cat", stdin=data) == (0, data, b"")


def test_a_command_that_ignores_its_input_ends_all_the_same(ssh_server: SshServer) -> None:
    assert remote(ssh_server, "false", stdin=bytes(6 * 1024 * 1024))[0] == 1


def test_a_remote_command_that_does_not_end_is_left_at_the_deadline(ssh_server: SshServer) -> None:
    begin_s = time.monotonic()
    with pytest.raises(DeadlineExpired):
        # It ends a moment later by itself; SSH without a terminal has no way to end it.
        remote(ssh_server, "sleep", "1.5", deadline=Deadline.after(0.7))
    assert time.monotonic() - begin_s < 30


def test_a_killed_remote_command_has_no_exit_code(ssh_server: SshServer) -> None:
    with pytest.raises(ChannelClosed, match="without an exit code"):
        remote(ssh_server, "sh", "-c", "kill -9 $$")


def test_the_error_holds_exit_code_and_last_words_of_the_remote_command(ssh_server: SshServer) -> None:
    connector = connector_to(ssh_server, ["sh", "-c", "echo cannot open the store >&2; exit 4"])
    with (
        replace(connector, name="host2").connect(deadline=soon()) as channel,
        pytest.raises(ChannelClosed, match=r"^host2 closed .* exit code 4, .* cannot open the store"),
    ):
        channel.receive(deadline=soon())


def test_a_command_that_is_not_there_is_named_by_the_remote_shell(ssh_server: SshServer) -> None:
    with (
        connector_to(ssh_server, ["/does/not/exist"]).connect(deadline=soon()) as channel,
        pytest.raises(ChannelClosed, match="exit code 127, .*/does/not/exist"),
    ):
        channel.receive(deadline=soon())


def test_the_peer_is_named(ssh_server: SshServer) -> None:
    with connector_to(ssh_server, ["true"]).connect(deadline=soon()) as channel:
        assert (channel.peer.name, channel.peer.transport) == ("127.0.0.1", "ssh")
        assert channel.peer.detail == str(ssh_server.address)


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-Silent_1.0\r\n"])
def test_a_server_that_says_nothing_more_is_given_up_at_the_deadline(ssh_server: SshServer, greeting: bytes) -> None:
    with server_that_says(greeting) as address:
        connector = replace(connector_to(ssh_server, ["true"]), address=address)
        begin_s = time.monotonic()
        with pytest.raises(DeadlineExpired):
            connector.connect(deadline=Deadline.after(0.4))
        assert 0.3 < time.monotonic() - begin_s < 30


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad\r\n\r\n" * 200, bytes(3000), b"SSH-2.0-x\r\n" + bytes(900)])
def test_a_server_that_speaks_something_else_is_an_error(ssh_server: SshServer, greeting: bytes) -> None:
    with server_that_says(greeting) as address:
        connector = replace(connector_to(ssh_server, ["true"]), address=address)
        with pytest.raises(TransportError):
            connector.connect(deadline=Deadline.after(1))


def test_a_port_that_nobody_listens_on_is_an_error(ssh_server: SshServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ConnectFailed, match="Connection refused"):
        fetch_host_key(SshAddress(host="127.0.0.1", port=port), deadline=soon())


def test_nothing_is_printed_when_a_session_breaks(ssh_server: SshServer, capfd: pytest.CaptureFixture[str]) -> None:
    with server_that_says(b"SSH-2.0-x\r\n" + bytes(900)) as address, pytest.raises(TransportError):
        fetch_host_key(address, deadline=Deadline.after(2))
    assert capfd.readouterr() == ("", "")
