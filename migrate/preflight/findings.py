"""What a check found, in words for an operator. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from migrate.errors import ProtocolViolation

Level = Literal["blocker", "warning", "ok"]
MAX_TEXT = 2000
MAX_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked. A ``blocker`` stops a move before it begins, a ``warning`` says what will be other.

    ``check`` is a short name that does not change between versions; docs/preflight.md has the list.
    """

    level: Level
    check: str
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        # Names come from containers and peers: none may reach a terminal with control characters, or without end.
        for name in ("what", "remedy"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def to_json(self) -> dict[str, str]:
        """Plain JSON types; ``from_json`` gives the same value back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """A finding of a peer's. Raises ProtocolViolation."""
        texts = {name: data.get(name, "") for name in ("level", "check", "what", "remedy")}
        if not all(isinstance(text, str) for text in texts.values()) or texts["level"] not in (
            "blocker",
            "warning",
            "ok",
        ):
            raise ProtocolViolation("a finding does not fit")
        return cls(**texts)


def blocker(check: str, what: str, remedy: str) -> Finding:
    return Finding(level="blocker", check=check, what=what, remedy=remedy)


def warning(check: str, what: str, remedy: str = "") -> Finding:
    return Finding(level="warning", check=check, what=what, remedy=remedy)


def ok(check: str, what: str) -> Finding:
    return Finding(level="ok", check=check, what=what)


def printable(text: str) -> str:
    """Without control characters and unpaired surrogates, cut where it is too long."""
    cleaned = "".join(char if char.isprintable() else "?" for char in text)
    return cleaned if len(cleaned) <= MAX_TEXT else cleaned[: MAX_TEXT - 3] + "..."


def named(names: Sequence[str], limit: int = MAX_NAMED) -> str:
    """ "a, b and 3 more" """
    unique = list(dict.fromkeys(names))
    rest = len(unique) - limit
    if rest > 0:
        return f"{', '.join(unique[:limit])} and {rest} more"
    return ", ".join(unique)


def size(count: int) -> str:
    """Bytes for people: "1.5 GiB"."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
