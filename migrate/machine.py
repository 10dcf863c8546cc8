"""The source's states of one move, as a table. Pure: ``step`` decides, the driver performs the actions in their order.

    INIT -> PREPARED -> PRECOPY -> FROZEN -> SENDING -> COMMITTED* -> DONE
              any of these four -> ROLLED_BACK               COMMITTED <-> IN_DOUBT -> DONE | ROLLED_BACK
    and where the copy here is kept for a while:             COMMITTED -> KEEPING -> DONE
                                                                          KEEPING -> RETURNING* -> TAKEN_BACK | DONE
    (* on the disk before COMMIT, or GIVE_BACK, is sent)

The right to run leaves with COMMITTED on this disk and comes back only with REFUSED or RETURNED on the target's. Once
RETURNING is on this disk, RUNNING is no news any more: the request may still be on its way, and ends what runs there.
Only the target's word that it has, or never will (RETURNED, SETTLED), ends that. One table is one attempt: messages of
another (move id, epoch) never reach it. What is not in the table can not happen between two hosts that follow theirs
(tests/unit/migrate/test_handover_model.py walks every history); from a peer it is a violation.

The rule for drivers: a phase is entered when its JOURNAL action is done, or at once where it has none. An action that
fails ends the list and becomes FAULT or LINK_LOST, in the old phase when the record was not written. Only a rollback
(``ROLL_BACK``) goes on whatever fails: thawing must not wait for a full disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum


class Phase(StrEnum):
    """Journaled phases bear these names; RECLAIMED exists only in the journal and recovers as ROLLED_BACK."""

    INIT = "INIT"
    PREPARED = "PREPARED"
    PRECOPY = "PRECOPY"
    FROZEN = "FROZEN"
    SENDING = "SENDING"
    COMMITTED = "COMMITTED"
    IN_DOUBT = "IN_DOUBT"
    KEEPING = "KEEPING"
    """It runs on the target, and the frozen copy here is kept, in case it is to come back."""
    RETURNING = "RETURNING"
    """The target is to give it back, and has perhaps heard so."""
    TAKEN_BACK = "TAKEN_BACK"
    DONE = "DONE"
    ROLLED_BACK = "ROLLED_BACK"
    RECLAIMED = "RECLAIMED"


class Event(StrEnum):
    """What happens to the source: from here, from the target, or from the world."""

    START = "start"
    COPIED = "copied"
    """Everything that can be copied while the container runs is copied."""
    DUMPED = "dumped"
    """State is dumped and the tasks are held by the freezer, seen as frozen."""
    TARGET_PREPARED = "prepared"
    TARGET_READY = "ready"
    TARGET_RUNNING = "running"
    TARGET_RUNNING_KEEP = "running-keep"
    """It runs there, and the operator wants the copy here to be kept for now."""
    TARGET_RETURNED = "returned"
    """Its copy is dead, and RETURNED is on its disk."""
    TARGET_SETTLED = "settled"
    """It will not give back any more: CONFIRMED or SETTLED is on its disk."""
    TARGET_REFUSED = "refused"
    TARGET_HELD = "held"
    """The answer to ASK: restored, not released, COMMIT has not arrived."""
    CANCELLED = "cancelled"
    FAULT = "fault"
    """CRIU, the kernel or the disk failed here."""
    LINK_BROKE = "link-broke"
    """It is to be brought back: before the freeze (reconnect.py), and after COMMIT where post-copy has memory to bring
    (refill.py). LINK_LOST when it does not come back."""
    TARGET_RESUMED = "resumed"
    """The target has everything that it had: copying goes on, or the bringing of memory."""
    LINK_LOST = "link-lost"
    TIMEOUT = "timeout"
    RESTARTED = "restarted"
    """This agent was started again and found the phase in its journal."""
    ACCEPTED = "accepted"
    """The window is over, or the container is well: the copy here is needed no more."""
    TAKE_BACK = "take-back"
    """The container is to run here again, as it was at the freeze."""
    KEEP_SOURCE = "keep-source"
    """A person says: the target is fenced, run it here."""
    KEEP_TARGET = "keep-target"
    """A person says: it runs on the target, give it up here."""


class Action(StrEnum):
    """What the driver does, one after the other. JOURNAL_X returns when X is on the disk."""

    JOURNAL_PREPARED = "journal-prepared"
    SEND_OFFER = "send-offer"
    COPY = "copy"
    FREEZE_AND_DUMP = "freeze-and-dump"
    SEND_STATE = "send-state"
    JOURNAL_COMMITTED = "journal-committed"
    SEND_COMMIT = "send-commit"
    JOURNAL_DONE = "journal-done"
    JOURNAL_KEEPING = "journal-keeping"
    LET_GO = "let-go"
    """Of everything but the frozen tasks, which the freezer alone holds from now on."""
    JOURNAL_RETURNING = "journal-returning"
    SEND_GIVE_BACK = "send-give-back"
    JOURNAL_TAKEN_BACK = "journal-taken-back"
    KILL_COPY = "kill-copy"
    SEND_DONE = "send-done"
    THAW = "thaw"
    """Idempotent: also when nothing was frozen."""
    JOURNAL_ROLLED_BACK = "journal-rolled-back"
    JOURNAL_RECLAIMED = "journal-reclaimed"
    """With the next epoch, so that nothing of this one counts any more."""
    SEND_DISCARD = "send-discard"
    ASK = "ask"
    SEND_RESUME = "send-resume"


class IllegalTransition(Exception):
    """This event has no meaning in this phase."""


Transitions = Mapping[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]]

_BEFORE_COMMIT = (Phase.PREPARED, Phase.PRECOPY, Phase.FROZEN, Phase.SENDING)
_TROUBLE = (Event.CANCELLED, Event.FAULT, Event.LINK_LOST, Event.TIMEOUT, Event.RESTARTED, Event.TARGET_REFUSED)
_UNANSWERED = (Event.LINK_LOST, Event.TIMEOUT, Event.FAULT)
_THE_END = (Phase.DONE, Phase.ROLLED_BACK, Phase.TAKEN_BACK)
_KEPT = (Phase.KEEPING, Phase.RETURNING)

# Thaw at once, without asking: the target can not run without COMMIT.
ROLL_BACK = (Phase.ROLLED_BACK, (Action.THAW, Action.JOURNAL_ROLLED_BACK, Action.SEND_DISCARD))
_RECLAIM = (Phase.ROLLED_BACK, (Action.JOURNAL_RECLAIMED, Action.THAW))
_FINISH = (Phase.DONE, (Action.JOURNAL_DONE, Action.KILL_COPY, Action.SEND_DONE))
_TAKE_BACK = (Phase.TAKEN_BACK, (Action.JOURNAL_TAKEN_BACK, Action.THAW))


def _stay(
    phases: Iterable[Phase], events: Iterable[Event], *actions: Action
) -> dict[tuple[Phase, Event], tuple[Phase, tuple[Action, ...]]]:
    events = tuple(events)
    return {(phase, event): (phase, actions) for phase in phases for event in events}


TRANSITIONS: Transitions = {
    (Phase.INIT, Event.START): (Phase.PREPARED, (Action.JOURNAL_PREPARED, Action.SEND_OFFER)),
    # Nothing was journaled, so nothing was begun.
    (Phase.INIT, Event.RESTARTED): (Phase.ROLLED_BACK, ()),
    (Phase.PREPARED, Event.TARGET_PREPARED): (Phase.PRECOPY, (Action.COPY,)),
    # Nothing is decided by a link that comes back, nor by one that does not.
    (Phase.PRECOPY, Event.LINK_BROKE): (Phase.PRECOPY, (Action.SEND_RESUME,)),
    (Phase.PRECOPY, Event.COPIED): (Phase.FROZEN, (Action.FREEZE_AND_DUMP,)),
    (Phase.FROZEN, Event.DUMPED): (Phase.SENDING, (Action.SEND_STATE,)),
    (Phase.SENDING, Event.TARGET_READY): (Phase.COMMITTED, (Action.JOURNAL_COMMITTED, Action.SEND_COMMIT)),
    (Phase.COMMITTED, Event.LINK_BROKE): (Phase.COMMITTED, (Action.SEND_RESUME,)),
    # In post-copy the driver has this happen only when the target has said that it needs no more memory from here.
    (Phase.COMMITTED, Event.TARGET_RUNNING): _FINISH,
    **{(phase, event): ROLL_BACK for phase in _BEFORE_COMMIT for event in _TROUBLE},
    # A target that could not run although it has COMMIT, or never got it: REFUSED gives the right to run back.
    (Phase.COMMITTED, Event.TARGET_REFUSED): _RECLAIM,
    **{(Phase.COMMITTED, event): (Phase.IN_DOUBT, (Action.ASK,)) for event in (*_UNANSWERED, Event.RESTARTED)},
    (Phase.IN_DOUBT, Event.TARGET_RUNNING): _FINISH,
    (Phase.IN_DOUBT, Event.TARGET_HELD): (Phase.IN_DOUBT, (Action.SEND_COMMIT,)),
    (Phase.IN_DOUBT, Event.TARGET_REFUSED): _RECLAIM,
    (Phase.IN_DOUBT, Event.KEEP_SOURCE): _RECLAIM,
    (Phase.IN_DOUBT, Event.KEEP_TARGET): _FINISH,
    **_stay((Phase.IN_DOUBT,), (*_UNANSWERED, Event.RESTARTED), Action.ASK),
    # COMMIT is out: nobody here decides any more.
    **_stay((Phase.COMMITTED, Phase.IN_DOUBT), (Event.CANCELLED,)),
    # It runs on the target, and could still come back.
    (Phase.COMMITTED, Event.TARGET_RUNNING_KEEP): (Phase.KEEPING, (Action.JOURNAL_KEEPING, Action.LET_GO)),
    (Phase.KEEPING, Event.ACCEPTED): _FINISH,
    (Phase.KEEPING, Event.TAKE_BACK): (Phase.RETURNING, (Action.JOURNAL_RETURNING, Action.SEND_GIVE_BACK)),
    (Phase.KEEPING, Event.RESTARTED): (Phase.KEEPING, (Action.LET_GO,)),
    (Phase.KEEPING, Event.KEEP_TARGET): _FINISH,
    (Phase.RETURNING, Event.TARGET_RETURNED): _TAKE_BACK,
    (Phase.RETURNING, Event.TARGET_SETTLED): _FINISH,
    **_stay((Phase.RETURNING,), (*_UNANSWERED, Event.RESTARTED), Action.SEND_GIVE_BACK),
    # The target is fenced, so whatever it would have answered, nothing of it runs.
    **{(phase, Event.KEEP_SOURCE): _TAKE_BACK for phase in _KEPT},
    **_stay((Phase.KEEPING,), (*_UNANSWERED, Event.CANCELLED)),
    **_stay((Phase.RETURNING,), (Event.CANCELLED,)),
    **_stay(_KEPT, (Event.TARGET_PREPARED, Event.TARGET_READY, Event.TARGET_RUNNING)),
    # Killed between the record and the deed: do the deed again.
    (Phase.DONE, Event.RESTARTED): (Phase.DONE, (Action.KILL_COPY, Action.SEND_DONE)),
    (Phase.ROLLED_BACK, Event.RESTARTED): (Phase.ROLLED_BACK, (Action.THAW,)),
    (Phase.TAKEN_BACK, Event.RESTARTED): (Phase.TAKEN_BACK, (Action.THAW,)),
    # A target that still holds a restore after the rollback, because DISCARD got lost, is told again.
    **_stay((Phase.ROLLED_BACK,), (Event.TARGET_PREPARED, Event.TARGET_READY, Event.TARGET_HELD), Action.SEND_DISCARD),
    (Phase.DONE, Event.TARGET_RUNNING): (Phase.DONE, (Action.SEND_DONE,)),
    # Late or double news of what has been settled.
    **_stay(_THE_END, (*_UNANSWERED, Event.CANCELLED)),
    **_stay((Phase.ROLLED_BACK,), (Event.TARGET_REFUSED,)),
    **_stay((Phase.DONE, Phase.TAKEN_BACK), (Event.TARGET_PREPARED, Event.TARGET_READY)),
    **_stay((Phase.DONE,), (Event.TARGET_HELD, Event.TARGET_SETTLED)),
    **_stay((Phase.TAKEN_BACK,), (Event.TARGET_RUNNING, Event.TARGET_RETURNED)),
    **_stay((Phase.PRECOPY, Phase.FROZEN, Phase.SENDING), (Event.TARGET_PREPARED, Event.TARGET_RESUMED)),
    **_stay((Phase.COMMITTED, Phase.IN_DOUBT, *_KEPT, *_THE_END), (Event.TARGET_RESUMED,)),
    **_stay((Phase.COMMITTED, Phase.IN_DOUBT), (Event.TARGET_PREPARED, Event.TARGET_READY)),
}

JOURNALED: Mapping[Action, Phase] = {
    Action.JOURNAL_PREPARED: Phase.PREPARED,
    Action.JOURNAL_COMMITTED: Phase.COMMITTED,
    Action.JOURNAL_KEEPING: Phase.KEEPING,
    Action.JOURNAL_RETURNING: Phase.RETURNING,
    Action.JOURNAL_TAKEN_BACK: Phase.TAKEN_BACK,
    Action.JOURNAL_DONE: Phase.DONE,
    Action.JOURNAL_ROLLED_BACK: Phase.ROLLED_BACK,
    Action.JOURNAL_RECLAIMED: Phase.RECLAIMED,
}
"""Which phase each journal action writes."""


def step(phase: Phase, event: Event, table: Transitions = TRANSITIONS) -> tuple[Phase, tuple[Action, ...]]:
    """The next phase, and what to do on the way there. Raises IllegalTransition."""
    try:
        return table[phase, event]
    except KeyError:
        raise IllegalTransition(f"source: {event} while {phase}") from None


def recovered(last: str) -> Phase:
    """The phase to be RESTARTED in, from the last phase in the journal ("" when it is empty). Raises ValueError."""
    if last == "":
        return Phase.INIT
    phase = Phase(last)
    return Phase.ROLLED_BACK if phase is Phase.RECLAIMED else phase
