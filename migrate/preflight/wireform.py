"""The facts of a container as they travel to the target: written here, read there, and not believed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from migrate.errors import ProtocolViolation
from migrate.wire import Check, Unfit, integer, list_of, text
from runtime.api import ContainerSpec, spec_from_json
from runtime.errors import RuntimeFault
from runtime.facts import MAX_FILES, ContainerFacts, LowerFile

SCHEMA = 1
# A control message holds 1 MiB; the spec needs some of it too.
MAX_FILE_TEXT = 400_000
MAX_CPUINFO_HEX = 8192
MAX_PATH = 4096

_COUNT = integer(0, 2**63 - 1)
_WORD = text(256)
_PATH = text(MAX_PATH)


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What the target must know. ``needs`` are features by name; ``clock_s`` is the source's wall clock."""

    spec: ContainerSpec
    arch: str
    page_bytes: int
    kernel: str
    criu_version: tuple[int, int, int]
    cpuinfo: bytes
    cpu_flags: tuple[str, ...]
    clock_s: int
    needs: tuple[str, ...]
    processes: int
    memory_bytes: int
    hugetlb_bytes: int
    tmpfs_bytes: int
    upper_bytes: int
    upper_complete: bool
    files: tuple[LowerFile, ...]
    files_complete: bool


def write_facts(facts: SourceFacts) -> dict[str, Any]:
    """Plain values, bounded: a file list that is too long, or names what is no text, is cut and says so."""
    files: list[list[Any]] = []
    room = MAX_FILE_TEXT
    for file in facts.files[:MAX_FILES]:
        room -= len(file.path) + len(file.build_id) + 32
        if room > 0 and file.path.isprintable() and len(file.path) <= MAX_PATH:
            files.append([file.path, file.size_bytes, file.mode, file.build_id])
    return {
        **{name: getattr(facts, name) for name in SourceFacts.__dataclass_fields__},
        "schema": SCHEMA,
        "spec": facts.spec.to_json(),
        "criu_version": list(facts.criu_version),
        "cpuinfo": facts.cpuinfo.hex(),
        "cpu_flags": list(facts.cpu_flags),
        "needs": list(facts.needs),
        "files": files,
        "files_complete": facts.files_complete and len(files) == len(facts.files),
    }


def read_facts(message: Mapping[str, Any]) -> SourceFacts:
    """Raises ProtocolViolation unless every field is there, of its type and within bounds. Unknown ones are ignored."""
    fields: dict[str, Any] = {}
    try:
        if message.get("schema") != SCHEMA:
            raise ProtocolViolation("preflight facts of another version", hint="install the same version on both hosts")
        for name, check in _FIELDS.items():
            try:
                fields[name] = check.read(message.get(name))
            except Unfit as error:
                raise Unfit(f"{name} is {error}") from error
    except Unfit as error:
        raise ProtocolViolation(f"preflight facts: {error}") from error
    return SourceFacts(**fields)


def _read_spec(value: Any) -> ContainerSpec:
    if not isinstance(value, dict):
        raise Unfit("no container spec")
    try:
        spec = spec_from_json(value)
    except RuntimeFault as error:
        raise Unfit(f"no container spec: {error.what}") from error
    ports = all(isinstance(port.host_port, int) and isinstance(port.host_address, str) for port in spec.ports)
    volumes = all(isinstance(v.source, str) and v.source.startswith("/") for v in spec.volumes)
    network = spec.network is None or all(
        isinstance(value, str)
        for value in (
            spec.network.address,
            spec.network.mac,
            spec.network.gateway,
            spec.network.address6,
            spec.network.gateway6,
        )
    )
    if not ports or not volumes or not network or not isinstance(spec.rootfs, str) or "\0" in spec.rootfs:
        raise Unfit("no container spec that fits")
    return spec


def _read_version(value: Any) -> tuple[int, int, int]:
    parts = list_of(integer(0, 10_000), 3).read(value)
    if len(parts) != 3:
        raise Unfit("no version of three numbers")
    return parts[0], parts[1], parts[2]


def _read_hex(limit: int) -> Check:
    def read(value: Any) -> bytes:
        try:
            return bytes.fromhex(text(limit).read(value))
        except ValueError as error:
            raise Unfit("not hexadecimal") from error

    return Check(read)


def _read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit("neither true nor false")
    return value


def _read_file(value: Any) -> LowerFile:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise Unfit("no file of four fields")
    path = _PATH.read(value[0])
    if not path.startswith("/") or path == "/" or ".." in path.split("/") or "\0" in path:
        raise Unfit("not an absolute path")
    return LowerFile(
        path=path,
        size_bytes=_COUNT.read(value[1]),
        mode=integer(0, 0o177777).read(value[2]),
        build_id=_read_hex(256).read(value[3]).hex(),
    )


_FIELDS: dict[str, Check] = {
    "spec": Check(_read_spec),
    "arch": _WORD,
    "page_bytes": _COUNT,
    "kernel": _WORD,
    "criu_version": Check(_read_version),
    "cpuinfo": _read_hex(MAX_CPUINFO_HEX),
    "cpu_flags": list_of(text(64), 1024),
    "clock_s": _COUNT,
    "needs": list_of(text(64), 64),
    "processes": _COUNT,
    "memory_bytes": _COUNT,
    "hugetlb_bytes": _COUNT,
    "tmpfs_bytes": _COUNT,
    "upper_bytes": _COUNT,
    "upper_complete": Check(_read_flag),
    "files": list_of(Check(_read_file), MAX_FILES),
    "files_complete": Check(_read_flag),
}


def needs_of(facts: ContainerFacts) -> tuple[str, ...]:
    """Features by the names the target knows them under."""
    found = []
    if facts.compat_tasks:
        found.append("compat_cr")
    if facts.uses_ipv6:
        found.append("ipv6")
    return tuple(found)
