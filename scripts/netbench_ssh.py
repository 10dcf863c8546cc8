"""netbench's ssh load: an OpenSSH server in a container, and a login through the port it publishes that stays open.

The hosts are their containers' gateways, as in most installations; the client reaches the first of them from outside.
Through the login a terminal answers what is typed, and a tunnel leads to an echo in the container, for the probe.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.lab import Running, TwoHosts
from tests.support.routed import WAN
from tests.support.services import until_ready

PUBLISHED, TUNNEL = 18022, "127.0.0.1:18001"
ANSWER_TIMEOUT_S = 30.0
# Everything the server needs is made in the container, so that all of it moves.
SERVER = """
mkdir -p /run/sshd /root/login /var/log
touch /var/log/lastlog
cd /root/login
ssh-keygen -q -t ed25519 -N '' -f host
echo "$1" >keys
cat >config <<END
Port 2222
HostKey /root/login/host
AuthorizedKeysFile /root/login/keys
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
PasswordAuthentication no
END
/usr/bin/python3 -c "$2" &
exec /usr/sbin/sshd -D -e -f /root/login/config
"""
ECHO = """
import socket, threading
def serve(connection):
    with connection:
        while data := connection.recv(65536): connection.sendall(data)
server = socket.create_server(("127.0.0.1", 8001))
while True: threading.Thread(target=serve, args=(server.accept()[0],)).start()
"""


class Ssh:
    """A server that lets in who has the key in ``identity``."""

    name = "ssh"
    options: tuple[str, ...] = ("-p", f"{PUBLISHED}:2222")

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.identity = Path(self._directory.name) / "identity"

    def command(self, client: object) -> tuple[str, ...]:
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "netbench", "-f", str(self.identity)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, timeout=30)
        return ("/bin/sh", "-ec", SERVER, "server", self.identity.with_suffix(".pub").read_text(), ECHO)

    def open(self, place: Any) -> None:
        until_ready(lambda: place.connect(2222).close())

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._directory.cleanup()


class Login:
    """A session with a terminal, in which ``cat`` repeats what is typed."""

    def __init__(self, hosts: TwoHosts, identity: Path) -> None:
        options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        options += ["ExitOnForwardFailure=yes", "IdentitiesOnly=yes"]
        argv = ["ssh", "-F", "none", "-tt", "-i", str(identity), "-p", str(PUBLISHED), "-L", f"{TUNNEL}:127.0.0.1:8001"]
        argv += [word for option in options for word in ("-o", option)]
        pipe = subprocess.PIPE
        self._process = hosts.lab.popen("client", [*argv, f"root@{WAN['host1']}", "cat"], stdin=pipe, stdout=pipe)
        self._asked = 0

    def answers(self) -> bool:
        """Whether one more line comes back."""
        self._asked += 1
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        word = b"line %d" % self._asked
        impatient = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        impatient.start()
        try:
            self._process.stdin.write(word + b"\n")
            self._process.stdin.flush()
            seen = 0
            while seen < 2 and (line := self._process.stdout.readline()):
                seen += line.strip() == word  # the terminal itself repeats it first, then the program
            return seen == 2
        except OSError:
            return False
        finally:
            impatient.cancel()

    def end(self) -> None:
        self._process.kill()
        for end in (self._process.stdin, self._process.stdout):
            if end is not None:
                end.close()
        self._process.wait(10)


@contextmanager
def login(hosts: TwoHosts, _container: Running, service: Ssh) -> Iterator[Callable[[], int]]:
    """Answers whether the login has broken."""
    with ExitStack() as undo:
        opened = Login(hosts, service.identity)
        undo.callback(opened.end)
        if not opened.answers():
            raise AssertionError("nobody can log in to the container")
        yield lambda: int(not opened.answers())
