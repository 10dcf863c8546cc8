"""Two lab hosts and a client on this machine, brought up once for all tests that move containers."""

import contextlib
import json
import os
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
from runtime.host import HostConfig, load_host_config
from tests.support.netns import in_netns
from tests.support.services import Service

TOP = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_name("host_picture.py")
COMMAND_TIMEOUT_S = 60.0
GRACE_S = 8.0
HOSTS = ("host1", "host2")


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
        self.client = hosts.client
        self.id = str(self.inspect()["spec"]["id"])
        self.address = str(self.inspect()["spec"]["network"]["address"]).partition("/")[0]

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
        return lines[-1]

    def remove(self) -> None:
        """From wherever it is; also where it should not be."""
        for host in HOSTS:
            self.hosts.cmigrate(host, "rm", "-f", self.name, check=False)


def new_since(before: dict[str, list[str]], now: dict[str, list[str]]) -> list[str]:
    return [f"{kind}: {item}" for kind, items in now.items() for item in sorted(set(items) - set(before[kind]))]


@contextmanager
def nothing_left_on(hosts: TwoHosts, *names: str) -> Iterator[None]:
    """Fail unless each host looks as it did before, after a short grace (processes end, namespaces are reaped)."""
    before = {name: hosts.picture(name) for name in names}
    yield
    deadline = time.monotonic() + GRACE_S
    while True:
        left = [f"{name}: {item}" for name in names for item in new_since(before[name], hosts.picture(name))]
        if not left:
            return
        if time.monotonic() > deadline:
            raise AssertionError("left behind:\n  " + "\n  ".join(left))
        time.sleep(0.2)


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
