"""What all control messages have in common: their form on the wire, and the checks a peer's bytes must pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_type_hints

from migrate.errors import ProtocolViolation
from migrate.wire import Check, Unfit

MESSAGES: dict[str, type[Message]] = {}
"""Those of a move, by the word on the wire; messages.py fills it."""
_INSTEAD = ("error", "refused")

_CHECKS: dict[str, dict[str, Check]] = {}


def _checks(kind: type[Message]) -> dict[str, Check]:
    """The checks of a message's fields, read from their annotations once."""
    if kind.TYPE not in _CHECKS:
        hints = get_type_hints(kind, include_extras=True)
        _CHECKS[kind.TYPE] = {entry.name: hints[entry.name].__metadata__[0] for entry in dataclasses.fields(kind)}
    return _CHECKS[kind.TYPE]


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of all control messages; ``TYPE`` is the word on the wire."""

    TYPE: ClassVar[str] = ""

    def to_message(self) -> dict[str, Any]:
        """The map for the wire: plain values only."""
        fields = {name: check.write(getattr(self, name)) for name, check in _checks(type(self)).items()}
        return {"type": self.TYPE, **fields}

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> Self:
        """A message of this type. An ERROR or REFUSED instead of it is raised as the error it tells."""
        kind = message.get("type")
        if kind != cls.TYPE:
            if kind in _INSTEAD:
                raise parse(message).as_error()  # type: ignore[attr-defined]
            raise ProtocolViolation(f"the peer sent {_shown(kind)} where {cls.TYPE} was due")
        given: dict[str, Any] = {}
        for entry in dataclasses.fields(cls):
            if entry.name in message:
                try:
                    given[entry.name] = _checks(cls)[entry.name].read(message[entry.name])
                except Unfit as error:
                    raise ProtocolViolation(f"{cls.TYPE}: field {entry.name} is {error}") from error
            elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
                raise ProtocolViolation(f"{cls.TYPE}: field {entry.name} is missing")
        return cls(**given)


def _shown(kind: object) -> str:
    return repr(kind) if not isinstance(kind, str) else repr(kind[:40])


def parse(message: Mapping[str, Any]) -> Message:
    """Any control message but bulk. Raises ProtocolViolation for an unknown type or a field that does not fit."""
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise ProtocolViolation(f"unknown message {_shown(kind)}", hint="install the same version on both hosts")
    return MESSAGES[kind].parse(message)
