"""The words of the command line and what they mean: sizes, mounts, ports. Pure; errors are click's, so exit code 2."""

from __future__ import annotations

import datetime
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import click

from runtime.api import NAME_PATTERN, Limits, PortMapping, RestartPolicy, VolumeMount

_SIZE = re.compile(r"(?P<number>\d{1,15}(?:\.\d+)?)\s*(?P<unit>[bkmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DURATION = re.compile(
    r"(?:(?P<days>\d+)d)?(?:(?P<hours>\d+)h)?(?:(?P<minutes>\d+)m)?(?:(?P<seconds>\d+(?:\.\d+)?)s?)?"
)
_BIT_RATE = re.compile(r"(\d{1,9}(?:\.\d+)?)([kmgt]?)bit", re.IGNORECASE)
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
MIN_MEMORY_BYTES = 1 << 20
MIN_RATE_BPS = 64 << 10


def parse_bytes(text: str) -> int:
    """512m, 1.5g, 1GiB, 1048576; units are powers of 1024, as docker has them."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.UsageError(f"{text!r} is no size: give 512m, 2g or a number of bytes")
    return int(float(match["number"]) * _UNITS[match["unit"].lower()])


def parse_rate_Bps(text: str) -> float:
    """Bytes a second: 1gbit and 100mbit as tc has them (powers of 1000, bits), 50m and 50MiB/s as sizes are."""
    match = _BIT_RATE.fullmatch(text.strip())
    rate = float(match[1]) * _BITS[match[2].lower()] / 8 if match else parse_bytes(text.strip().removesuffix("/s"))
    if rate < MIN_RATE_BPS:
        raise click.UsageError(f"{text!r}: a move needs at least 64 KiB a second")
    return rate


def parse_memory(text: str | None) -> int | None:
    if text is None:
        return None
    size = parse_bytes(text)
    if size == 0:
        return None
    if size < MIN_MEMORY_BYTES:
        raise click.UsageError(f"--memory {text}: at least 1m")
    return size


def parse_limits(memory: str | None, cpus: float | None, pids: int | None) -> Limits:
    """As docker: 0 (and -1 for pids) means no limit."""
    if cpus is not None and (cpus < 0 or 0 < cpus < 0.01):
        raise click.UsageError(f"--cpus {cpus}: at least 0.01")
    if pids is not None and pids < -1:
        raise click.UsageError(f"--pids-limit {pids}: a positive number, or -1 for no limit")
    return Limits(memory_bytes=parse_memory(memory), cpus=cpus or None, pids=None if pids in (None, 0, -1) else pids)


def parse_volume(text: str) -> VolumeMount:
    """SOURCE:DESTINATION[:ro|rw]; the source is a path of this host, which must exist."""
    parts = text.split(":")
    if len(parts) == 2:
        parts.append("rw")
    if len(parts) != 3 or not all(parts) or parts[2] not in ("ro", "rw"):
        raise click.UsageError(f"-v {text!r} is not SOURCE:DESTINATION[:ro|rw]")
    source, destination, access = parts
    if "/" not in source:
        raise click.UsageError(f"-v {text!r}: named volumes do not exist here, give a path (./{source})")
    if not destination.startswith("/"):
        raise click.UsageError(f"-v {text!r}: {destination!r} is not absolute")
    path = os.path.abspath(source)
    if not os.path.exists(path):
        raise click.UsageError(f"-v {text!r}: {path} does not exist; make it first")
    return VolumeMount(source=path, destination=os.path.normpath(destination), read_only=access == "ro")


def _port(text: str, whole: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise click.UsageError(f"-p {whole!r}: {text!r} is no port from 1 to 65535")
    return int(text)


def parse_port(text: str) -> PortMapping:
    """[ADDRESS:]HOST_PORT:CONTAINER_PORT[/tcp|udp]."""
    mapping, _, protocol = text.partition("/")
    address, _, ports = mapping.rpartition(":")
    address, _, host_port = address.rpartition(":")
    if not ports or not host_port:
        raise click.UsageError(f"-p {text!r} is not [ADDRESS:]HOST_PORT:CONTAINER_PORT[/tcp|udp]")
    if protocol not in ("", "tcp", "udp"):
        raise click.UsageError(f"-p {text!r}: {protocol!r} is neither tcp nor udp")
    if address:
        import ipaddress

        try:
            ipaddress.IPv4Address(address)
        except ValueError:
            raise click.UsageError(f"-p {text!r}: {address!r} is no IPv4 address") from None
    return PortMapping(
        host_port=_port(host_port, text),
        container_port=_port(ports, text),
        protocol=cast(Literal["tcp", "udp"], protocol or "tcp"),
        host_address=address or "0.0.0.0",
    )


def parse_env(variables: Sequence[str], files: Sequence[Path], environment: Mapping[str, str]) -> tuple[str, ...]:
    """KEY=VALUE, or KEY to pass on this command's own; files first, the last of a name wins, as docker does it."""
    merged: dict[str, str] = {}
    for word in [*(line for file in files for line in read_env_file(file)), *variables]:
        key, separator, value = word.partition("=")
        if not key or "\0" in word:
            raise click.UsageError(f"-e {word!r} is not KEY=VALUE")
        if separator:
            merged[key] = value
        elif key in environment:
            merged[key] = environment[key]
    return tuple(f"{key}={value}" for key, value in merged.items())


def read_env_file(file: Path) -> list[str]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--env-file {file}: {error}") from error
    return [line.lstrip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def parse_restart(text: str) -> RestartPolicy:
    name, separator, retries = text.partition(":")
    if name not in ("no", "always", "on-failure", "unless-stopped"):
        raise click.UsageError(f"--restart {text!r}: no, always, on-failure[:N] or unless-stopped")
    if separator and (name != "on-failure" or not retries.isdecimal()):
        raise click.UsageError(f"--restart {text!r}: only on-failure takes a number of retries")
    policy = cast(Literal["no", "always", "on-failure", "unless-stopped"], name)
    return RestartPolicy(name=policy, max_retries=int(retries) if separator else None)


def parse_label(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not key:
        raise click.UsageError(f"--label {text!r} is not KEY=VALUE")
    return key, value


def parse_tmpfs(text: str) -> str:
    if not text.startswith("/") or ":" in text:
        raise click.UsageError(f"--tmpfs {text!r}: an absolute path and nothing else")
    return os.path.normpath(text)


def parse_rootfs(text: str) -> str:
    if text == "host":
        return text
    try:
        path = os.path.realpath(text)
    except ValueError:
        path = ""  # characters that no file name has
    if not os.path.isdir(path):
        raise click.UsageError(f"--rootfs {text!r} is no directory; give one, or 'host'")
    return path


def parse_security(words: Sequence[str]) -> Literal["default", "unconfined"]:
    profile = "default"
    for word in words:
        if word not in ("seccomp=unconfined", "seccomp=default"):
            raise click.UsageError(f"--security-opt {word!r}: seccomp=default or seccomp=unconfined")
        profile = word.partition("=")[2]
    return cast(Literal["default", "unconfined"], profile)


def parse_name(text: str | None) -> str:
    if text is None:
        return ""
    if not NAME_PATTERN.fullmatch(text):
        raise click.UsageError(f"--name {text!r}: letters, digits, _ . and -, at most 63")
    return text


def parse_signal(text: str) -> int:
    """KILL, SIGKILL or 9."""
    if text.isdecimal() and 0 < int(text) <= signal.SIGRTMAX:
        return int(text)
    name = text.upper()
    try:
        return signal.Signals[name if name.startswith("SIG") else f"SIG{name}"]
    except KeyError:
        raise click.UsageError(f"-s {text!r} is no signal") from None


def parse_since(text: str | None, now: datetime.datetime) -> str | None:
    """RFC 3339, or how long ago: 10m, 1h30m, 90s, 90. As RFC 3339 in UTC with nanoseconds' room, None for the start."""
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    try:
        if match and text:
            parts = {name: float(value) for name, value in match.groupdict().items() if value}
            moment = now - datetime.timedelta(**parts)
        else:
            moment = datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        message = f"--since {text!r}: a time as 2026-01-31T12:00:00Z, or how long ago as 10m"
        raise click.UsageError(message) from None
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_tail(text: str) -> int | None:
    """A number of lines; None for all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise click.UsageError(f"--tail {text!r}: a number of lines, or all")
    return int(text)
