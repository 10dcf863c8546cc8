"""Checkpoint, restore and live migration of Linux containers.

    import migrate
    from migrate import MoveOptions
    report = migrate.move(migrate.load_host_config(), "web1", "host2", MoveOptions(), migrate.Silent())

The names below are the API; they are imported when they are first used, so that ``import migrate`` is cheap and needs
neither paramiko nor click. Everything else may change. The stable surface for other languages is the command line with
``--json``. The module ``migrate.preflight`` is part of the API as it is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # type checkers know the name; the module that has it takes milliseconds
if TYPE_CHECKING:
    from typing import Any

    from migrate.checkpoint import checkpoint, restore
    from migrate.errors import (
        ErrorText,
        ExitCode,
        InDoubt,
        MigrateError,
        MoveRefused,
        NotRoot,
        PeerFailed,
        ProtocolViolation,
        RolledBack,
        UnknownHost,
        UnknownReport,
        describe,
        exit_code_for,
    )
    from migrate.observe import Event, JsonLines, Observer, Silent, Terminal
    from migrate.report import MoveReport, Outcome
    from migrate.reports import ReportStore
    from migrate.wiring import MoveOptions, move
    from runtime.host import HostConfig, load_host_config

_WHERE = {
    "move": "migrate.wiring",
    "MoveOptions": "migrate.wiring",
    "checkpoint": "migrate.checkpoint",
    "restore": "migrate.checkpoint",
    "MoveReport": "migrate.report",
    "Outcome": "migrate.report",
    "ReportStore": "migrate.reports",
    "Event": "migrate.observe",
    "JsonLines": "migrate.observe",
    "Observer": "migrate.observe",
    "Silent": "migrate.observe",
    "Terminal": "migrate.observe",
    "HostConfig": "runtime.host",
    "load_host_config": "runtime.host",
    "ErrorText": "migrate.errors",
    "ExitCode": "migrate.errors",
    "InDoubt": "migrate.errors",
    "MigrateError": "migrate.errors",
    "MoveRefused": "migrate.errors",
    "NotRoot": "migrate.errors",
    "PeerFailed": "migrate.errors",
    "ProtocolViolation": "migrate.errors",
    "RolledBack": "migrate.errors",
    "UnknownHost": "migrate.errors",
    "UnknownReport": "migrate.errors",
    "describe": "migrate.errors",
    "exit_code_for": "migrate.errors",
}

__all__ = [
    "ErrorText",
    "Event",
    "ExitCode",
    "HostConfig",
    "InDoubt",
    "JsonLines",
    "MigrateError",
    "MoveOptions",
    "MoveRefused",
    "MoveReport",
    "NotRoot",
    "Observer",
    "Outcome",
    "PeerFailed",
    "ProtocolViolation",
    "ReportStore",
    "RolledBack",
    "Silent",
    "Terminal",
    "UnknownHost",
    "UnknownReport",
    "checkpoint",
    "describe",
    "exit_code_for",
    "load_host_config",
    "move",
    "restore",
]


class _Api(ModuleType):
    """Keeps the function ``migrate.checkpoint`` in place when the module of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Api


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
