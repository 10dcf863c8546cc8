"""What an error is to the tables."""

from __future__ import annotations

from migrate import target_machine
from migrate.errors import BlackoutTooLong, MoveRefused, PeerFailed, RolledBack
from migrate.machine import Event
from transport.api import ChannelClosed, DeadlineExpired, TransportError


def event_of(error: BaseException) -> Event:
    """The event that ends a move when this was raised."""
    if isinstance(error, KeyboardInterrupt):
        return Event.CANCELLED
    # Somebody who asked the target made a rollback of its answer.
    if isinstance(error, (MoveRefused, PeerFailed, RolledBack)):
        return Event.TARGET_REFUSED
    if isinstance(error, BlackoutTooLong):
        return Event.TIMEOUT
    if isinstance(error, TransportError):
        return Event.LINK_LOST
    return Event.FAULT


def target_event_of(error: BaseException) -> target_machine.Event:
    """The same for the target."""
    if isinstance(error, MoveRefused):
        return target_machine.Event.DISCARD
    if isinstance(error, DeadlineExpired):
        return target_machine.Event.TIMEOUT
    return target_machine.Event.LINK_LOST if isinstance(error, ChannelClosed) else target_machine.Event.FAULT
