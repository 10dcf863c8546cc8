"""The target's states of one move, as a table. Pure: ``step`` decides, the driver performs the actions in their order.

    IDLE -> RESERVED -> RECEIVING -> VERIFIED -> RESTORED_HELD -> COMMIT_LOGGED* -> RESUMED -> CONFIRMED
              any of these four -> REFUSED
    and where it is given back:        COMMIT_LOGGED | RESUMED -> RETURNING* -> RETURNED
                      or never:        RESUMED -> SETTLED -> CONFIRMED
    (* on the disk before CRIU's wait is released, or before what runs here is killed)

Nothing runs here before COMMIT is on this disk. REFUSED is for good: whatever comes later is answered REFUSED. So are
RETURNED, and CONFIRMED or SETTLED, after which nothing is given back: whichever is on this disk first.
The rule for drivers is the one of machine.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from migrate.machine import IllegalTransition


class Phase(StrEnum):
    IDLE = "IDLE"
    RESERVED = "RESERVED"
    RECEIVING = "RECEIVING"
    VERIFIED = "VERIFIED"
    RESTORED_HELD = "RESTORED_HELD"
    COMMIT_LOGGED = "COMMIT_LOGGED"
    RESUMED = "RESUMED"
    CONFIRMED = "CONFIRMED"
    REFUSED = "REFUSED"
    SETTLED = "SETTLED"
    """It stays, or has moved on from here, whatever the source wants."""
    RETURNING = "RETURNING"
    """What runs here is being killed, because the source takes the container back."""
    RETURNED = "RETURNED"
    """Nothing of it runs here, and nothing will."""


class Event(StrEnum):
    """What happens to the target: from the source, from here, or from the world."""

    OFFER = "offer"
    BULK = "bulk"
    STATE = "state"
    """The last of the bulk, and the manifest that says what must be there."""
    COMMIT = "commit"
    DISCARD = "discard"
    DONE = "done"
    GIVE_BACK = "give-back"
    ASK = "ask"
    RESTORED = "restored"
    """CRIU waits at post-restore: no instruction has run."""
    RELEASED = "released"
    """The container runs here."""
    RELEASE_FAILED = "release-failed"
    """It does not run, and what was received is still here."""
    NEVER_RAN = "never-ran"
    """It can not be brought up, with proof that no instruction of it ran here."""
    COPY_GONE = "copy-gone"
    """Seen: no process of it is left here."""
    MOVED_ON = "moved-on"
    """It is about to leave for another host."""
    FAULT = "fault"
    """CRIU, the kernel or the disk failed here, or the peer violated the protocol."""
    LINK_BROKE = "link-broke"
    """Before the freeze, or while memory is missing after COMMIT: the source may come back for a while (waiting.py).
    LINK_LOST when it has not; then what lacks memory here is killed, and that is what became of it."""
    RESUME = "resume"
    """On a new connection: the source wants to go on where it was."""
    LINK_LOST = "link-lost"
    TIMEOUT = "timeout"
    RESTARTED = "restarted"
    """This agent was started again and found the phase in its journal."""


class Action(StrEnum):
    JOURNAL_RESERVED = "journal-reserved"
    RESERVE = "reserve"
    """Room, name, address, sandbox, CRIU waiting: or a FAULT."""
    SEND_PREPARED = "send-prepared"
    STORE = "store"
    VERIFY_AND_RESTORE = "verify-and-restore"
    JOURNAL_HELD = "journal-held"
    SEND_READY = "send-ready"
    JOURNAL_COMMIT = "journal-commit"
    RELEASE = "release"
    RUN_AGAIN = "run-again"
    """Take over what runs; where nothing does, restore again from what was kept and release it."""
    SEND_RUNNING = "send-running"
    JOURNAL_RESUMED = "journal-resumed"
    JOURNAL_CONFIRMED = "journal-confirmed"
    DROP_KEPT = "drop-kept"
    """What a second restore would have needed."""
    UNDO = "undo"
    """Kill the held tree, remove everything made for this move. Idempotent."""
    JOURNAL_REFUSED = "journal-refused"
    SEND_REFUSED = "send-refused"
    SEND_HELD = "send-held"
    SEND_RESUMED = "send-resumed"
    JOURNAL_SETTLED = "journal-settled"
    SEND_SETTLED = "send-settled"
    JOURNAL_RETURNING = "journal-returning"
    KILL_COPY = "kill-copy"
    """Of a container that ran here. Idempotent."""
    JOURNAL_RETURNED = "journal-returned"
    SEND_RETURNED = "send-returned"


Transitions = Mapping[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]]

_WAITS = (Phase.RESERVED, Phase.RECEIVING)
_BEFORE_HELD = (Phase.RESERVED, Phase.RECEIVING, Phase.VERIFIED)
_BEFORE_COMMIT = (*_BEFORE_HELD, Phase.RESTORED_HELD)
_TROUBLE = (Event.DISCARD, Event.FAULT, Event.LINK_LOST, Event.TIMEOUT, Event.RESTARTED)
_RUNS = (Phase.RESUMED, Phase.SETTLED, Phase.CONFIRMED)
_GOES = (Phase.RETURNING, Phase.RETURNED)
_WORLD = (Event.FAULT, Event.LINK_LOST, Event.TIMEOUT)

_REFUSE = (Phase.REFUSED, (Action.UNDO, Action.JOURNAL_REFUSED, Action.SEND_REFUSED))


def _stay(
    phases: Iterable[Phase], events: Iterable[Event], *actions: Action
) -> dict[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]]:
    events = tuple(events)
    return {(phase, event): (phase, actions) for phase in phases for event in events}


TRANSITIONS: Transitions = {
    (Phase.IDLE, Event.OFFER): (Phase.RESERVED, (Action.JOURNAL_RESERVED, Action.RESERVE, Action.SEND_PREPARED)),
    # A discarded offer that overtook its offer, or a question about a move of which nothing is left here: the answer
    # must be the same for ever, so it goes to the disk first.
    (Phase.IDLE, Event.DISCARD): (Phase.REFUSED, (Action.JOURNAL_REFUSED,)),
    (Phase.IDLE, Event.ASK): (Phase.REFUSED, (Action.JOURNAL_REFUSED, Action.SEND_REFUSED)),
    (Phase.IDLE, Event.RESUME): (Phase.REFUSED, (Action.JOURNAL_REFUSED, Action.SEND_REFUSED)),
    **_stay(_WAITS, (Event.LINK_BROKE,)),
    **_stay(_WAITS, (Event.RESUME,), Action.SEND_RESUMED),
    (Phase.RESERVED, Event.BULK): (Phase.RECEIVING, (Action.STORE,)),
    (Phase.RECEIVING, Event.BULK): (Phase.RECEIVING, (Action.STORE,)),
    # The manifest shows whether anything is missing, so STATE may come at any time.
    (Phase.RESERVED, Event.STATE): (Phase.VERIFIED, (Action.VERIFY_AND_RESTORE,)),
    (Phase.RECEIVING, Event.STATE): (Phase.VERIFIED, (Action.VERIFY_AND_RESTORE,)),
    (Phase.VERIFIED, Event.RESTORED): (Phase.RESTORED_HELD, (Action.JOURNAL_HELD, Action.SEND_READY)),
    (Phase.RESTORED_HELD, Event.COMMIT): (Phase.COMMIT_LOGGED, (Action.JOURNAL_COMMIT, Action.RELEASE)),
    (Phase.COMMIT_LOGGED, Event.RELEASED): (Phase.RESUMED, (Action.SEND_RUNNING, Action.JOURNAL_RESUMED)),
    (Phase.RESUMED, Event.DONE): (Phase.CONFIRMED, (Action.JOURNAL_CONFIRMED, Action.DROP_KEPT)),
    # CRIU's hook is failed, which kills the held tree; a restarted agent finds CRIU gone and the tree with it.
    **{(phase, event): _REFUSE for phase in _BEFORE_COMMIT for event in _TROUBLE},
    # The source asks only after READY, so whoever asks now is not of our move any more; refusing is always safe here.
    **{(phase, Event.ASK): _REFUSE for phase in _BEFORE_HELD},
    (Phase.RESTORED_HELD, Event.ASK): (Phase.RESTORED_HELD, (Action.SEND_HELD,)),
    # From here on the right to run is on this disk: bring it up, again and again.
    (Phase.COMMIT_LOGGED, Event.RELEASE_FAILED): (Phase.COMMIT_LOGGED, (Action.RUN_AGAIN,)),
    (Phase.COMMIT_LOGGED, Event.RESTARTED): (Phase.COMMIT_LOGGED, (Action.RUN_AGAIN,)),
    # The proof may be gone after a crash, so it goes to the disk before anything is thrown away.
    (Phase.COMMIT_LOGGED, Event.NEVER_RAN): (
        Phase.REFUSED,
        (Action.JOURNAL_REFUSED, Action.UNDO, Action.SEND_REFUSED),
    ),
    **_stay((Phase.COMMIT_LOGGED,), (*_WORLD, Event.COMMIT, Event.ASK, Event.DONE)),
    # The record comes first: a crash after the kill must not leave a journal that says that it runs.
    **{
        (phase, Event.GIVE_BACK): (Phase.RETURNING, (Action.JOURNAL_RETURNING, Action.KILL_COPY))
        for phase in (Phase.COMMIT_LOGGED, Phase.RESUMED)
    },
    **_stay((Phase.RETURNING,), (Event.GIVE_BACK, Event.RESTARTED), Action.KILL_COPY),
    (Phase.RETURNING, Event.COPY_GONE): (
        Phase.RETURNED,
        (Action.JOURNAL_RETURNED, Action.UNDO, Action.SEND_RETURNED),
    ),
    (Phase.RETURNED, Event.RESTARTED): (Phase.RETURNED, (Action.UNDO, Action.SEND_RETURNED)),
    **_stay((Phase.RETURNED,), (Event.GIVE_BACK, Event.ASK), Action.SEND_RETURNED),
    (Phase.RESUMED, Event.MOVED_ON): (Phase.SETTLED, (Action.JOURNAL_SETTLED,)),
    (Phase.SETTLED, Event.DONE): (Phase.CONFIRMED, (Action.JOURNAL_CONFIRMED, Action.DROP_KEPT)),
    **_stay((Phase.SETTLED, Phase.CONFIRMED), (Event.GIVE_BACK,), Action.SEND_SETTLED),
    (Phase.RESUMED, Event.RESTARTED): (Phase.RESUMED, (Action.SEND_RUNNING,)),
    (Phase.SETTLED, Event.RESTARTED): (Phase.SETTLED, ()),
    (Phase.CONFIRMED, Event.RESTARTED): (Phase.CONFIRMED, (Action.DROP_KEPT,)),
    **_stay(_RUNS, (Event.COMMIT, Event.ASK), Action.SEND_RUNNING),
    (Phase.REFUSED, Event.RESTARTED): (Phase.REFUSED, (Action.UNDO, Action.SEND_REFUSED)),
    **_stay((Phase.REFUSED,), (Event.COMMIT, Event.ASK, Event.OFFER, Event.STATE, Event.RESUME), Action.SEND_REFUSED),
    # Late or double news.
    **_stay((Phase.REFUSED,), (*_WORLD, Event.BULK, Event.DISCARD)),
    **_stay((*_RUNS, *_GOES), _WORLD),
    **_stay(_GOES, (Event.COMMIT,)),
    **_stay((Phase.RETURNING,), (Event.ASK,)),
    **_stay((Phase.CONFIRMED,), (Event.DONE,)),
    # Memory follows after the switch: the source goes on where it was, and may not have heard that it runs here.
    **_stay((Phase.COMMIT_LOGGED, Phase.RESUMED), (Event.LINK_BROKE,)),
    (Phase.COMMIT_LOGGED, Event.RESUME): (Phase.COMMIT_LOGGED, (Action.SEND_RESUMED,)),
    (Phase.RESUMED, Event.RESUME): (Phase.RESUMED, (Action.SEND_RESUMED, Action.SEND_RUNNING)),
    # Between the freeze and COMMIT the source does not come back: this one is of a connection that is dead.
    **_stay((Phase.VERIFIED, Phase.RESTORED_HELD, Phase.SETTLED, Phase.CONFIRMED, *_GOES), (Event.RESUME,)),
    **_stay((*_BEFORE_COMMIT, Phase.COMMIT_LOGGED, *_RUNS, *_GOES), (Event.OFFER,)),
    **_stay((Phase.VERIFIED, Phase.RESTORED_HELD, Phase.COMMIT_LOGGED, *_RUNS, *_GOES), (Event.BULK, Event.STATE)),
}

JOURNALED: Mapping[Action, Phase] = {
    Action.JOURNAL_RESERVED: Phase.RESERVED,
    Action.JOURNAL_HELD: Phase.RESTORED_HELD,
    Action.JOURNAL_COMMIT: Phase.COMMIT_LOGGED,
    Action.JOURNAL_RESUMED: Phase.RESUMED,
    Action.JOURNAL_CONFIRMED: Phase.CONFIRMED,
    Action.JOURNAL_REFUSED: Phase.REFUSED,
    Action.JOURNAL_SETTLED: Phase.SETTLED,
    Action.JOURNAL_RETURNING: Phase.RETURNING,
    Action.JOURNAL_RETURNED: Phase.RETURNED,
}
"""Which phase each journal action writes."""


def step(phase: Phase, event: Event, table: Transitions = TRANSITIONS) -> tuple[Phase, tuple[Action, ...]]:
    """The next phase, and what to do on the way there. Raises IllegalTransition."""
    try:
        return table[phase, event]
    except KeyError:
        raise IllegalTransition(f"target: {event} while {phase}") from None


def recovered(last: str) -> Phase:
    """The phase to be RESTARTED in, from the last phase in the journal ("" when it is empty). Raises ValueError."""
    return Phase(last) if last else Phase.IDLE
