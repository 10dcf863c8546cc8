"""The source's last words before the restore, and the rest of shared memory, which goes before or after them."""

from __future__ import annotations

from collections.abc import Callable

from migrate import messages
from migrate.outgoing import Outgoing
from migrate.shared_source import SHARED_COMPLETE, SharedSource
from runtime.criu.dump import HeldDump

MAX_UNHEARD = 1024
"""The message is at most 1 MiB. Clients beyond that learn of their end when they send something."""


def send_frozen_state(
    out: Outgoing,
    dump: HeldDump,
    shared: SharedSource | None,
    *,
    channel_is_shared: bool,
    mark: Callable[[str], None],
) -> None:
    """Afterwards the target restores. What changed of shared memory is found and sent while it is at work, unless it
    asks for pages meanwhile (``channel_is_shared``), or there is much to send because there were no rounds.
    ``mark`` begins a phase."""
    follows = shared is not None and bool(shared.places) and shared.in_rounds and not channel_is_shared
    if shared is not None and shared.places and not follows:
        mark("shared")
        shared.send_rest()
    state = dump.container.state
    message = messages.FrozenState(
        mounts=dump.mounts,
        pipes=dump.pipes,
        started_at=state.started_at,
        restarts=state.restarts,
        neighbours=dump.neighbours,
        unheard=dump.unheard[:MAX_UNHEARD],
        shared=shared.places if shared is not None else (),
        shared_follows=follows,
    )
    out.control(message.to_message())
    if shared is not None and follows:
        mark("shared")
        shared.send_rest()
        out.control({"type": SHARED_COMPLETE})
