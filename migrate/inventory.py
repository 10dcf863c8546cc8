"""The hosts this host knows and trusts, and who this host is to them.

CONFIG_DIR/hosts/NAME.toml      one known host; its certificate and SSH host keys are pinned as they are
CONFIG_DIR/identity/stream.pem  this host's certificate and key for stream://
CONFIG_DIR/identity/id_ed25519  this host's key for ssh:// (and .pub); peers accept it for `cmigrate serve --stdio` only

`cmigrate host add` writes these; nothing here talks to anyone.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from migrate.errors import UnknownHost
from runtime.errors import BadInput, CorruptData, NameTaken
from runtime.host import HostConfig
from transport.api import TransportError
from transport.identity import Identity, certificate_der, load_or_create_identity

# Also a file name, a word in authorized_keys and the common name of a certificate.
NAME_PATTERN = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
DEFAULT_COMMAND = ("cmigrate", "serve", "--stdio")
DEFAULT_SSH_PORT = 22

HostKeyEntry = tuple[str, str]
"""Type and base64 text of an SSH host key, as known_hosts files have them."""


@dataclass(frozen=True, kw_only=True)
class HostEntry:
    """How to reach a host, and how to know that it is the one.

    An empty ``ssh_host`` or ``stream_host`` means that this way is not known. ``command`` starts the agent over SSH.
    ``login`` says whose key opens the door there: this host's own (``agent``), or that of the user who runs the command
    (``operator``), for addresses that were never added.
    """

    name: str
    ssh_host: str = ""
    ssh_port: int = DEFAULT_SSH_PORT
    ssh_user: str = "root"
    ssh_host_keys: tuple[HostKeyEntry, ...] = ()
    command: tuple[str, ...] = DEFAULT_COMMAND
    login: Literal["agent", "operator"] = "agent"
    stream_host: str = ""
    stream_port: int = 0
    certificate_pem: str = ""
    added_at: str = ""

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise BadInput(f"{self.name!r} is no host name", hint="letters, digits, _ . and -, at most 63")
        for port in (self.ssh_port, self.stream_port):
            if not 0 <= port <= 65535:
                raise BadInput(f"{port} is no port")
        if self.certificate_pem:
            try:
                certificate_der(self.certificate_pem)
            except TransportError as error:
                raise BadInput(f"host {self.name}: {error.what}") from error

    @property
    def ssh_text(self) -> str:
        """``ssh://user@host:port``, or nothing."""
        return f"ssh://{self.ssh_user}@{_bracketed(self.ssh_host)}:{self.ssh_port}" if self.ssh_host else ""

    @property
    def stream_text(self) -> str:
        """``stream://host:port``, or nothing."""
        return f"stream://{_bracketed(self.stream_host)}:{self.stream_port}" if self.stream_host else ""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, kw_only=True)
class SshUrl:
    """``[ssh://][USER@]HOST[:PORT]``."""

    user: str
    host: str
    port: int


def parse_ssh_url(text: str) -> SshUrl:
    """Raises BadInput."""
    parts = _split_url(text if "://" in text else f"ssh://{text}")
    if parts.scheme != "ssh":
        raise BadInput(f"{text!r} is no SSH address", hint="give [ssh://][USER@]HOST[:PORT]")
    return SshUrl(user=parts.username or "root", host=parts.hostname or "", port=parts.port or DEFAULT_SSH_PORT)


def _split_url(text: str) -> SplitResult:
    hint = "give ssh://[USER@]HOST[:PORT] or stream://HOST:PORT"
    try:
        parts = urlsplit(text)
        _ = parts.port  # looks at it, and raises where it is none
    except ValueError as error:
        raise BadInput(f"{text!r} is no address: {error}", hint=hint) from error
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment or parts.password:
        raise BadInput(f"{text!r} is no address", hint=hint)
    return parts


class Inventory:
    """Known hosts and own identity of ``host``. Every method reads the disk anew: agents run for long."""

    def __init__(self, host: HostConfig) -> None:
        self.host = host
        self._hosts_dir = host.config_dir / "hosts"
        self._identity_dir = host.config_dir / "identity"

    # Known hosts

    def add(self, entry: HostEntry, *, replace: bool = False) -> None:
        """Store, durably. An entry of the same name is updated when it has the same certificate, or with ``replace``;
        else NameTaken: a name that suddenly means another machine is how one is fooled."""
        if entry.name == self.host.name:
            raise NameTaken(
                f"this host itself is called {entry.name}",
                hint=f"give one of the two another name: key `name` in {self.host.config_dir / 'config.toml'}",
            )
        path = self._path(entry.name)
        if path.exists() and not replace and self._load(path).certificate_pem != entry.certificate_pem:
            raise NameTaken(
                f"host {entry.name} is known with another certificate",
                hint=f"if it was set up again, run `cmigrate host rm {entry.name}` first; if not, choose another name",
            )
        write_private(path, _to_toml(entry))

    def get(self, reference: str) -> HostEntry:
        """By name, or by ``ssh://`` or ``stream://`` address. An address that was never added is taken only when its
        host key is in this user's known_hosts. Raises UnknownHost or BadInput."""
        if "://" in reference:
            return self._by_address(reference)
        path = self._path(reference)
        if not NAME_PATTERN.fullmatch(reference) or not path.exists():
            raise UnknownHost(f"no host {reference!r} is known here", hint=self._names_hint(reference))
        return self._load(path)

    def list(self) -> tuple[HostEntry, ...]:
        """All, by name. Files that cannot be read are left out; ``problems`` names them."""
        return self._read_all()[0]

    def problems(self) -> tuple[CorruptData, ...]:
        return self._read_all()[1]

    def remove(self, name: str) -> HostEntry:
        """Forget a host; returns what was known. Raises UnknownHost."""
        path = self._path(name)
        try:
            entry = self.get(name)
        except CorruptData:
            entry = HostEntry(name=name)
        path.unlink()
        _sync_directory(path.parent)
        return entry

    def trusted(self) -> dict[str, str]:
        """Name to certificate (PEM) of every host that may come in over stream://."""
        return {entry.name: entry.certificate_pem for entry in self.list() if entry.certificate_pem}

    def _path(self, name: str) -> Path:
        return self._hosts_dir / f"{name}.toml"

    def _read_all(self) -> tuple[tuple[HostEntry, ...], tuple[CorruptData, ...]]:
        entries = []
        problems = []
        for path in sorted(self._hosts_dir.glob("*.toml")):
            try:
                entries.append(self._load(path))
            except CorruptData as error:
                problems.append(error)
            except FileNotFoundError:
                continue  # removed meanwhile
        return tuple(entries), tuple(problems)

    def _load(self, path: Path) -> HostEntry:
        try:
            return entry_from_toml(path.stem, path.read_text())
        except (ValueError, TypeError, BadInput) as error:
            raise CorruptData(
                f"{path}: {error}", hint=f"remove the file and run `cmigrate host add {path.stem} ADDRESS` again"
            ) from error

    def _names_hint(self, reference: str) -> str:
        names = [entry.name for entry in self.list()]
        if not names:
            return "none is known yet: run `cmigrate host add NAME ADDRESS`"
        close = difflib.get_close_matches(reference, names, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        return f"{meant}known: {', '.join(names)}; add others with `cmigrate host add NAME ADDRESS`"

    def _by_address(self, address: str) -> HostEntry:
        parts = _split_url(address)
        if parts.scheme == "ssh":
            url = parse_ssh_url(address)
            for entry in self.list():
                if (entry.ssh_user, entry.ssh_host, entry.ssh_port) == (url.user, url.host, url.port):
                    return entry
            return self._never_added(url)
        if parts.scheme == "stream":
            port = parts.port or self.host.stream_port
            for entry in self.list():
                if (entry.stream_host, entry.stream_port) == (parts.hostname, port):
                    return entry
            raise UnknownHost(
                f"no known host has the address {address}",
                hint=f"its certificate must be known first: `cmigrate host add NAME {parts.hostname}`",
            )
        raise BadInput(f"{address!r}: unknown kind of address", hint="give a host's name, ssh://… or stream://…")

    def _never_added(self, url: SshUrl) -> HostEntry:
        keys = known_host_keys(url.host, url.port)
        if not keys:
            raise UnknownHost(
                f"no host {url.host} (port {url.port}) is known here, and no key of it is in ~/.ssh/known_hosts",
                hint=f"run `cmigrate host add NAME {url.user}@{url.host}:{url.port}`, which compares its key",
            )
        name = re.sub(r"[^a-zA-Z0-9_.-]", "-", url.host)
        return HostEntry(
            name=name, ssh_host=url.host, ssh_port=url.port, ssh_user=url.user, ssh_host_keys=keys, login="operator"
        )

    # Own identity

    def identity(self) -> Identity:
        """This host's certificate and key for stream://, made on first use."""
        return load_or_create_identity(self._identity_dir / "stream.pem", self.host.name)

    def ssh_key_file(self) -> Path:
        """The private key file of this host's agent, made on first use; the public part lies beside it (.pub)."""
        path = self._identity_dir / "id_ed25519"
        if not path.exists() or not public_key_file(path).exists():
            self._identity_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked_directory(self._identity_dir):  # of several that come first at once, all get the same
                write_ssh_key(path, f"cmigrate@{self.host.name}")
        return path

    def ssh_public_key(self) -> str:
        """Type and base64 text of this host's agent's key."""
        return " ".join(public_key_file(self.ssh_key_file()).read_text().split()[:2])


def public_key_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


def write_ssh_key(path: Path, comment: str) -> None:
    """A new Ed25519 key in OpenSSH's format, private part of mode 0600, and its public part beside it. Where the
    private one exists already, only the public one is written anew."""
    if path.exists():
        loaded = serialization.load_ssh_private_key(path.read_bytes(), None)
        public = loaded.public_key()
    else:
        key = Ed25519PrivateKey.generate()
        public = key.public_key()
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        write_private(path, text.decode())
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    write_private(public_key_file(path), f"{line} {comment}\n", mode=0o644)


def known_host_keys(host: str, port: int, path: Path | None = None) -> tuple[HostKeyEntry, ...]:
    """What this user's OpenSSH known_hosts file has for an address, hashed names included."""
    from paramiko import HostKeys

    path = path or Path.home() / ".ssh" / "known_hosts"
    try:
        known = HostKeys(str(path))
    except OSError:
        return ()
    found = known.lookup(host if port == DEFAULT_SSH_PORT else f"[{host}]:{port}")
    return tuple((kind, key.get_base64()) for kind, key in (found or {}).items())


# Files


def write_private(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace a file whole and durably, or leave it as it was."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    _sync_directory(path.parent)


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """While one process is in the block, no other one is, for the same directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_toml(entry: HostEntry) -> str:
    """One line a field. A JSON string, number or list of them is also TOML, but for the character DEL."""
    lines = ["# Written by `cmigrate host add`."]
    for field in fields(entry):
        if field.name != "name":
            value = json.dumps(getattr(entry, field.name), ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{field.name} = {value}")
    return "\n".join(lines) + "\n"


def entry_from_toml(name: str, text: str) -> HostEntry:
    """The inverse; unknown keys are ignored. Raises ValueError, TypeError or BadInput where it does not fit."""
    return entry_from_map(name, tomllib.loads(text))


def entry_from_map(name: str, values: Mapping[str, Any]) -> HostEntry:
    """An entry from plain values, each checked for its type. Raises as ``entry_from_toml``."""
    given: dict[str, Any] = {}
    for field in fields(HostEntry):
        if field.name == "name" or field.name not in values:
            continue
        value = values[field.name]
        if field.name == "ssh_host_keys":
            given[field.name] = tuple(_pair(item) for item in _listed(field.name, value))
        elif field.name == "command":
            given[field.name] = tuple(_typed(field.name, item, str) for item in _listed(field.name, value))
        else:
            wanted = int if field.name.endswith("_port") else str
            given[field.name] = _typed(field.name, value, wanted)
    if given.get("login", "agent") not in ("agent", "operator"):
        raise ValueError(f"login is {given['login']!r}")
    return HostEntry(name=name, **given)


def _typed(name: str, value: object, wanted: type) -> Any:
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise TypeError(f"{name} is not of type {wanted.__name__}")
    return value


def _listed(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is not a list")
    return value


def _pair(value: object) -> HostKeyEntry:
    kind, text = _listed("ssh_host_keys", value)
    return str(_typed("ssh_host_keys", kind, str)), str(_typed("ssh_host_keys", text, str))
