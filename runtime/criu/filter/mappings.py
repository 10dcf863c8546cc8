"""What CRIU reads from /proc/PID/smaps, read before the freeze.

CRIU needs of that file the mappings and their flags only, but the kernel visits every page to write it:
12 to 20 ms for each GiB, in the blackout. The same lines without the counts are served to it instead, for tasks of
which the kernel itself says that nothing has changed since (call_watch.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from runtime.errors import MissingFeature
from runtime.linux.call_watch import CallWatch

# A mapping's first line, which is its line in /proc/PID/maps, and its flags, which come last.
_MAPPING = re.compile(rb"^([0-9a-f]+-[0-9a-f]+ .*\n)(?:[A-Z].*\n)*?(VmFlags:.*\n)", re.MULTILINE)
MOST_BYTES = 8 << 20


class MappingsBefore:
    """For one freeze. Without the kernel's help there is nothing known, and CRIU reads for itself."""

    def __init__(self) -> None:
        self._watch: CallWatch | None = None
        self._texts: dict[int, tuple[bytes, bytes]] = {}
        self.missing = ""
        """Why nothing is known, where nothing is."""

    def note(self, pids: Callable[[], Collection[int]]) -> None:
        """Shortly before the freeze; again for another try. ``pids`` are the tasks', without their threads."""
        self.close()
        try:
            self._watch = CallWatch(lambda: _threads(pids()))
        except MissingFeature as error:
            self.missing = str(error)
            return
        size = 0
        for pid in pids():
            try:
                if not _is_64_bit(pid):
                    continue  # its calls have other numbers
                lines = _MAPPING.findall(Path(f"/proc/{pid}/smaps").read_bytes())
            except OSError:
                continue  # it has ended, or is about to
            maps, text = b"".join(first for first, _flags in lines), b"".join(first + flags for first, flags in lines)
            size += len(text)
            if text and size <= MOST_BYTES:
                self._texts[pid] = maps, text

    def unchanged(self, pids: Collection[int]) -> dict[int, bytes]:
        """While all tasks stand still: by pid, of the tasks for which it still holds, smaps without its counts."""
        if self._watch is None:
            return {}
        if self._watch.calls():
            self.missing = "mappings have changed"
            return {}
        found: dict[int, bytes] = {}
        for pid in pids:
            maps, text = self._texts.get(pid, (b"", b""))
            # A stack grows without a system call.
            if text and Path(f"/proc/{pid}/maps").read_bytes() == maps:
                found[pid] = text
        return found

    def close(self) -> None:
        """Idempotent. Not for a blackout."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._texts.clear()


def _is_64_bit(pid: int) -> bool:
    with open(f"/proc/{pid}/exe", "rb") as program:
        return program.read(5) == b"\x7fELF\x02"


def _threads(pids: Collection[int]) -> set[int]:
    found: set[int] = set()
    for pid in pids:
        try:
            found.update(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
