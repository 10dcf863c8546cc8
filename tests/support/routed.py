"""The lab's hosts as ways out of their containers, and a program in a container that connects where it is told to.

In the lab the client is the containers' gateway; most installations have each host be it, under one address, and
translate addresses there. ``hosts_as_gateways`` makes the lab so, for a while.
"""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.lab import HOSTS, TwoHosts
from tests.support.netns import in_netns

GATEWAY = "10.88.254.254"
FAR = "192.0.2.1"
"""An address of the client's outside the containers' subnet."""
WAN = {"host1": "198.51.100.1", "host2": "198.51.100.2"}
"""Addresses of the hosts on a link to the client that is not the containers' bridge."""
_WAN_CLIENT = "198.51.100.254"

CONNECTOR = """
import errno, socket, threading
made = {}
def answer(words):
    if words[0] == "open":
        made[words[1]] = socket.create_connection((words[2], int(words[3])), 5)
        return "ok"
    try:
        made[words[1]].sendall(words[2].encode())
        return made[words[1]].recv(100).decode() or "end"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
def serve(connection):
    with connection:
        while data := connection.recv(65536):
            try:
                connection.sendall(answer(data.decode().split()).encode())
            except OSError as error:
                connection.sendall(str(error).encode())
def echo(connection):
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
def accept(server, function):
    while True:
        threading.Thread(target=function, args=(server.accept()[0],)).start()
def datagrams(sock):
    while True:
        data, peer = sock.recvfrom(2000); sock.sendto(data, peer)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("0.0.0.0", 8002))
threading.Thread(target=datagrams, args=(udp,)).start()
threading.Thread(target=accept, args=(socket.create_server(("0.0.0.0", 8001)), echo)).start()
accept(socket.create_server(("0.0.0.0", 8000)), serve)
"""


class Connector:
    """The program: port 8000 takes orders, port 8001 is an echo, UDP port 8002 another."""

    name = "connector"
    options: tuple[str, ...] = ()

    def command(self, client: object) -> tuple[str, ...]:
        return ("/usr/bin/python3", "-c", CONNECTOR)

    def open(self, place: Any) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                self._orders: socket.socket = place.connect(8000)
                self._orders.settimeout(20)
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def order(self, *words: object) -> str:
        """``open NAME HOST PORT``: ok; ``ask NAME WORD``: what came back, ``end``, or the name of an errno."""
        self._orders.sendall(" ".join(map(str, words)).encode())
        return self._orders.recv(1000).decode()

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._orders.close()


class EchoServer:
    """A TCP echo in the network of process ``pid``; ``resets`` counts connections that were reset."""

    def __init__(self, pid: int, address: str) -> None:
        self._server: socket.socket = in_netns(pid, lambda: socket.create_server((address, 0)))
        self.port = int(self._server.getsockname()[1])
        self.resets = 0
        self.peers: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        self._serving: list[threading.Thread] = []
        self._open: list[socket.socket] = []

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._server.accept()
            except OSError:
                return
            self.peers.append(peer)
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            thread.start()
            self._serving.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except ConnectionResetError:
                self.resets += 1
            except OSError:
                pass

    def __enter__(self) -> "EchoServer":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._thread, *self._serving):
            thread.join(10)


@contextmanager
def hosts_as_gateways(hosts: TwoHosts) -> Iterator[None]:
    """Each host's bridge has the containers' gateway address, and a way to the client beside it leads to ``FAR``."""
    files = [Path(hosts.lab.directory / host / "etc" / "config.toml") for host in HOSTS]
    texts = [file.read_text() for file in files]

    def ip(host: str, *words: str) -> None:
        hosts.lab.exec(host, ["ip", *words], check=True, timeout=10)

    try:
        ip("client", "address", "add", f"{FAR}/32", "dev", "lo")
        for number, (host, address) in enumerate(WAN.items()):
            pid = str(hosts.lab.host(host).holder.pid)
            ip("client", "link", "add", f"wan{number}", "type", "veth", "peer", "name", "wan", "netns", pid)
            ip("client", "address", "add", _WAN_CLIENT, "peer", address, "dev", f"wan{number}")
            ip("client", "link", "set", f"wan{number}", "up")
            ip(host, "address", "add", f"{address}/24", "dev", "wan")
            # An IPv6 address of the link's own would come a second later.
            ip(host, "link", "set", "wan", "addrgenmode", "none", "up")
            # As ensure_bridge does, but before any container is there.
            ip(host, "address", "add", f"{GATEWAY}/16", "dev", hosts.config(host).bridge)
            ip(host, "route", "add", f"{FAR}/32", "via", _WAN_CLIENT)
        for file, text in zip(files, texts, strict=True):
            lines = [line for line in text.splitlines() if not line.startswith(("gateway ", "bridge_address "))]
            file.write_text("\n".join([*lines, f'gateway = "{GATEWAY}"', ""]))
        yield
    finally:
        for file, text, host in zip(files, texts, HOSTS, strict=True):
            file.write_text(text)
            argv = ["ip", "address", "del", f"{GATEWAY}/16", "dev", hosts.config(host).bridge]
            hosts.lab.exec(host, argv, stderr=subprocess.DEVNULL, timeout=10)
        quiet = {"stderr": subprocess.DEVNULL, "timeout": 10}
        for number in range(len(WAN)):
            hosts.lab.exec("client", ["ip", "link", "del", f"wan{number}"], **quiet)
        hosts.lab.exec("client", ["ip", "address", "del", f"{FAR}/32", "dev", "lo"], **quiet)
