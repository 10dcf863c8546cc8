"""What an error is to the source's table."""

from __future__ import annotations

from migrate.errors import BlackoutTooLong, MoveRefused, PeerFailed
from migrate.machine import Event
from transport.api import TransportError


def event_of(error: BaseException) -> Event:
    """The event that ends a move when this was raised."""
    if isinstance(error, KeyboardInterrupt):
        return Event.CANCELLED
    if isinstance(error, (MoveRefused, PeerFailed)):
        return Event.TARGET_REFUSED
    if isinstance(error, BlackoutTooLong):
        return Event.TIMEOUT
    if isinstance(error, TransportError):
        return Event.LINK_LOST
    return Event.FAULT
