"""Checks that the fields of a peer's message must pass: each reads one value from the wire and writes it back to it.

The peer is hostile: every text, list and map is bounded, a number is no boolean, nan is no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_TEXT = 4096
MAX_LIST = 4096
MAX_FACTS_DEPTH = 8
MAX_FACTS_NODES = 20_000


class Unfit(Exception):
    """A value does not fit its field; becomes a ProtocolViolation that names the field."""


@dataclass(frozen=True)
class Check:
    """How a field is read from the wire (raises Unfit) and written to it."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value


def text(limit: int) -> Check:
    def read(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise Unfit(f"not a text of at most {limit} characters")
        return value

    return Check(read)


def word(limit: int) -> Check:
    """A name that may become part of a path: letters, digits, - and _, not empty."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= limit or not value.isascii():
            raise Unfit(f"not a word of at most {limit} characters")
        if not value.replace("-", "").replace("_", "").isalnum():
            raise Unfit("not a word of letters, digits, - and _")
        return value

    return Check(read)


def integer(least: int, most: int) -> Check:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Unfit(f"not a number from {least} to {most}")
        return value

    return Check(read)


def real(value: Any) -> float:
    # Neither infinity nor nan is smaller than this.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e15:
        raise Unfit("not a finite number")
    return float(value)


def read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit("neither true nor false")
    return value


def list_of(item: Check, limit: int = MAX_LIST) -> Check:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > limit:
            raise Unfit(f"not a list of at most {limit} entries")
        return tuple(item.read(entry) for entry in value)

    return Check(read, lambda value: [item.write(entry) for entry in value])


def map_of(item: Check, limit: int = 256) -> Check:
    names = text(256)

    def read(value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict) or len(value) > limit:
            raise Unfit(f"not a map of at most {limit} entries")
        return {names.read(name): item.read(entry) for name, entry in value.items()}

    return Check(read, lambda value: {name: item.write(entry) for name, entry in value.items()})


def choice(*words: str) -> Check:
    def read(value: Any) -> str:
        if value not in words:
            raise Unfit(f"none of {', '.join(words)}")
        return str(value)

    return Check(read)


def read_facts(value: Any) -> dict[str, Any]:
    """Plain data of unknown shape: bounded in depth and size. Preflight looks at what is inside."""
    left = MAX_FACTS_NODES

    def walk(node: Any, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_FACTS_DEPTH:
            raise Unfit("too large or too deep")
        if isinstance(node, dict):
            for key, entry in node.items():
                if not isinstance(key, str):
                    raise Unfit("a key is no text")
                walk(entry, depth + 1)
        elif isinstance(node, (list, tuple)):
            for entry in node:
                walk(entry, depth + 1)
        elif not isinstance(node, (str, int, float, bool, bytes, type(None))):
            raise Unfit(f"holds {type(node).__name__}")

    if not isinstance(value, dict):
        raise Unfit("not a map")
    walk(value, 0)
    return value
