"""The source's end of the wire to a target in another segment, and what the target is told of ways to this host."""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import ExitStack

from migrate.messages import Offer
from migrate.observe import Held, Warning
from runtime.api import ContainerSpec
from runtime.container import Containers
from runtime.errors import RuntimeFault
from runtime.wayback import way_back
from runtime.wire import ContainerWire, WireSpec
from runtime.wire_rules import PORT


class Leaving:
    """Of one move: get_ready, frozen, left. ``wire`` is what both ends agree on."""

    def __init__(self, containers: Containers, spec: ContainerSpec, wire: WireSpec | None, observer: Held) -> None:
        self._host = containers.host
        self._spec = spec
        self._observer = observer
        self.wire = wire
        self._end: ContainerWire | None = None

    def get_ready(self, offer: Offer, undo: ExitStack, *, reconnect_s: float) -> Offer:
        """The offer, with what the target must know; ``undo`` takes back what was made, unless the container has left.
        Raises KernelCallFailed, ProgramFailed."""
        if self.wire is not None and self._spec.network is not None:
            self._end = ContainerWire(self._host, self._spec, self.wire)
            undo.callback(self._undo)
            self._end.prepare(toward=True)
        back = way_back(self._host, self._spec)
        return dataclasses.replace(offer, way_back=back, wire=self.wire, reconnect_s=reconnect_s)

    def _undo(self) -> None:
        if self._end is not None:
            with contextlib.closing(self._end):
                self._end.undo()
            self._end = None

    def frozen(self) -> None:
        """Its frames may go to the target from here on. In the blackout: one system call, or none."""
        if self._end is not None:
            self._end.join()

    def left(self) -> WireSpec | None:
        """It runs on the target; nothing here fails any more. What both ends of its wire agreed on."""
        end, self._end = self._end, None
        if end is None or self.wire is None:
            return None
        what, remedy = "", ""
        try:
            with contextlib.closing(end):
                if not end.left():
                    what = f"nothing has come over the wire from {self.wire.target}: connections will not go on"
                    remedy = f"let UDP port {PORT} through between the hosts"
        except RuntimeFault as error:
            what = str(error)
        if what:
            self._observer.on_event(Warning(what=what, remedy=remedy))
        return self.wire
