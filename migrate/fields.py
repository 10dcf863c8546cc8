"""Types of the fields of control messages: what each one is in Python and how a peer's value for it is checked."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from migrate.wire import (
    MAX_LIST,
    MAX_TEXT,
    Check,
    Unfit,
    choice,
    integer,
    list_of,
    map_of,
    read_facts,
    read_flag,
    real,
    text,
    word,
)
from runtime.api import ContainerSpec, spec_from_json
from runtime.criu.options import ExternalMount
from runtime.errors import BadInput, CorruptData
from runtime.linux.tcp_table import TcpConnection
from runtime.wire import WireSpec


@dataclass(frozen=True, kw_only=True)
class SharedPlace:
    """A segment of shared memory that is not in CRIU's images: its number, and where a task (by its pid inside) maps
    some of it."""

    id: int
    size_bytes: int
    pid: int
    address: int


def _read_place(value: Any) -> SharedPlace:
    if not isinstance(value, dict):
        raise Unfit("not a segment of shared memory")
    return SharedPlace(
        id=integer(0, 2**32 - 1).read(value.get("id")),
        size_bytes=integer(0, 2**56).read(value.get("size_bytes")),
        pid=integer(1, 2**31 - 1).read(value.get("pid")),
        address=integer(0, 2**57 - 1).read(value.get("address")),
    )


def _read_spec(value: Any) -> ContainerSpec:
    if not isinstance(value, dict):
        raise Unfit("not a container spec")
    try:
        return spec_from_json(value)
    except (CorruptData, BadInput) as error:
        raise Unfit(error.what) from error


def _read_mount(value: Any) -> ExternalMount:
    if not isinstance(value, dict):
        raise Unfit("not a mount")
    line = text(MAX_TEXT)
    return ExternalMount(key=line.read(value.get("key")), point=line.read(value.get("point")))


def _read_connection(value: Any) -> TcpConnection:
    if not isinstance(value, dict):
        raise Unfit("not a connection")
    port, address = integer(0, 65535), text(64)
    try:
        return TcpConnection(
            local=ipaddress.ip_address(address.read(value.get("local"))),
            local_port=port.read(value.get("local_port")),
            remote=ipaddress.ip_address(address.read(value.get("remote"))),
            remote_port=port.read(value.get("remote_port")),
            family_bits=integer(32, 128).read(value.get("family_bits")),
        )
    except ValueError as error:
        raise Unfit("not a connection between addresses") from error


def _write_connection(connection: TcpConnection) -> dict[str, Any]:
    return {**asdict(connection), "local": str(connection.local), "remote": str(connection.remote)}


def _read_pipes(value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise Unfit("not two pipes")
    inode = integer(0, 2**64 - 1)
    return inode.read(value[0]), inode.read(value[1])


def _read_finding(value: Any) -> dict[str, str]:
    """As preflight's findings are: level, check, what, remedy."""
    if not isinstance(value, dict):
        raise Unfit("not a finding")
    line = text(MAX_TEXT)
    level = choice("blocker", "warning", "ok").read(value.get("level"))
    return {"level": level, **{key: line.read(value.get(key, "")) for key in ("check", "what", "remedy")}}


def _read_wire(value: Any) -> WireSpec | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Unfit("not a wire")
    ends = {key: text(64).read(value.get(key)) for key in ("source", "target")}
    number, grace_s = integer(1, 2**24 - 1).read(value.get("number")), integer(0, 2**31).read(value.get("grace_s"))
    try:
        _ = [ipaddress.ip_address(end) for end in ends.values()]
    except ValueError as error:
        raise Unfit("no wire between addresses") from error
    return WireSpec(number=number, grace_s=grace_s, **ends)


Text = Annotated[str, text(MAX_TEXT)]
MoveId = Annotated[str, word(64)]
Epoch = Annotated[int, integer(1, 2**63 - 1)]
Count = Annotated[int, integer(0, 2**63 - 1)]
ProtocolNumber = Annotated[int, integer(1, 2**31 - 1)]
ModeName = Annotated[str, choice("stopcopy", "diskless", "precopy", "postcopy", "hybrid")]
Flag = Annotated[bool, Check(read_flag)]
Time = Annotated[float, Check(real)]
Spec = Annotated[ContainerSpec, Check(_read_spec, lambda spec: spec.to_json())]
Facts = Annotated[Mapping[str, Any], Check(read_facts, dict)]
Versions = Annotated[Mapping[str, str], map_of(text(256))]
Times = Annotated[Mapping[str, float], map_of(Check(real))]
Digests = Annotated[Mapping[str, str], map_of(text(256), MAX_LIST)]
Neighbours = Annotated[Mapping[str, str], map_of(text(64))]
Mounts = Annotated[
    tuple[ExternalMount, ...],
    list_of(Check(_read_mount, lambda mount: {"key": mount.key, "point": mount.point})),
]
Connections = Annotated[tuple[TcpConnection, ...], list_of(Check(_read_connection, _write_connection))]
Shared = Annotated[tuple[SharedPlace, ...], list_of(Check(_read_place, asdict))]
Pipes = Annotated[tuple[int, int], Check(_read_pipes, list)]
Wire = Annotated[WireSpec | None, Check(_read_wire, lambda wire: None if wire is None else dataclasses.asdict(wire))]
Lines = Annotated[tuple[str, ...], list_of(text(MAX_TEXT), 64)]
FindingList = Annotated[tuple[Mapping[str, str], ...], list_of(Check(_read_finding, dict), 256)]
Standing = Annotated[str, choice("held", "running", "refused", "committed", "lost", "returned", "settled")]
