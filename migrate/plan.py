"""Chooses how to move: mode, and why. Pure; the skeleton of what predicts blackout and traffic for each mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from runtime.errors import BadInput

ModeName: TypeAlias = Literal["stopcopy", "diskless"]
WantedMode: TypeAlias = Literal["auto", "stopcopy", "diskless"]
TransportName: TypeAlias = Literal["auto", "ssh", "stream"]

MODES: tuple[ModeName, ...] = get_args(ModeName)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done. ``reason`` is told to the operator."""

    mode: ModeName
    reason: str


def choose_mode(wanted: str) -> Plan:
    """The mode for what the operator asked for. Raises BadInput for a mode that there is not."""
    if wanted == "auto":
        # It copies each page once and touches no disk; stop-copy writes every page to two disks, and is never faster.
        return Plan(mode="diskless", reason="diskless copies each page once and touches no disk")
    for mode in MODES:
        if wanted == mode:
            return Plan(mode=mode, reason="asked for")
    raise BadInput(f"there is no mode {wanted!r}", hint=f"one of {', '.join(MODES)}, or auto")
