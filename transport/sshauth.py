"""Who is who in an SSH session: the server's host key, and the keys of ours that it may accept."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import paramiko

from transport.api import AuthenticationFailed

DEFAULT_IDENTITY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True, kw_only=True)
class UserKey:
    """A private key, or why the file is of no use."""

    label: str
    key: paramiko.PKey | None
    problem: str = ""


def order_host_key_types(offered: Iterable[str], host_keys: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The key algorithms to ask the server for: those of which a key is known come first, so that a server with keys
    of several types shows one that can be compared."""
    known = {kind for kind, _ in host_keys}

    def is_unknown(algorithm: str) -> bool:
        # The one type of RSA key signs with several algorithms.
        return ("ssh-rsa" if algorithm.startswith("rsa-") else algorithm) not in known

    return tuple(sorted(offered, key=is_unknown))


def check_host_key(where: str, shown: paramiko.PKey, host_keys: Sequence[tuple[str, str]]) -> None:
    """Raises AuthenticationFailed unless `shown` is one of `host_keys` (type, base64)."""
    if (shown.get_name(), shown.get_base64()) in {(kind, text) for kind, text in host_keys}:
        return
    presented = f"{where} shows host key {shown.fingerprint} ({shown.get_name()})"
    if not host_keys:
        raise AuthenticationFailed(
            f"{presented}, and no key of that host is known",
            hint="compare it with the key on the host itself, then run `cmigrate host add`",
        )
    known = ", ".join(f"{_fingerprint(text)} ({kind})" for kind, text in host_keys)
    raise AuthenticationFailed(
        f"{presented}, known is {known}",
        hint="if the host was set up again, run `cmigrate host add` for it; if not, someone is in between",
    )


def _fingerprint(base64_key: str) -> str:
    try:
        blob = base64.b64decode(base64_key, validate=True)
    except ValueError:
        return f"an unreadable entry {base64_key[:20]!r}"
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def load_keys(identity_files: Sequence[Path] | None) -> Iterator[UserKey]:
    """The private keys in these files; None means the usual ones of this user, as far as they exist."""
    if identity_files is None:
        usual = (Path.home() / ".ssh" / name for name in DEFAULT_IDENTITY_NAMES)
        identity_files = [path for path in usual if path.exists()]
    for path in identity_files:
        try:
            yield UserKey(label=str(path), key=paramiko.PKey.from_path(path))
        except OSError as error:
            yield UserKey(label=str(path), key=None, problem=error.strerror or str(error))
        except (paramiko.PasswordRequiredException, TypeError):
            # cryptography says TypeError when a key is encrypted and there is no password.
            yield UserKey(label=str(path), key=None, problem="has a passphrase; add it to an SSH agent")
        except Exception as error:  # Which errors a damaged key file causes is documented nowhere.
            yield UserKey(label=str(path), key=None, problem=f"is not a private key ({error or type(error).__name__})")


def authenticate(transport: paramiko.Transport, user: str, keys: Iterable[UserKey], *, use_agent: bool) -> None:
    """Log in with the first key that the server takes. Raises AuthenticationFailed, naming all that were tried."""
    tried: list[str] = []
    agent = paramiko.Agent() if use_agent else None
    try:
        for candidate in [*_agent_keys(agent), *keys]:
            if candidate.key is None:
                tried.append(f"{candidate.label} {candidate.problem}")
            elif _accepted(transport, user, candidate.key):
                return
            else:
                tried.append(f"{candidate.label} refused")
            if not transport.is_active():
                tried.append("then the server hung up")
                break
    finally:
        if agent is not None:
            agent.close()
    raise AuthenticationFailed(
        f"no key lets {user} in: {'; '.join(tried) or 'there is none to try'}",
        hint="put a public key of this host into authorized_keys there, or name another with an identity file",
    )


def _agent_keys(agent: paramiko.Agent | None) -> Iterator[UserKey]:
    for key in agent.get_keys() if agent is not None else ():
        yield UserKey(label=f"agent key {key.fingerprint}", key=key)


def _accepted(transport: paramiko.Transport, user: str, key: paramiko.PKey) -> bool:
    try:
        # What is left to do when the server wants a second proof; we have none to give.
        return not transport.auth_publickey(user, key)
    except paramiko.AuthenticationException:
        return False
