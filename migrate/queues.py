"""What waits in the queues of a container's sockets and can not come along: told to the operator."""

from __future__ import annotations

from migrate.observe import Observer, Warning
from runtime.criu.dump import HeldDump


def tell_what_is_lost(dump: HeldDump, observer: Observer) -> tuple[str, ...]:
    """After the dump; which connections end with the move."""
    if dump.unaccepted:
        what = f"{dump.unaccepted} connections wait to be accepted by the container, which does not: they end"
        observer.on_event(Warning(what=what))
    if lost := str(dump.waiting):
        observer.on_event(Warning(what=lost))
    return tuple(map(str, dump.unheard))
