"""Container logs as JSON lines. Stdlib only: the monitor uses the writer."""

from __future__ import annotations

import json
import time
from pathlib import Path


class LogWriter:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)

    def write(self, stream: str, data: bytes) -> None:
        for line in data.decode(errors="replace").splitlines():
            self._file.write((json.dumps({"t": time.time(), "s": stream, "l": line}) + "\n").encode())

    def flush(self) -> None:
        pass
