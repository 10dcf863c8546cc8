"""Two lab hosts and a client on this machine, brought up once for all tests that move containers."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from migrate.lab.lab import Lab
from migrate.lab.plan import UPLINK, parse_rate, shaping
from runtime.host import HostConfig, load_host_config
from tests.support.netns import in_netns
from tests.support.services import Service

TOP = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_name("host_picture.py")
COMMAND_TIMEOUT_S = 60.0
GRACE_S = 8.0
HOSTS = ("host1", "host2")


OWNED = re.compile(r"\b(?:cm|ch|cmigrate-)([0-9a-f]{12})\b")
"""A container's id in the name of a link or table."""
SET = ("link", "address", "route", "rule", "neighbour", "bridge port", "nft")
"""Kinds of a picture that nothing but a move or a container changes: here nothing may be missing either."""


class CommandFailed(AssertionError):
    """A command that should have succeeded did not."""


class NetnsClient:
    """The pseudo host ``client`` of the lab: sockets made by ``run`` are its own."""

    def __init__(self, lab: Lab) -> None:
        client = lab.host("client")
        self._pid = client.holder.pid
        self.address = client.address

    def run(self, function: Callable[[], Any]) -> Any:
        return in_netns(self._pid, function)


class Probe:
    """migrate.probe in the client's network."""

    def __init__(self, lab: Lab, kind: str, address: str, *options: str) -> None:
        self._process = lab.popen(
            "client",
            [sys.executable, "-m", "migrate.probe", kind, address, *options],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=TOP,
        )
        self._wait_until_it_listens()

    def _wait_until_it_listens(self) -> None:
        """To the signal that ``mark`` sends: it would end a program that has not got so far yet."""
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while self._process.poll() is None:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)
            if caught >> (signal.SIGUSR1 - 1) & 1:
                return
            assert time.monotonic() < deadline, "the probe does not begin"
            time.sleep(0.01)

    def mark(self) -> dict[str, Any]:
        """What it saw since the last mark."""
        self._process.send_signal(signal.SIGUSR1)
        return self._line()

    def end(self) -> dict[str, Any]:
        """What it saw in all."""
        self._process.terminate()
        try:
            return self._line()
        finally:
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process.wait(40)

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line: dict[str, Any] = json.loads(self._process.stdout.readline())
        return line


class TwoHosts:
    """What tests do with the lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.client = NetnsClient(lab)

    def cmigrate(
        self, host: str, *arguments: str, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host; with ``check`` a code other than 0 raises CommandFailed with all it said."""
        done = self.lab.exec(
            host,
            ["cmigrate", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise CommandFailed(
                f"{host}: cmigrate {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    @contextmanager
    def moving(self, name: str, *options: str) -> Iterator["subprocess.Popen[str]"]:
        """A move from host1 to host2 in the background, in a group of its own as a shell would start it; over when the
        block is."""
        process: subprocess.Popen[str] = self.lab.popen(
            "host1",
            ["cmigrate", "move", name, "--to", "host2", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def lines(self, host: str, *arguments: str) -> list[dict[str, Any]]:
        """Standard output as lines of JSON."""
        return [json.loads(line) for line in self.cmigrate(host, *arguments).stdout.splitlines()]

    def config(self, host: str) -> HostConfig:
        """The host's settings; its paths are as the host sees them."""
        return load_host_config(self.lab.directory / host / "etc")

    def picture(self, host: str) -> dict[str, list[str]]:
        config = self.config(host)
        done = self.lab.exec(
            host,
            ["/usr/bin/python3", str(PICTURE), config.cgroup_parent, str(config.state_dir), str(config.run_dir)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        picture: dict[str, list[str]] = json.loads(done.stdout)
        return picture

    def network_picture(self, host: str) -> dict[str, list[str]]:
        """Without what belongs to containers that run there now."""
        argv = ["/usr/bin/python3", str(PICTURE)]
        done = self.lab.exec(host, argv, stdout=subprocess.PIPE, text=True, timeout=COMMAND_TIMEOUT_S)
        picture: dict[str, list[str]] = json.loads(done.stdout)
        running = self._running_on(host)
        return {
            kind: [line for line in lines if not running & set(OWNED.findall(line))] for kind, lines in picture.items()
        }

    def _running_on(self, host: str) -> set[str]:
        found = set()
        for file in Path(self.lab.directory / host / "state" / "containers").glob("*/state.json"):
            with contextlib.suppress(FileNotFoundError):
                if json.loads(file.read_text())["status"] in ("running", "paused"):
                    found.add(file.parent.name)
        return found

    def run(self, service: Service, *options: str, host: str = "host1", name: str = "") -> "Running":
        """Start a service in a container, fill it, and hand it out with its connections open."""
        name = name or service.name
        command = service.command(self.client)
        arguments = ("run", "-d", "--name", name, "--rootfs", "host", *service.options, *options, "--", *command)
        self.cmigrate(host, *arguments)
        running = Running(self, name, host)
        try:
            service.open(running)
        except BaseException as error:
            logs = self.cmigrate(host, "logs", name, check=False)
            error.add_note(f"the container's log:\n{logs.stdout}{logs.stderr}")
            running.remove()
            with contextlib.suppress(AttributeError):  # it may not have opened what it would close
                service.close()
            raise
        return running


class Running:
    """A container, wherever it is at the moment."""

    def __init__(self, hosts: TwoHosts, name: str, host: str) -> None:
        self.hosts = hosts
        self.name = name
        self.host = host
        self._networks = {name: hosts.network_picture(name) for name in HOSTS}
        self.client = hosts.client
        spec = self.inspect()["spec"]
        self.id = str(spec["id"])
        self.address = str(spec["network"]["address"]).partition("/")[0]

    @property
    def other(self) -> str:
        return HOSTS[1 - HOSTS.index(self.host)]

    def inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.hosts.cmigrate(self.host, "inspect", self.name).stdout)
        return found

    def connect(self, port: int) -> socket.socket:
        connection: socket.socket = self.client.run(lambda: socket.create_connection((self.address, port), 10))
        return connection

    def exec(self, *argv: str) -> str:
        return self.hosts.cmigrate(self.host, "exec", self.name, *argv).stdout

    def logs(self) -> list[str]:
        return self.hosts.cmigrate(self.host, "logs", self.name).stdout.splitlines()

    def move(self, mode: str, transport: str, *options: str) -> dict[str, Any]:
        """To the other host; its report. Raises CommandFailed where the exit code is not 0."""
        target = self.other
        lines = self.hosts.lines(
            self.host, "move", self.name, "--to", target, "--mode", mode, "--transport", transport, "--json", *options
        )
        self.host = target
        self.networks_are_as_before()
        return lines[-1]

    def networks_are_as_before(self) -> None:
        """Both hosts' links, addresses, routes and rules are those that were there when the container was started, but
        for what belongs to containers that run there now. Raises AssertionError."""
        within_grace(
            lambda: [
                f"{host}: {line}"
                for host in HOSTS
                for line in changes(self._networks[host], self.hosts.network_picture(host))
            ]
        )

    def remove(self) -> None:
        """From wherever it is; also where it should not be."""
        for host in HOSTS:
            self.hosts.cmigrate(host, "rm", "-f", self.name, check=False)


def changes(before: dict[str, list[str]], now: dict[str, list[str]]) -> list[str]:
    """What is there now and was not, and of the network also what is there no more. Tables that stand on a host once it
    has had a container may appear, but not change."""
    found = [f"new {kind}: {item}" for kind, items in now.items() for item in sorted(set(items) - set(before[kind]))]
    gone = [f"no more {kind}: {item}" for kind in SET for item in sorted(set(before[kind]) - set(now[kind]))]
    tables = {item.partition(":")[0] for item in before["nft"] if item.startswith("standing ")}
    standing = re.compile(r"new nft: (standing [^:]*):")
    return [line for line in found if not (match := standing.match(line)) or match[1] in tables] + gone


def within_grace(look: Callable[[], list[str]]) -> None:
    """Fail unless ``look`` finds nothing soon: processes end, namespaces are reaped."""
    deadline = time.monotonic() + GRACE_S
    while left := look():
        if time.monotonic() > deadline:
            raise AssertionError("other than before:\n  " + "\n  ".join(left))
        time.sleep(0.2)


@contextmanager
def nothing_left_on(hosts: TwoHosts, *names: str) -> Iterator[None]:
    """Fail unless each host looks as it did before, after a short grace."""
    before = {name: hosts.picture(name) for name in names}
    yield
    within_grace(lambda: [f"{name}: {item}" for name in names for item in changes(before[name], hosts.picture(name))])


@contextmanager
def slow_link(hosts: TwoHosts, host: str, mib_per_s: float) -> Iterator[None]:
    """What leaves ``host`` is limited."""
    rate = parse_rate(f"{mib_per_s * 8 * 1.048576:g}mbit")
    hosts.lab.exec(host, ["tc", "-batch", "-"], input=shaping([UPLINK], rate), text=True, check=True)
    try:
        yield
    finally:
        hosts.lab.exec(host, ["tc", "qdisc", "del", "dev", UPLINK, "root"], check=True)


@contextmanager
def lab_of_two_hosts(directory: Path) -> Iterator[TwoHosts]:
    """Bring the lab up in ``directory``, which must be on a disk; take it down whatever happens."""
    lab = Lab(directory / "lab")
    try:
        lab.up()
        yield TwoHosts(lab)
    finally:
        lab.down()


def disk_directory() -> Path:
    """A new directory on a disk, for the session's lab; scripts/test removes its own one however a run ends."""
    return Path(tempfile.mkdtemp(prefix="cmigrate-test-", dir=os.environ.get("CMIGRATE_TEST_SCRATCH", "/var/tmp")))
