"""Vocabulary of this package: what a container is, and what others may ask for. Values only, no I/O."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from runtime.errors import BadInput, CorruptData

SPEC_SCHEMA = 1
NAME_PATTERN = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
ID_PATTERN = re.compile(r"[0-9a-f]{12}")


class Status(StrEnum):
    """What ``ps`` shows. ``created`` never ran; ``exited`` has an exit code; ``moved`` lives on another host; ``kept``
    does too, and its processes are here still, frozen, in case it is to come back."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    MOVED = "moved"
    KEPT = "kept"


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """A bind mount: ``source`` on the host, ``destination`` in the container, both absolute."""

    source: str
    destination: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class PortMapping:
    """Host port that leads to a container port."""

    host_port: int
    container_port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    host_address: str = "0.0.0.0"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """cgroup limits; None means no limit. ``cpus`` is in processors (1.5 = one and a half)."""

    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """As docker has it. ``max_retries`` counts for on-failure only; None means without end."""

    name: Literal["no", "always", "on-failure", "unless-stopped"] = "no"
    max_retries: int | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """The container's own address (with prefix length), MAC and way out. They move with the container.

    ``address6`` and ``gateway6`` are the same for IPv6, empty where it has none. ``name`` is that of a user-defined
    network (networks.py), empty for the host's own.
    """

    address: str
    mac: str
    gateway: str
    address6: str = ""
    gateway6: str = ""
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class ContainerSpec:
    """Everything that makes a container what it is; does not change while it lives and travels with it.

    ``rootfs`` is an absolute directory, or ``host``: the host's own root, read-only below an empty upper layer.
    ``env`` are KEY=VALUE. ``user`` is what the container's first process runs as: name, uid, name:group or uid:gid,
    looked up in the container's own /etc/passwd. ``userns`` private gives the container its own user namespace.
    ``tmpfs`` are mount points inside the container that start empty and are carried along by a move.
    """

    id: str
    name: str
    rootfs: str
    argv: tuple[str, ...]
    created_at: str
    env: tuple[str, ...] = ()
    cwd: str = "/"
    user: str = "0:0"
    hostname: str = ""
    volumes: tuple[VolumeMount, ...] = ()
    tmpfs: tuple[str, ...] = ()
    ports: tuple[PortMapping, ...] = ()
    read_only: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    network: NetworkSpec | None = None
    userns: Literal["private", "host"] = "private"
    seccomp: Literal["default", "unconfined"] = "default"
    init: bool = True
    auto_remove: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    schema: int = SPEC_SCHEMA

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise BadInput(f"{self.name!r} is no container name", hint="letters, digits, _ . and -, at most 63")
        if not ID_PATTERN.fullmatch(self.id):
            raise BadInput(f"{self.id!r} is no container id")
        if not self.argv:
            raise BadInput("no command given", hint="cmigrate run [OPTIONS] -- COMMAND [ARG ...]")
        if self.rootfs != "host" and not self.rootfs.startswith("/"):
            raise BadInput(f"--rootfs {self.rootfs!r} is not absolute", hint="give an absolute directory, or 'host'")
        for variable in self.env:
            if "=" not in variable or variable.startswith("="):
                raise BadInput(f"environment entry {variable!r} is not KEY=VALUE")
        for path in (self.cwd, *self.tmpfs, *(volume.destination for volume in self.volumes)):
            if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
                raise BadInput(f"{path!r} is not an absolute path inside the container")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; ``spec_from_json`` gives the same value back."""
        return dataclasses.asdict(self)


def spec_from_json(data: Mapping[str, Any]) -> ContainerSpec:
    """The inverse of ``to_json``, for a file of ours or from a peer: raises CorruptData where a field does not fit."""
    try:
        if data["schema"] != SPEC_SCHEMA:
            raise CorruptData(f"container spec has schema {data['schema']!r}, this version knows {SPEC_SCHEMA}")
        fields = {key: value for key, value in data.items() if key in ContainerSpec.__dataclass_fields__}
        for key in ("argv", "env", "tmpfs", "cap_add", "cap_drop"):
            if not all(isinstance(item, str) for item in fields[key]):
                raise CorruptData(f"container spec: {key} is not a list of strings")
            fields[key] = tuple(fields[key])
        fields["volumes"] = tuple(VolumeMount(**volume) for volume in fields["volumes"])
        fields["ports"] = tuple(PortMapping(**port) for port in fields["ports"])
        fields["limits"] = Limits(**fields["limits"])
        fields["restart"] = RestartPolicy(**fields["restart"])
        fields["network"] = NetworkSpec(**fields["network"]) if fields["network"] is not None else None
        fields["labels"] = tuple((str(key), str(value)) for key, value in fields["labels"])
        return ContainerSpec(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"container spec does not fit: {error!r}") from error


@dataclass(frozen=True, kw_only=True)
class ContainerState:
    """What changes while a container lives. Times are RFC 3339 in UTC, empty when not yet.

    ``init_pid`` and ``init_start_ticks`` (field 22 of /proc/PID/stat) together name one process for good; the same
    for the monitor. ``moved_to`` is the host a moved container lives on. ``stopped_by_user`` decides unless-stopped.
    ``kept_until`` is when a kept one is given up, ``kept_for`` the move that left it.
    """

    status: Status
    init_pid: int = 0
    init_start_ticks: int = 0
    monitor_pid: int = 0
    monitor_start_ticks: int = 0
    started_at: str = ""
    finished_at: str = ""
    exit_code: int | None = None
    oom_killed: bool = False
    restarts: int = 0
    stopped_by_user: bool = False
    moved_to: str = ""
    kept_until: str = ""
    kept_for: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def state_from_json(data: Mapping[str, Any]) -> ContainerState:
    """The inverse of ``ContainerState.to_json``; raises CorruptData."""
    try:
        fields = {key: value for key, value in data.items() if key in ContainerState.__dataclass_fields__}
        fields["status"] = Status(fields["status"])
        return ContainerState(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptData(f"container state does not fit: {error!r}") from error


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container as it is now on this host."""

    spec: ContainerSpec
    state: ContainerState

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def name(self) -> str:
        return self.spec.name
