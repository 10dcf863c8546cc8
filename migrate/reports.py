"""Where reports are kept: one JSON file each, named after the move's id."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

from migrate.errors import UnknownReport, full_disk_is_no_room
from migrate.report import MoveReport, report_from_json
from runtime.errors import BadInput, CorruptData, RuntimeFault
from runtime.host import HostConfig

_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class ReportStore:
    """The reports of one host, in ``host.reports_dir``. Safe for several processes at once."""

    def __init__(self, host: HostConfig) -> None:
        self._directory = host.reports_dir

    def save(self, report: MoveReport) -> None:
        """Keep a report, durably and whole or not at all; one of the same id is replaced. Raises NoRoom."""
        if not _ID.fullmatch(report.id):
            raise BadInput(f"{report.id!r} is no report id")
        text = json.dumps(report.to_json(), indent=2) + "\n"
        with full_disk_is_no_room(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd, name = tempfile.mkstemp(prefix=".new-", dir=self._directory)
            try:
                with open(fd, "w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, self._directory / f"{report.id}.json")
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
                raise
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def try_to_save(self, report: MoveReport) -> str:
        """``save`` where what became of a container must not hang on it; why it could not be kept, empty when it is."""
        try:
            self.save(report)
        except (RuntimeFault, OSError) as error:
            return f"the report of move {report.id} could not be kept: {error}"
        return ""

    def try_to_save_theirs(self, data: Mapping[str, Any]) -> None:
        """A peer's report, if it is one."""
        with contextlib.suppress(CorruptData):
            self.try_to_save(report_from_json(data))

    def list(self, *, limit: int | None = None) -> tuple[list[MoveReport], list[str]]:
        """Reports newest first, and a warning for each file that can not be read."""
        reports, warnings = [], []
        for report_id in self._ids():
            try:
                reports.append(self._read(report_id))
            except (CorruptData, OSError) as error:
                warnings.append(str(error))
        reports.sort(key=lambda report: (report.started_at, report.id), reverse=True)
        return reports[:limit], warnings

    def get(self, reference: str) -> MoveReport:
        """By id or unambiguous prefix of it. Raises UnknownReport, BadInput when several fit, CorruptData."""
        ids = self._ids()
        fitting = [report_id for report_id in ids if report_id.startswith(reference)] if reference else []
        if reference in ids:
            fitting = [reference]
        if not fitting:
            raise UnknownReport(f"there is no report {reference!r}", hint="cmigrate history lists them")
        if len(fitting) > 1:
            raise BadInput(f"{reference!r} fits {len(fitting)} reports", hint="give more of the id")
        return self._read(fitting[0])

    def _ids(self) -> tuple[str, ...]:
        if not self._directory.exists():
            return ()
        names = (path.name.removesuffix(".json") for path in self._directory.glob("*.json"))
        return tuple(sorted(name for name in names if _ID.fullmatch(name)))

    def _read(self, report_id: str) -> MoveReport:
        path = self._directory / f"{report_id}.json"
        try:
            data = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise CorruptData(f"{path}: {error}", hint="remove the file") from error
        if not isinstance(data, dict):
            raise CorruptData(f"{path}: no report", hint="remove the file")
        try:
            return report_from_json(data)
        except CorruptData as error:
            raise CorruptData(f"{path}: {error.what}", hint="remove the file") from error
