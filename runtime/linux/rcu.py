"""Short grace periods for the time of a blackout: /sys/kernel/rcu_expedited.

Removing nftables rules, as CRIU does before it lets restored sockets speak, ends when every processor has passed
through a quiet state: 5 to 20 ms on an idle host. Expedited, the kernel asks each processor at once and is done in
0.1 ms. It is a setting of the whole host, which is why it is on for a blackout only, and one that ``rcu_normal``
overrules: who can not bear the interrupts (real time) has set that.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SWITCH = Path("/sys/kernel/rcu_expedited")
_MARKER = "rcu-expedited"


class ExpeditedGracePeriods:
    """``begin`` and ``end``, both idempotent. Where the switch can not be written, or is on already, nothing happens.

    ``run_dir`` gets a marker while the switch is on because of us: whoever finds one of a process that has been killed
    turns it off in its place.
    """

    def __init__(self, run_dir: Path, switch: Path = SWITCH) -> None:
        self._marker = run_dir / _MARKER
        self._switch = switch
        self._ours = False

    def begin(self) -> None:
        with contextlib.suppress(OSError):
            if self._switch.read_text().strip() == "0":
                self._marker.write_text(str(os.getpid()))
                self._switch.write_text("1")
                self._ours = True

    def end(self) -> None:
        if self._ours:
            self._ours = False
            _turn_off(self._switch, self._marker)


def turn_off_what_is_left(run_dir: Path, switch: Path = SWITCH) -> None:
    """After a process that was killed in its blackout; one that lives keeps what it has."""
    marker = run_dir / _MARKER
    with contextlib.suppress(OSError, ValueError):
        pid = int(marker.read_text())
        if not Path(f"/proc/{pid}").exists():
            _turn_off(switch, marker)


def _turn_off(switch: Path, marker: Path) -> None:
    with contextlib.suppress(OSError):
        switch.write_text("0")
    with contextlib.suppress(OSError):
        marker.unlink()
