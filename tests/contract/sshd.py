"""An OpenSSH server of our own on 127.0.0.1, with keys made for it."""

from __future__ import annotations

import base64
import getpass
import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transport.ssh import SshAddress

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "/usr/sbin/sshd"
# Where Debian's sshd insists on an empty directory when it runs as root. Its service makes it and so do we; it stays,
# because another server may be using it by now.
PRIVILEGE_SEPARATION = Path("/run/sshd")


@dataclass(frozen=True, kw_only=True)
class SshServer:
    address: SshAddress
    host_key: tuple[str, str]
    identity: Path
    stranger: Path

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.host_key)


def fingerprint_of(key: tuple[str, str]) -> str:
    digest = hashlib.sha256(base64.b64decode(key[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "test", "-f", str(path)],
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    return path


def public_part(path: Path) -> tuple[str, str]:
    kind, text, _ = path.with_name(path.name + ".pub").read_text().split(maxsplit=2)
    return kind, text


@contextmanager
def running_sshd(directory: Path) -> Iterator[SshServer]:
    """A server that lets the user who runs the tests in with the key `identity`, and nobody else."""
    host = make_key(directory / "host")
    identity = make_key(directory / "identity")
    stranger = make_key(directory / "stranger")
    authorized = directory / "authorized_keys"
    authorized.write_text(" ".join(public_part(identity)) + "\n")
    port = _free_port()
    config = directory / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host}\nAuthorizedKeysFile {authorized}\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nMaxAuthTries 3\n"
    )
    if os.geteuid() == 0:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    log = directory / "sshd.log"
    server = subprocess.Popen([SSHD, "-D", "-f", str(config), "-E", str(log)], stdin=subprocess.DEVNULL)
    try:
        _wait_for_port(port, server, log)
        yield SshServer(
            address=SshAddress(host="127.0.0.1", port=port, user=getpass.getuser()),
            host_key=public_part(host),
            identity=identity,
            stranger=stranger,
        )
    finally:
        server.terminate()
        server.wait(10)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    give_up_s = time.monotonic() + 10
    while time.monotonic() < give_up_s and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(f"the SSH server did not come up: {log.read_text()}")
