"""How two hosts come to trust each other: `cmigrate host add` here, `cmigrate host exchange` there.

The operator's own SSH login carries the exchange: one line of JSON each way with name, certificate and keys. Each side
then stores the other in its inventory, and lets the other's agent key in for `cmigrate serve --stdio` and nothing else.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.inventory import (
    DEFAULT_SSH_PORT,
    NAME_PATTERN,
    HostEntry,
    HostKeyEntry,
    Inventory,
    SshUrl,
    entry_from_map,
    known_host_keys,
    locked_directory,
    write_private,
)
from migrate.session import package_version
from runtime.errors import BadInput, CorruptData, MissingFeature, ProgramFailed
from runtime.host import HostConfig
from transport.api import AuthenticationFailed, Deadline, TransportError

EXCHANGE_SCHEMA = 1
MAX_EXCHANGE_BYTES = 256 * 1024
OWN_KEY_TIMEOUT_S = 3.0
_MARK = "cmigrate:"
"""Begins the comment of the authorized_keys lines that are ours."""

Confirm = Callable[[str, HostKeyEntry, str], bool]
"""Asked with (address, host key, fingerprint) whether an unknown host key may be trusted."""


@dataclass(frozen=True, kw_only=True)
class AddRequest:
    """What the operator asked for. ``identity_files`` None means the usual keys of this user, and an SSH agent's.

    ``own_address`` is where the peer reaches this host; "" lets the peer use the address it sees. ``own_ssh_port`` is
    this host's SSH port, ``stream_port`` the peer's agent's where it differs from what the peer says.
    """

    name: str
    address: SshUrl
    fingerprint: str = ""
    identity_files: Sequence[Path] | None = None
    remote_command: str = "cmigrate"
    stream_port: int | None = None
    own_address: str = ""
    own_ssh_port: int = DEFAULT_SSH_PORT
    replace: bool = False


@dataclass(frozen=True, kw_only=True)
class Added:
    entry: HostEntry
    peer_name: str
    peer_version: str
    notes: tuple[str, ...] = ()


def add_host(host: HostConfig, request: AddRequest, confirm: Confirm, *, deadline: Deadline) -> Added:
    """Make this host and the one at ``request.address`` trust each other, both ways and over both transports.

    May be repeated. Raises BadInput, NameTaken, AuthenticationFailed (a key that changed or was not confirmed),
    ProgramFailed (cmigrate is missing there, or said no) or TransportError; then nothing is stored here, though the
    peer may already know this host.
    """
    from transport.ssh import SshAddress, run

    if not NAME_PATTERN.fullmatch(request.name):
        raise BadInput(f"{request.name!r} is no host name", hint="letters, digits, _ . and -, at most 63")
    inventory = Inventory(host)
    address = SshAddress(host=request.address.host, port=request.address.port, user=request.address.user)
    key = _trusted_key(inventory, request, address, confirm, deadline)
    command = [*shlex.split(request.remote_command), "host", "exchange"]
    done = run(
        address,
        [*command, "--replace"] if request.replace else command,
        host_keys=[key],
        identity_files=request.identity_files,
        allow_agent=request.identity_files is None,
        stdin=_own_card(inventory, request.own_address, request.own_ssh_port, deadline),
        deadline=deadline,
    )
    if done.exit_code:
        raise _refusal(str(address), request.remote_command, done.exit_code, done.stderr.decode(errors="replace"))
    card = parse_card(done.stdout)
    entry = HostEntry(
        name=request.name,
        ssh_host=request.address.host,
        ssh_port=request.address.port,
        ssh_user=request.address.user,
        # Of all keys the peer says it has: the one that was seen and confirmed, first.
        ssh_host_keys=tuple(dict.fromkeys((key, *card.entry.ssh_host_keys))),
        command=card.entry.command,
        stream_host=request.address.host,
        stream_port=request.stream_port or card.entry.stream_port,
        certificate_pem=card.entry.certificate_pem,
        added_at=_now(),
    )
    inventory.add(entry, replace=request.replace)
    authorize(host, request.name, card.agent_key)
    notes = (f"it calls itself {card.entry.name}",) if card.entry.name != request.name else ()
    return Added(entry=entry, peer_name=card.entry.name, peer_version=card.version, notes=notes)


def _trusted_key(
    inventory: Inventory, request: AddRequest, address: Any, confirm: Confirm, deadline: Deadline
) -> HostKeyEntry:
    """The host's SSH key: known and the same, or as the operator says it is, or confirmed now."""
    from transport.ssh import fetch_host_key

    shown = fetch_host_key(address, deadline=deadline)
    key = (shown.type, shown.base64)
    if request.fingerprint:
        if shown.fingerprint != request.fingerprint:
            raise AuthenticationFailed(
                f"{address} shows host key {shown.fingerprint} ({shown.type}), expected is {request.fingerprint}",
                hint="compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on that host",
            )
        return key
    known = _known_keys(inventory, request)
    if key in known:
        return key
    if any(kind == shown.type for kind, _ in known) and not request.replace:
        raise AuthenticationFailed(
            f"{address} shows host key {shown.fingerprint} ({shown.type}), which is not the one known here",
            hint=f"if it was set up again, run `cmigrate host rm {request.name}` and `ssh-keygen -R` for it; "
            "if not, someone is in between",
        )
    if not confirm(str(address), key, shown.fingerprint):
        raise AuthenticationFailed(
            f"the host key of {address} was not confirmed",
            hint="give --fingerprint SHA256:… for scripts, or --yes to trust what answers first",
        )
    return key


def _known_keys(inventory: Inventory, request: AddRequest) -> set[HostKeyEntry]:
    url = request.address
    known = set(known_host_keys(url.host, url.port))
    for entry in inventory.list():
        if entry.name == request.name or (entry.ssh_host, entry.ssh_port) == (url.host, url.port):
            known.update(entry.ssh_host_keys)
    return known


def _refusal(address: str, command: str, exit_code: int, stderr: str) -> Exception:
    said = stderr.strip() or f"exit code {exit_code}"
    # What a shell answers for a command that it does not find, or may not run.
    if exit_code in (126, 127):
        return MissingFeature(
            f"{command} cannot be started on {address}: {said}",
            hint="install cmigrate there, or say where it is: --remote-command /path/to/.venv/bin/cmigrate",
        )
    return ProgramFailed(f"{address} refused the exchange: {said}", hint="see what it says; it must be root there")


# The exchanged line


@dataclass(frozen=True, kw_only=True)
class Card:
    """What one host tells the other. ``entry`` has no addresses but the ports; ``address`` may be empty."""

    entry: HostEntry
    agent_key: str
    version: str
    address: str


def _own_card(inventory: Inventory, address: str, ssh_port: int, deadline: Deadline) -> bytes:
    host = inventory.host
    card = {
        "schema": EXCHANGE_SCHEMA,
        "name": host.name,
        "version": package_version(),
        "address": address,
        "ssh_port": ssh_port,
        "ssh_host_keys": [list(key) for key in own_host_keys(ssh_port, deadline)],
        "agent_key": inventory.ssh_public_key(),
        "command": [*own_command(host), "serve", "--stdio"],
        "stream_port": host.stream_port,
        "certificate_pem": inventory.identity().cert_pem,
    }
    return json.dumps(card).encode() + b"\n"


def parse_card(line: bytes) -> Card:
    """Raises CorruptData: what the other side sent is no card, or of an unknown schema."""
    try:
        if len(line) > MAX_EXCHANGE_BYTES:
            raise ValueError(f"{len(line)} bytes")
        # A login script there may have had something to say first.
        values = json.loads(line.strip().splitlines()[-1])
        if not isinstance(values, dict) or values.get("schema") != EXCHANGE_SCHEMA:
            raise ValueError("not the line that was expected, or of another schema")
        entry = entry_from_map(str(values["name"]), values)
        kind, text = _word_list(values["agent_key"], 2)
        if not entry.certificate_pem:
            raise ValueError("no certificate")
        return Card(
            entry=entry,
            agent_key=f"{kind} {text}",
            version=str(values.get("version", "")),
            address=str(values.get("address", "")),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, BadInput) as error:
        raise CorruptData(
            f"the other host's answer does not fit: {error}", hint="install the same version of cmigrate on both hosts"
        ) from error


def _word_list(text: object, count: int) -> list[str]:
    words = str(text).split()
    if len(words) != count or not all(word.isprintable() and '"' not in word for word in words):
        raise ValueError(f"{str(text)[:40]!r} is no public key")
    return words


def answer_exchange(
    host: HostConfig, line: bytes, environment: Mapping[str, str], *, replace: bool, deadline: Deadline
) -> bytes:
    """The peer's side: store who asks, let its agent key in, and answer with our own card.

    Raises CorruptData, NameTaken, BadInput; then nothing is stored.
    """
    card = parse_card(line)
    # client address, client port, server address, server port (sshd(8), ENVIRONMENT)
    seen = environment.get("SSH_CONNECTION", "").split()
    address = card.address or (seen[0] if seen else "")
    inventory = Inventory(host)
    entry = HostEntry(
        name=card.entry.name,
        ssh_host=address if card.entry.ssh_host_keys else "",
        ssh_port=card.entry.ssh_port,
        ssh_host_keys=card.entry.ssh_host_keys,
        command=card.entry.command,
        stream_host=address,
        stream_port=card.entry.stream_port,
        certificate_pem=card.entry.certificate_pem,
        added_at=_now(),
    )
    inventory.add(entry, replace=replace)
    authorize(host, entry.name, card.agent_key)
    own_port = int(seen[3]) if len(seen) == 4 else DEFAULT_SSH_PORT
    return _own_card(inventory, "", own_port, deadline)


def own_host_keys(ssh_port: int, deadline: Deadline) -> list[HostKeyEntry]:
    """The host key that this host's own SSH server shows, asked of the server itself: where its files lie is its
    affair. Empty where none answers; then peers reach this host by stream:// alone."""
    from transport.ssh import SshAddress, fetch_host_key

    try:
        key = fetch_host_key(SshAddress(host="127.0.0.1", port=ssh_port), deadline=deadline.within(OWN_KEY_TIMEOUT_S))
    except TransportError:
        return []
    return [(key.type, key.base64)]


def own_command(host: HostConfig) -> list[str]:
    """How to start this very cmigrate, with this configuration, from any directory and environment."""
    beside = Path(sys.executable).with_name("cmigrate")
    found = str(beside) if beside.exists() else shutil.which("cmigrate")
    program = [found] if found else [sys.executable, "-P", "-c", "from migrate.cli import main; main()"]
    if host.config_dir == HostConfig(name="default").config_dir:
        return program
    return ["env", f"CMIGRATE_CONFIG={host.config_dir}", *program]


# authorized_keys


def authorize(host: HostConfig, name: str, agent_key: str, path: Path | None = None) -> None:
    """Let the agent key of ``name`` in, for `cmigrate serve --stdio` alone. Replaces what ``name`` had before."""
    command = shlex.join([*own_command(host), "serve", "--stdio", "--peer", name])
    # sshd(8): a quote inside the option is written \", a backslash stands for itself.
    option = command.replace('"', '\\"')
    with _authorized_keys(path) as (lines, write):
        # The key may have come under another name before; a line that somebody else wrote for it is not ours to change.
        kept = [line for line in lines if not _is_of(line, name) and not (_is_ours(line) and agent_key in line)]
        write([*kept, f'command="{option}",restrict {agent_key} {_MARK}{name}'])


def deauthorize(name: str, path: Path | None = None) -> bool:
    """Take away what ``authorize`` gave. Whether there was anything."""
    with _authorized_keys(path) as (lines, write):
        kept = [line for line in lines if not _is_of(line, name)]
        if len(kept) == len(lines):
            return False
        write(kept)
        return True


def _is_ours(line: str) -> bool:
    return (line.split() or [""])[-1].startswith(_MARK)


def _is_of(line: str, name: str) -> bool:
    return line.split()[-1:] == [f"{_MARK}{name}"]


@contextmanager
def _authorized_keys(path: Path | None) -> Iterator[tuple[list[str], Callable[[list[str]], None]]]:
    """This user's file, one writer at a time. Other people's lines stay as they are."""
    # Through symbolic links: it may be kept elsewhere.
    path = Path(os.path.realpath(path or Path.home() / ".ssh" / "authorized_keys"))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked_directory(path.parent):
        lines = path.read_text().splitlines() if path.exists() else []
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        yield lines, lambda new: write_private(path, "".join(f"{line}\n" for line in new), mode=mode)


def remove_host(host: HostConfig, name: str) -> HostEntry:
    """Forget a host, and let its agent in no more, over either transport. Raises UnknownHost."""
    entry = Inventory(host).remove(name)
    deauthorize(name)
    return entry


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
