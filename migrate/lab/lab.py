"""A lab: hosts as network, mount and UTS namespaces on this machine, each with its own state, SSH server and agent.

Everything of a lab is in its cgroup tree, its namespaces and its directory, whose path gives the tree its name: taking
it down needs no record of what was started, and two labs in two directories share nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from migrate.inventory import locked_directory, public_key_file, write_ssh_key
from migrate.lab import plan
from migrate.lab.cgroups import LabCgroup, find_hierarchies
from migrate.lab.plan import CLIENT, ENTER_NAME, ENTER_SCRIPT, Rate
from migrate.lab.processes import ProcessId, Starting, listening_ports, read_tcp_tables, run, start_detached, tail
from migrate.lab.record import RECORD_NAME, LabHost, LabRecord, read_record, write_record
from migrate.trust import own_command
from runtime.background import Background
from runtime.errors import BadInput, CorruptData, MissingFeature, NotFound, ProgramFailed, WrongState
from runtime.host import CONFIG_DIR, HostConfig

DEFAULT_DIRECTORY = Path("/var/lib/cmigrate-lab")
DIRECTORY_VARIABLE = "CMIGRATE_LAB_DIR"
STATE_DIR = HostConfig(name="any").state_dir
DAEMONS = {"sshd": plan.SSH_PORT, "serve": plan.STREAM_PORT}
"""Name of the log, and the port by which it is known to be ready."""

READY_TIMEOUT_S = 30.0
ADD_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 15.0
POLL_S = 0.01
ADDS_AT_ONCE = 4

"""Extended attribute of directories that a lab made outside its own: the last lab removes those and no others."""


def default_directory() -> Path:
    return Path(os.environ.get(DIRECTORY_VARIABLE) or DEFAULT_DIRECTORY)


class Lab:
    """The lab in ``directory`` (default: $CMIGRATE_LAB_DIR, then /var/lib/cmigrate-lab), which should be on a disk."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = Path(os.path.realpath(directory or default_directory()))
        if self.directory.is_relative_to("/run"):
            raise BadInput(f"{self.directory}: a lab cannot be below /run", hint="each of its hosts has its own /run")
        self.id = plan.lab_id(self.directory)

    # Looking

    @property
    def hosts(self) -> tuple[LabHost, ...]:
        """The hosts that are up, without the client; empty when the lab is down."""
        record = read_record(self.directory)
        return tuple(host for host in record.hosts if not host.is_client) if record and record.complete else ()

    @property
    def record(self) -> LabRecord | None:
        return read_record(self.directory)

    def host(self, name: str) -> LabHost:
        """A host by name, or ``client``. Raises WrongState when the lab is down, NotFound."""
        record = read_record(self.directory)
        if record is None or not record.complete:
            raise WrongState("the lab is down", hint="run `cmigrate lab up`")
        names = [host.name for host in record.hosts]
        if name not in names:
            raise NotFound(f"the lab has no host {name!r}", hint=f"it has {', '.join(names)}")
        host = record.hosts[names.index(name)]
        if not host.holder.alive():
            raise WrongState(f"lab host {name} is dead", hint="run `cmigrate lab down` and `cmigrate lab up`")
        return host

    # Doing something in it

    def exec(self, name: str, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` on a host or the client; ``env`` adds to the environment, ``cwd`` is as seen there."""
        command, environment = self._entering(name, argv, options)
        options.setdefault("check", False)
        return subprocess.run(command, env=environment, **options)

    def popen(self, name: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` on a host or the client; the pid is the command's own."""
        command, environment = self._entering(name, argv, options)
        return subprocess.Popen(command, env=environment, **options)

    def entering(self, name: str, argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Command and environment that run ``argv`` on a host, for who wants to exec them."""
        return self._entering(name, argv, {})

    def _entering(self, name: str, argv: Sequence[str], options: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
        directory = options.pop("cwd", None) or os.getcwd()
        environment = self._environment(name, os.environ) | dict(options.pop("env", None) or {})
        host = self.host(name)
        return self._enter_command(name, host.holder.pid, [os.fspath(word) for word in argv], directory), environment

    def _enter_command(self, name: str, holder_pid: int, argv: Sequence[str], directory: str | Path = "/") -> list[str]:
        namespaces = ["nsenter", "--target", str(holder_pid), "--net", "--mount", "--uts", "--"]
        procs = self._cgroup().procs_file(name)
        return [*namespaces, "/bin/sh", "-c", ENTER_SCRIPT, ENTER_NAME, str(procs), str(directory), *argv]

    def _environment(self, name: str, base: Mapping[str, str]) -> dict[str, str]:
        kept = {key: value for key, value in base.items() if key not in ("CMIGRATE_CONFIG", DIRECTORY_VARIABLE)}
        return {**kept, "PATH": host_path(), "HOME": str(self.directory / name / "home")}

    def _cgroup(self) -> LabCgroup:
        return LabCgroup(find_hierarchies(), self.id)

    # Up

    def up(self, hosts: int = 2, *, rate: str = "", routed: bool = False) -> bool:
        """Bring the lab up; False when it was up already. What a dead or half-made lab left is taken down first.
        ``routed``: each host has a segment of its own, and the client routes between them.

        Raises WrongState when it is up with another number of hosts, another rate or shape, and whatever goes wrong on
        the way; then nothing is left of it.
        """
        refuse_inside_a_lab()
        names = plan.host_names(hosts)
        shape = plan.parse_rate(rate) if rate else None
        with self._locked():
            if self._is_up():
                self._must_match(names, rate, routed)
                return False
            self._down()
            with ExitStack() as undo:
                undo.callback(self._down)
                self._build(names, shape, LabRecord(id=self.id, rate=rate, routed=routed))
                undo.pop_all()
        return True

    def _is_up(self) -> bool:
        try:
            record = read_record(self.directory)
        except CorruptData:
            return False
        return record is not None and record.complete and not any(host.dead() for host in record.hosts)

    def _must_match(self, names: Sequence[str], rate: str, routed: bool) -> None:
        record = read_record(self.directory)
        assert record is not None
        existing = [host.name for host in record.hosts if not host.is_client]
        if existing != list(names) or record.rate != rate or record.routed != routed:
            shape = (f" at {record.rate}" if record.rate else "") + (", routed" if record.routed else "")
            raise WrongState(
                f"the lab is up with {', '.join(existing)}{shape}",
                hint="run `cmigrate lab down` first",
            )

    def _build(self, names: Sequence[str], shape: Rate | None, record: LabRecord) -> None:
        if os.listdir(self.directory):
            raise BadInput(f"{self.directory} holds other things", hint="give a lab a directory of its own")
        write_record(self.directory, record)
        addresses = {CLIENT: plan.client_address(routed=record.routed)}
        addresses |= {name: plan.host_address(n, routed=record.routed) for n, name in enumerate(names, start=1)}
        self._write_files(addresses, routed=record.routed)
        with _between_labs():
            self._cgroup().create([CLIENT, *names])
            for place in (CONFIG_DIR, STATE_DIR):
                make_mount_point(place)
        holders = self._start_holders([CLIENT, *names])
        self._connect(holders, shape, routed=record.routed)
        daemons = {name: self._start_daemons(name, holders[name].pid) for name in names}
        for name in names:
            self._wait_ready(name, holders[name].pid, daemons[name])
        found = tuple(
            LabHost(name=name, address=address, holder=holders[name], daemons=daemons.get(name, {}))
            for name, address in addresses.items()
        )
        self._introduce(found)
        write_record(self.directory, replace(record, hosts=found, complete=True))

    def _write_files(self, addresses: dict[str, str], *, routed: bool) -> None:
        """Directories, configuration and keys of every host."""
        (self.directory / CLIENT / "home").mkdir(parents=True, mode=0o700)
        operator = self.directory / "operator"
        operator.mkdir(mode=0o700)
        write_ssh_key(operator / "id_ed25519", "operator@lab")
        let_in = public_key_file(operator / "id_ed25519").read_text()
        for name in addresses.keys() - {CLIENT}:
            place = self.directory / name
            for part in ("state", "etc", "home/.ssh"):
                (place / part).mkdir(parents=True, mode=0o700)
            config = plan.config_toml(
                name=name,
                address=addresses[name],
                cgroup_parent=self._cgroup().containers_parent(name),
                routed=routed,
            )
            (place / "etc" / "config.toml").write_text(config)
            (place / "home" / ".ssh" / "authorized_keys").write_text(let_in)
            write_ssh_key(place / "ssh_host_ed25519_key", name)
            (place / "sshd_config").write_text(plan.sshd_config(directory=place, path=host_path()))
        existing = _read_text(Path("/etc/hosts"))
        (self.directory / "hosts").write_text(plan.hosts_file(existing, addresses))
        # Without PAM sshd takes a password that begins with ! for a locked account, and lets no key in either.
        if any(line.startswith("root:!") for line in _read_text(Path("/etc/shadow")).splitlines()):
            (self.directory / "shadow").write_text("root:*:20000:0:99999:7:::\n")

    def _start_holders(self, names: Sequence[str]) -> dict[str, ProcessId]:
        """All at once; each is in its namespaces and has its mounts when this returns."""
        starting = {name: Starting(self._holder_argv(name), log=self._log(name, "holder")) for name in names}
        holders: dict[str, ProcessId] = {}
        with ExitStack() as rest:
            for start in starting.values():
                rest.callback(start.abandon)
            for name, start in starting.items():
                holders[name] = start.finish()
        return holders

    def _holder_argv(self, name: str) -> list[str]:
        place = self.directory / name
        mounts = [(self.directory / file, Path("/etc", file)) for file in ("hosts", "shadow")]
        if name != CLIENT:
            mounts += [(place / "state", STATE_DIR), (place / "etc", CONFIG_DIR)]
        pairs = [
            str(path) for source, point in mounts if source.exists() and point.exists() for path in (source, point)
        ]
        unshare = ["unshare", "--net", "--mount", "--uts", "--propagation", "private", "--"]
        script = [*unshare, "/bin/sh", "-c", plan.holder_script()]
        return [*script, str(self._cgroup().procs_file(name)), name, *pairs]

    def _connect(self, holders: Mapping[str, ProcessId], shape: Rate | None, *, routed: bool) -> None:
        hosts = [name for name in holders if name != CLIENT]
        client_links, host_links = plan.client_links, plan.host_links
        if routed:
            client_links, host_links = plan.routed_client_links, plan.routed_host_links
            self._in_net(holders[CLIENT], ["sh"], plan.ROUTING)
        self._in_net(holders[CLIENT], ["ip", "-batch", "-"], client_links([holders[name].pid for name in hosts]))
        for number, name in enumerate(hosts, start=1):
            self._in_net(holders[name], ["ip", "-batch", "-"], host_links(number))
            if shape:
                self._in_net(holders[name], ["tc", "-batch", "-"], plan.shaping([plan.UPLINK], shape))
        if shape:
            ports = [f"h{number}" for number in range(1, len(hosts) + 1)]
            self._in_net(holders[CLIENT], ["tc", "-batch", "-"], plan.shaping(ports, shape))

    def _in_net(self, holder: ProcessId, argv: Sequence[str], script: str) -> None:
        run(["nsenter", "--target", str(holder.pid), "--net", "--", *argv], stdin=script)

    def _start_daemons(self, name: str, holder_pid: int) -> dict[str, ProcessId]:
        sshd = shutil.which("sshd", path=plan.SYSTEM_PATH)
        if sshd is None:
            raise MissingFeature(
                "no SSH server is installed", hint="run scripts/setup, or apt-get install openssh-server"
            )
        commands = {
            "sshd": [sshd, "-D", "-e", "-f", str(self.directory / name / "sshd_config")],
            "serve": [*own_command(HostConfig(name=name)), "serve"],
        }
        environment = self._environment(name, {key: os.environ[key] for key in ("LANG",) if key in os.environ})
        return {
            daemon: start_detached(
                self._enter_command(name, holder_pid, argv), log=self._log(name, daemon), environment=environment
            )
            for daemon, argv in commands.items()
        }

    def _wait_ready(self, name: str, holder_pid: int, daemons: Mapping[str, ProcessId]) -> None:
        limit_s = time.monotonic() + READY_TIMEOUT_S
        while not set(DAEMONS.values()) <= listening_ports(read_tcp_tables(holder_pid)):
            dead = [daemon for daemon, process in daemons.items() if not process.alive()]
            if dead or time.monotonic() > limit_s:
                which = dead[0] if dead else "a daemon"
                said = "; ".join(f"{daemon}: {tail(self._log(name, daemon))}" for daemon in dead or daemons)
                raise ProgramFailed(f"{which} of lab host {name} did not come up: {said}")
            time.sleep(POLL_S)

    def _introduce(self, hosts: Sequence[LabHost]) -> None:
        """What an operator does for real machines: `cmigrate host add`, once for each two, which works both ways."""
        key = str(self.directory / "operator" / "id_ed25519")

        def add(pair: tuple[LabHost, LabHost]) -> None:
            here, there = pair
            argv = [*own_command(HostConfig(name=here.name)), "host", "add", there.name, f"root@{there.address}"]
            done = subprocess.run(
                self._enter_command(here.name, here.holder.pid, [*argv, "--yes", "--identity", key]),
                env=self._environment(here.name, {}),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=ADD_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise ProgramFailed(f"{here.name} could not add {there.name}: {done.stderr.strip()}")

        with ThreadPoolExecutor(ADDS_AT_ONCE) as pool:
            list(pool.map(add, combinations([host for host in hosts if not host.is_client], 2)))

    def _log(self, name: str, program: str) -> Path:
        return self.directory / name / f"{program}.log"

    # Down

    def down(self) -> bool:
        """Kill every process of the lab, containers and all, and remove what it has made. Whether there was one."""
        refuse_inside_a_lab()
        if not self.directory.exists() and not self._cgroup().exists():
            return False
        with self._locked():
            existed = self._down()
        with contextlib.suppress(OSError):
            self.directory.rmdir()
        return existed

    def _down(self) -> bool:
        """Needs no record, but where there is neither record nor cgroup nothing in the directory is ours."""
        record = self.directory / RECORD_NAME
        cgroup = self._cgroup()
        if not record.exists() and not cgroup.exists():
            return False
        with _between_labs():
            cgroup.destroy(KILL_TIMEOUT_S)
        Background().sweep()
        for entry in self.directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != record:
                entry.unlink()
        record.unlink(missing_ok=True)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One command at a time changes a lab."""
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with locked_directory(self.directory):
            yield


def host_path() -> str:
    """PATH on a lab host: this checkout's cmigrate first."""
    program = own_command(HostConfig(name="any"))[0]
    return f"{Path(program).parent}:{plan.SYSTEM_PATH}"


def refuse_inside_a_lab() -> None:
    """On a lab host this command would kill itself half-way."""
    if f"/{plan.CGROUP_ROOT}/" in _read_text(Path("/proc/self/cgroup")):
        raise WrongState("this is a host of a lab", hint="run it on the machine that the lab is on")


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# What labs share


def _between_labs() -> AbstractContextManager[None]:
    """While one lab makes or removes what all labs on this machine share, no other one does."""
    return locked_directory(STATE_DIR.parent)


def make_mount_point(path: Path) -> None:
    """A directory on the machine's own file system that each lab host mounts its own over.

    It stays when the lab goes: removing a directory takes away what other labs have mounted on it.
    """
    path.mkdir(mode=0o700, exist_ok=True)
