"""What a lab knows of itself: DIRECTORY/lab.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from migrate.inventory import write_private
from migrate.lab.plan import CLIENT
from migrate.lab.processes import ProcessId
from runtime.errors import CorruptData

RECORD_SCHEMA = 1
RECORD_NAME = "lab.json"


@dataclass(frozen=True, kw_only=True)
class LabHost:
    """One host, or the client. ``holder`` keeps its namespaces: ``nsenter --target PID`` is in."""

    name: str
    address: str
    holder: ProcessId
    daemons: Mapping[str, ProcessId] = field(default_factory=dict)

    @property
    def is_client(self) -> bool:
        return self.name == CLIENT

    def dead(self) -> list[str]:
        """Which of its processes are not there any more."""
        processes = {"holder": self.holder, **self.daemons}
        return [name for name, process in processes.items() if not process.alive()]


@dataclass(frozen=True, kw_only=True)
class LabRecord:
    """``complete`` once the lab came up whole."""

    id: str
    rate: str = ""
    routed: bool = False
    hosts: tuple[LabHost, ...] = ()
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"schema": RECORD_SCHEMA, **asdict(self)}


def record_from_json(data: Mapping[str, Any]) -> LabRecord:
    """The inverse of ``to_json``; raises KeyError, TypeError or ValueError."""
    if data["schema"] != RECORD_SCHEMA:
        raise ValueError(f"schema {data['schema']!r}, this version knows {RECORD_SCHEMA}")
    hosts = tuple(
        LabHost(
            name=str(host["name"]),
            address=str(host["address"]),
            holder=ProcessId(**host["holder"]),
            daemons={str(name): ProcessId(**process) for name, process in host["daemons"].items()},
        )
        for host in data["hosts"]
    )
    return LabRecord(
        id=str(data["id"]),
        rate=str(data["rate"]),
        routed=bool(data.get("routed")),
        hosts=hosts,
        complete=bool(data["complete"]),
    )


def write_record(directory: Path, record: LabRecord) -> None:
    write_private(directory / RECORD_NAME, json.dumps(record.to_json(), indent=1) + "\n")


def read_record(directory: Path) -> LabRecord | None:
    """None where no lab is. Raises CorruptData."""
    path = directory / RECORD_NAME
    try:
        return record_from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"{path}: {error!r}", hint="run `cmigrate lab down`, which needs no record") from error
