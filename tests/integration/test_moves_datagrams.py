"""Datagrams that wait in a container's sockets when it freezes: they are there afterwards, each once, in order."""

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_moves_connections import ADDRESS6, Program, client6, running
from tests.support.lab import TwoHosts

__all__ = ["client6"]  # a fixture

TOP = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(180)

# Sockets that nobody reads from until a connection to port 8000 asks for what they hold.
DEAF = """
import json, socket
own, peer = OWN_ADDRESS, PEER
def bound(family, address, port):
    made = socket.socket(family, socket.SOCK_DGRAM); made.bind((address, port)); return made
any4 = bound(socket.AF_INET, "0.0.0.0", 9001)
any6 = bound(socket.AF_INET6, "::", 9002)
connected = bound(socket.AF_INET, "0.0.0.0", 9003); connected.connect((peer, 9003))
looped = bound(socket.AF_INET, "127.0.0.1", 9004)
looped6 = bound(socket.AF_INET6, "::1", 9005)
itself = bound(socket.AF_INET, "0.0.0.0", 9006)
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); asking6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
for n in range(5):
    asking.sendto(b"%d" % n, ("127.0.0.1", 9004))
    asking6.sendto(b"%d" % n, ("::1", 9005))
    asking.sendto(b"%d" % n, (own, 9006))
def drained(queue):
    found = []
    try:
        while True:
            data, sender = queue.recvfrom(65536, socket.MSG_DONTWAIT)
            found.append([sender[0], sender[1], data[:12].decode(), len(data)])
    except BlockingIOError:
        return found
server = socket.create_server(("0.0.0.0", 8000))
while True:
    connection, _ = server.accept()
    with connection:
        if connection.recv(100):
            found = {q.getsockname()[1]: drained(q) for q in (any4, any6, connected, looped, looped6, itself)}
            connection.sendall(json.dumps(found).encode())
"""


class Deaf(Program):
    name = "deaf"

    def __init__(self, own: str) -> None:
        super().__init__(DEAF, 8000)
        self._own = own

    def command(self, client: Any) -> tuple[str, ...]:
        text = self._text.replace("OWN_ADDRESS", repr(self._own)).replace("PEER", repr(client.address))
        return ("/usr/bin/python3", "-c", text)


def numbered(count: int) -> list[bytes]:
    """Most are short, some longer than a link takes in one piece, one of the second half holds nothing: what holds
    nothing can be looked at once only, and not in the move that is rolled back."""
    return [b"%d" % n + bytes((0, 3000)[n % 10 == 7]) if n != 45 else b"" for n in range(count)]


def a_move_that_is_rolled_back_when_all_is_restored(hosts: TwoHosts, container: str) -> int:
    """Its exit code."""
    argv = [sys.executable, "-m", "tests.support.corrupting_move", container, "host2", "diskless", "before"]
    done = hosts.lab.exec("host1", argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, cwd=TOP)
    return int(done.returncode)


def test_what_waits_is_there_once_and_in_order_after_a_rollback_a_move_and_a_checkpoint(
    two_hosts: TwoHosts, client6: None, tmp_path: Path
) -> None:
    own = "10.88.77.7"
    with running(two_hosts, Deaf(own), "--ip", own, "--ip6", ADDRESS6) as container, ExitStack() as stack:

        def sender(family: int, port: int = 0) -> socket.socket:
            made: socket.socket = stack.enter_context(
                container.client.run(lambda: socket.socket(family, socket.SOCK_DGRAM))
            )
            made.bind(("" if family == socket.AF_INET else "::", port))
            return made

        four, six, peer = sender(socket.AF_INET), sender(socket.AF_INET6), sender(socket.AF_INET, 9003)
        to = {9001: (four, own), 9002: (six, ADDRESS6), 9003: (peer, own)}
        sent = numbered(60)
        for data in sent[:30]:
            for port, (by, address) in to.items():
                by.sendto(data, (address, port))
        assert a_move_that_is_rolled_back_when_all_is_restored(two_hosts, container.name) == 5
        for data in sent[30:]:
            for port, (by, address) in to.items():
                by.sendto(data, (address, port))
        four.sendto(b"mapped", (own, 9002))
        container.move("precopy", "stream")
        # They are what the move brought by now.
        two_hosts.cmigrate(container.host, "checkpoint", container.name, "-o", str(tmp_path / "deaf.ckpt"))
        two_hosts.cmigrate(container.host, "restore", str(tmp_path / "deaf.ckpt"))
        # It stays on a host that has made a checkpoint, and is no trace of the container.
        work = two_hosts.config(container.host).state_dir / "checkpoints"
        two_hosts.lab.exec(container.host, ["rmdir", str(work)], check=True, timeout=10)
        with container.connect(8000) as asking:
            asking.settimeout(20)
            asking.sendall(b"what is there?")
            with asking.makefile("rb") as file:
                found: dict[str, list[list[Any]]] = json.loads(file.read())
        wanted = [[data[:12].decode(), len(data)] for data in sent]
        for number, (by, _address) in to.items():
            came = [one for one in found[str(number)] if one[2] != "mapped"]
            assert [one[2:] for one in came] == wanted, f"port {number}"
            assert {one[1] for one in came} == {by.getsockname()[1]}
        assert found["9002"][-1][0] == f"::ffff:{two_hosts.client.address}"
        for looped in ("9004", "9005", "9006"):
            assert [one[2] for one in found[looped]] == ["0", "1", "2", "3", "4"], f"port {looped}"
        assert {one[0] for one in found["9006"]} == {own}
