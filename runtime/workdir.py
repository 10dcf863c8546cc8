"""Where the image files of one dump or restore lie while it lasts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from runtime.linux.calls import detached_tmpfs


class WorkDirectory:
    """A directory of one operation: in memory, or at ``on_disk``. ``path`` is valid in this process and its threads,
    and is there from ``make`` on.

    In memory means a tmpfs that is mounted nowhere and reached through a descriptor: no page of it can touch a disk,
    no size of /run limits it, and the kernel takes it back when this process ends, however that happens.
    """

    def __init__(self, on_disk: Path | None = None) -> None:
        self._descriptor = -1
        if on_disk is not None:
            self.path = on_disk
        else:
            self._descriptor = detached_tmpfs()
            self.path = Path(f"/proc/self/fd/{self._descriptor}")

    def make(self) -> None:
        """On a disk it outlives this process: to be called when it is on record who has to remove it then."""
        if self._descriptor < 0:
            self.path.mkdir(parents=True, mode=0o700)

    def close(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        elif not str(self.path).startswith("/proc/self/fd/"):
            shutil.rmtree(self.path, ignore_errors=True)
