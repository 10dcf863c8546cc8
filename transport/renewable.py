"""A channel that outlives its connection: whoever holds it goes on when somebody has put another one underneath."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from transport.api import Channel, ChannelClosed, TransportError
from transport.delegating import DelegatingChannel
from transport.streams import CLOSED_HERE


class RenewableChannel(DelegatingChannel):
    """Passes everything to the channel underneath, which it owns. ``cut`` ends that one and ``renew`` puts another in
    its place; ``abort`` and ``close`` are for good, and a channel that comes later is closed at once.

    Frames that were on their way when the one underneath broke are lost: what they were is the business of both ends.
    """

    def __init__(self, inner: Channel) -> None:
        super().__init__(inner)
        # Re-entrant because a signal handler may abort while the same thread renews.
        self._lock = threading.RLock()
        self._sent_before = self._received_before = 0
        self._let_go: Callable[[], None] = _nothing
        self.ended = False
        """It was aborted or closed here; it did not break."""

    @property
    def inner(self) -> Channel:
        return self._inner

    @property
    def bytes_sent(self) -> int:
        return self._sent_before + self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._received_before + self._inner.bytes_received

    def cut(self) -> None:
        """End the connection underneath, from any thread: who waits for it hears that it is gone."""
        self._inner.abort()

    def renew(self, inner: Channel, let_go: Callable[[], None] | None = None) -> None:
        """Go on over this one. Nothing may be under way on the old one, which is closed. ``let_go`` is called when the
        new one is."""
        with self._lock:
            old, self._inner = self._inner, inner
            let_go_before, self._let_go = self._let_go, let_go or _nothing
            self._sent_before += old.bytes_sent
            self._received_before += old.bytes_received
        with contextlib.suppress(TransportError, OSError):
            old.close()
        let_go_before()
        if self.ended:
            inner.abort()
            raise ChannelClosed(CLOSED_HERE)

    def abort(self) -> None:
        self.ended = True
        self._inner.abort()

    def close(self) -> None:
        self.ended = True
        self._inner.close()
        self._let_go()


def _nothing() -> None:
    pass
