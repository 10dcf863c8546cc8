"""What ``scripts/netbench`` runs: services move there and back under load, and their clients are asked what they saw.

redis: redis-benchmark with 50 connections, and a probe that counts with INCR on one connection, each millisecond
http:  nginx, four kept connections that ask every 5 ms, and a probe that asks each millisecond on one more
udp:   an echo, and a probe that sends a datagram each millisecond
flow:  one connection that carries all it can, as iperf3's, and a probe on an echo beside it
ssh:   a login through a published port that stays open and is asked after each move, and a probe on an echo through it

{"type": "move", "load", "number", "mode", "blackout_ms", "gap_ms", "over_ms", "failed", "resets"}   for each move
{"type": "load", "load", "moves", "over_ms": {"median", "p99", "worst"}, "failed", "resets", "broken"}   at the end

``over_ms`` is the probe's longest time without an answer minus the blackout: what the network adds. ``broken`` counts
load clients that lost a connection (redis-benchmark ends then; a kept connection that had to be opened again counts).
The exit code is 1 when a request failed or a connection broke; lost datagrams are told and are no failure.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from runtime.errors import RuntimeFault
from scripts.netbench_ssh import TUNNEL, Ssh, login
from tests.support.lab import Probe, Running, TwoHosts, disk_directory, lab_of_two_hosts
from tests.support.routed import hosts_as_gateways
from tests.support.services import Nginx, Redis, Service, until_ready

SETTLE_S = 0.5
CONNECTIONS = 50
HTTP_CLIENTS = 4
ECHO = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 8001))\n"
    "while True: data, peer = s.recvfrom(2000); s.sendto(data, peer)"
)
FLOW = """
import socket, threading
def serve(connection, echo):
    with connection:
        while data := connection.recv(1 << 18):
            if echo: connection.sendall(data)
def listen(port, echo):
    server = socket.create_server(("0.0.0.0", port), backlog=64)
    while True:
        threading.Thread(target=serve, args=(server.accept()[0], echo)).start()
threading.Thread(target=listen, args=(8002, False)).start()
listen(8001, True)
"""
SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 8002))
while True:
    connection.sendall(bytes(1 << 18))
"""
Tell = Callable[[dict[str, Any]], None]


class Echo:
    """Datagrams come back."""

    name = "echo"
    options: tuple[str, ...] = ()

    def command(self, client: object) -> tuple[str, ...]:
        return ("/usr/bin/python3", "-c", ECHO)

    def open(self, place: Any) -> None:
        # Bound when the kernel's table has it: nobody answers a question that came too early.
        until_ready(lambda: _bound(place.exec("cat", "/proc/net/udp")))

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class Flow:
    """Takes in what comes on one port, and gives it back on another."""

    name = "flow"
    options: tuple[str, ...] = ()

    def command(self, client: object) -> tuple[str, ...]:
        return ("/usr/bin/python3", "-c", FLOW)

    def open(self, place: Any) -> None:
        until_ready(lambda: [place.connect(port).close() for port in (8001, 8002)])

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def _bound(table: str) -> None:
    if ":1F41" not in table:
        raise ConnectionRefusedError


@contextmanager
def endless(hosts: TwoHosts, argv: list[str]) -> Iterator[Callable[[], int]]:
    """A client without end; answers whether it has ended nevertheless."""
    process = hosts.lab.popen(
        "client", argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield lambda: int(process.poll() is not None)
    finally:
        process.kill()
        process.wait(10)


def benchmark(hosts: TwoHosts, container: Running, _service: Service) -> AbstractContextManager[Callable[[], int]]:
    argv = ["redis-benchmark", "-h", container.address, "-c", str(CONNECTIONS), "-n", "1000000000", "-t", "get", "-q"]
    return endless(hosts, argv)


def flow(hosts: TwoHosts, container: Running, _service: Service) -> AbstractContextManager[Callable[[], int]]:
    return endless(hosts, ["/usr/bin/python3", "-c", SEND, container.address])


@contextmanager
def kept_connections(hosts: TwoHosts, container: Running, _service: Service) -> Iterator[Callable[[], int]]:
    address = f"{container.address}:8080"
    probes = [Probe(hosts.lab, "http", address, "--path", "/ping", "--interval-ms", "5") for _ in range(HTTP_CLIENTS)]
    try:
        yield lambda: sum(bool(seen["failed"] or seen["reconnects"]) for seen in (probe.mark() for probe in probes))
    finally:
        for probe in probes:
            probe.end()


@contextmanager
def no_more(_hosts: TwoHosts, _container: Running, _service: Service) -> Iterator[Callable[[], int]]:
    yield lambda: 0


@dataclass(frozen=True, kw_only=True)
class Load:
    """``clients`` run beside the probe; the answer is how many of them lost a connection. ``probe``: its kind, port in
    the container or address, options. ``world`` is how the hosts are connected meanwhile."""

    service: Callable[[], Service]
    clients: Callable[[TwoHosts, Running, Any], AbstractContextManager[Callable[[], int]]]
    probe: tuple[str, ...]
    world: Callable[[TwoHosts], AbstractContextManager[None]] = lambda _hosts: nullcontext()


LOADS = {
    "redis": Load(service=Redis, clients=benchmark, probe=("redis", "6379")),
    "http": Load(service=Nginx, clients=kept_connections, probe=("http", "8080", "--path", "/ping")),
    "udp": Load(service=Echo, clients=no_more, probe=("udp", "8001")),
    "flow": Load(service=Flow, clients=flow, probe=("echo", "8001")),
    "ssh": Load(service=Ssh, clients=login, probe=("echo", TUNNEL), world=hosts_as_gateways),
}


def measure(hosts: TwoHosts, load: str, *, moves: int, modes: list[str], transport: str, tell: Tell) -> dict[str, Any]:
    """Move a service so often under its load, the modes in turn; what ``tell`` gets for each move, and the summary."""
    kind, port, *words = LOADS[load].probe
    lines: list[dict[str, Any]] = []
    broken = 0
    with ExitStack() as undo:
        undo.enter_context(LOADS[load].world(hosts))
        service = LOADS[load].service()
        container = hosts.run(service)
        undo.callback(container.remove)
        undo.callback(service.close)
        count_broken = undo.enter_context(LOADS[load].clients(hosts, container, service))
        probe = Probe(hosts.lab, kind, port if ":" in port else f"{container.address}:{port}", *words)
        undo.callback(probe.end)
        time.sleep(SETTLE_S)
        for number in range(1, moves + 1):
            probe.mark()
            mode = modes[(number - 1) % len(modes)]
            report = container.move(mode, transport)
            time.sleep(SETTLE_S)
            lines.append(_line(load, number, report, probe.mark()))
            broken += count_broken()
            tell(lines[-1])
    return _summary(load, lines, broken)


def _line(load: str, number: int, report: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "move",
        "load": load,
        "number": number,
        "mode": report["mode"],
        "blackout_ms": report["blackout_ms"],
        "gap_ms": seen["longest_gap_ms"],
        "over_ms": round(seen["longest_gap_ms"] - report["blackout_ms"], 3),
        "failed": seen["failed"],
        "resets": seen["resets"],
    }


def _summary(load: str, lines: list[dict[str, Any]], broken: int) -> dict[str, Any]:
    over = sorted(line["over_ms"] for line in lines)
    return {
        "type": "load",
        "load": load,
        "moves": len(lines),
        "over_ms": {"median": statistics.median(over), "p99": over[math.ceil(len(over) * 0.99) - 1], "worst": over[-1]},
        "failed": sum(line["failed"] for line in lines),
        "resets": sum(line["resets"] for line in lines),
        "broken": broken,
    }


def tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/netbench", description="What clients notice of moves under load.")
    parser.add_argument("--moves", type=int, default=20, metavar="N", help="of each load (default: 20)")
    parser.add_argument("--loads", type=words, default=list(LOADS), metavar="LOAD,LOAD")
    parser.add_argument("--modes", type=words, default=["diskless", "precopy"], metavar="MODE,MODE")
    parser.add_argument("--transport", choices=("ssh", "stream"), default="stream")
    options = parser.parse_args()
    unknown = [load for load in options.loads if load not in LOADS]
    if unknown or options.moves < 1:
        parser.error(f"loads are {', '.join(LOADS)}; at least one move")
    directory = disk_directory()
    bad = 0
    try:
        with lab_of_two_hosts(directory) as hosts:
            for load in options.loads:
                seen = measure(
                    hosts, load, moves=options.moves, modes=options.modes, transport=options.transport, tell=tell
                )
                tell(seen)
                bad += seen["resets"] + seen["broken"] + (seen["failed"] if load != "udp" else 0)
    except RuntimeFault as error:
        print(f"netbench: {error.what}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
