"""What an agent answers a source beside the course of one move: its preflight, a question, and a wish to go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from migrate import messages
from migrate.arrivals import at_work, standing
from migrate.direct import answer_direct
from migrate.errors import MoveRefused
from migrate.giving_back import handle_done, handle_give_back
from migrate.health import handle_check_health
from migrate.journal import read_all, read_one
from migrate.recover import recover
from migrate.segment import answer_segment
from migrate.session import HANDLERS, Asked, versions
from migrate.survey import answer_measure
from migrate.target import handle_offer
from migrate.waiting import dismiss, hand_over
from runtime.container import Containers
from runtime.host import HostConfig, must_be_writable

# A session that was told to go, or could not take a link, needs milliseconds to undo what it has.
SETTLE_S = 10.0
_POLL_S = 0.02


def register_handlers() -> None:
    """What an agent answers beside greetings."""
    HANDLERS["offer"] = answer_offer
    HANDLERS["preflight"] = answer_preflight
    HANDLERS["resume"] = answer_resume
    HANDLERS["discard"] = hear_discard
    HANDLERS["ask"] = answer_ask
    HANDLERS["direct"] = answer_direct
    HANDLERS["segment"] = answer_segment
    HANDLERS["measure"] = answer_measure
    HANDLERS["check-health"] = handle_check_health
    HANDLERS["give-back"] = handle_give_back
    HANDLERS["done"] = handle_done


def answer_preflight(asked: Asked, message: Mapping[str, Any]) -> None:
    """Every finding at once; nothing is reserved. What an earlier move left here may be all that is in the way."""
    from migrate.preflight import target_findings

    must_be_writable(asked.host)
    question = messages.Preflight.parse(message)
    for line in recover(asked.host):
        print(f"cmigrate: {line}", file=sys.stderr, flush=True)
    dismiss_waiting(asked.host, question.spec.id, if_waiting=True)
    findings = target_findings(asked.host, Containers(asked.host), question.facts, mode=question.mode)
    answer = messages.Findings(findings=tuple(finding.to_json() for finding in findings), versions=versions())
    asked.answer(answer.to_message())


def answer_offer(asked: Asked, message: Mapping[str, Any]) -> None:
    """A source that offers a container again has given up what it was at before.

    Raises MoveRefused for a move that this host knows already: an offer that was overtaken by the question about it is
    the source's no more.
    """
    offer = messages.Offer.parse(message)
    if read_one(asked.host.journal_dir, offer.move_id, "target") is not None:
        raise MoveRefused(f"{asked.host.name} has heard of move {offer.move_id} before its offer came")
    dismiss_waiting(asked.host, offer.spec.id, if_waiting=False, source=asked.peer_hello.host)
    handle_offer(asked, message)


def dismiss_waiting(host: HostConfig, container_id: str, *, if_waiting: bool, source: str = "") -> None:
    """End what waits here for the source of this container to come back."""
    for journal in read_all(host.journal_dir):
        if journal.side != "target" or journal.phase != "RESERVED" or not at_work(journal):
            continue
        details = journal.records[0].details
        if details.get("container") == container_id and source in ("", details.get("source")):
            dismiss(host.run_dir, journal.move_id, "another move of it has begun", if_waiting=if_waiting)


def answer_ask(asked: Asked, message: Mapping[str, Any]) -> None:
    """A source in doubt asks where its move stands here. One that asks before the freeze will not go on with it, nor
    with a fill after the switch, which it would else have come back to: the mover that had the memory is dead, or has
    waited long enough."""
    question = messages.Ask.parse(message)
    if _may_give_up(asked, question.move_id):
        dismiss(asked.host.run_dir, question.move_id, "the source has given it up", if_waiting=False)
    state = _settled(asked.host, question.move_id, question.epoch, given_up_by=asked.peer_hello.host)
    asked.answer(messages.Answer(move_id=question.move_id, epoch=question.epoch, state=state).to_message())


def _may_give_up(asked: Asked, move_id: str) -> bool:
    """From COMMIT on that would end the container, and only the host that has its memory may say so."""
    journal = read_one(asked.host.journal_dir, move_id, "target")
    if journal is None or not journal.reached("COMMIT_LOGGED"):
        return True
    return journal.records[0].details.get("source") == asked.peer_hello.host


def answer_resume(asked: Asked, message: Mapping[str, Any]) -> None:
    """A source whose link broke before the freeze, or in a fill after the switch: this connection goes to the session
    that holds its move.

    Raises HandedOver then, and ChannelClosed. Where none does any more, what it left is undone, and the source told so;
    after COMMIT it is told where the move stands.
    """
    question = messages.Resume.parse(message)
    handed = hand_over(asked.host.run_dir, question.move_id, asked.channel)
    if handed is not None:
        raise handed
    state = _settled(asked.host, question.move_id, question.epoch)
    move_id, name = question.move_id, asked.host.name
    if state == "refused":
        why = f"what {name} had of it is gone"
        asked.answer(messages.Refused(move_id=move_id, epoch=question.epoch, why=why).to_message())
    elif state != "held":
        asked.answer(messages.Answer(move_id=move_id, epoch=question.epoch, state=state).to_message())
    else:
        error = MoveRefused(f"move {move_id} can not go on where it was: on {name} it is {state}")
        asked.answer(messages.Error.of(error).to_message())


def hear_discard(asked: Asked, message: Mapping[str, Any]) -> None:
    """Of a move that could not go on here: there is nothing left of it, and nobody waits for an answer."""
    messages.Discard.parse(message)


def _settled(host: HostConfig, move_id: str, epoch: int, *, given_up_by: str = "") -> str:
    """Where it stands, once a session that is about to undo it, or is told so because its source has given it up, has
    done so."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        journal = read_one(host.journal_dir, move_id, "target")
        if journal is None or journal.phase != "RESERVED" or not at_work(journal) or time.monotonic() > deadline:
            return standing(host, move_id, epoch)
        if given_up_by and journal.records[0].details.get("source") == given_up_by:
            # Also one that is reserving still, and has only just begun to wait.
            dismiss(host.run_dir, move_id, "the source has given it up", if_waiting=False, wait_s=0.0)
        time.sleep(_POLL_S)
