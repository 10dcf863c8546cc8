"""Every history of the two tables, joined by a network that loses, doubles and reorders, with kills at every step."""

from collections.abc import Mapping
from typing import Any

import pytest

from migrate import machine, target_machine
from migrate.machine import Action as S
from migrate.machine import Event as SEvent
from migrate.machine import Phase as SPhase
from migrate.target_machine import Action as T
from migrate.target_machine import Event as TEvent
from migrate.target_machine import Phase as TPhase
from tests.unit.migrate.handover_model import Model
from tests.unit.migrate.handover_walk import Found, explore


@pytest.fixture(scope="module")
def found() -> Found:
    return explore(Model())


def test_no_history_breaks_an_invariant(found: Found) -> None:
    assert not found.violations, "\n".join(f"{rule}\n    " + "\n    ".join(h) for rule, h in found.violations.items())


def test_the_walk_is_not_empty(found: Found) -> None:
    assert found.states > 10_000
    assert found.steps > 5 * found.states
    assert found.ends > 100


def test_from_every_state_a_good_end_can_be_reached(found: Found) -> None:
    assert not found.stuck


def test_nobody_has_to_be_fenced_for_that_once_it_ran_on_the_target() -> None:
    """A release that fails may leave a doubt that only a person ends; giving back does not."""
    assert not [w for w in explore(Model(fencing=False)).stuck if w.source.phase in (SPhase.KEEPING, SPhase.RETURNING)]


def test_every_line_of_both_tables_happens_but_those_known_not_to(found: Found) -> None:
    """The rest is for drivers that journal more phases than they must, and for a peer that is not ours."""
    never_source = {(phase, SEvent.RESTARTED) for phase in (SPhase.PRECOPY, SPhase.FROZEN, SPhase.SENDING)}
    never_source.add((SPhase.IN_DOUBT, SEvent.RESTARTED))
    never_target = {(phase, TEvent.RESTARTED) for phase in (TPhase.RECEIVING, TPhase.VERIFIED)}
    never_target |= {(phase, TEvent.ASK) for phase in (TPhase.IDLE, TPhase.RESERVED, TPhase.RECEIVING, TPhase.VERIFIED)}
    # Asked before a window is closed: neither table knows of that question.
    never_target |= {(phase, TEvent.ASK) for phase in (TPhase.RETURNING, TPhase.RETURNED)}
    comes_back = {SEvent.LINK_BROKE, SEvent.TARGET_RESUMED}, {TEvent.LINK_BROKE, TEvent.RESUME}
    never_source |= {line for line in machine.TRANSITIONS if line[1] in comes_back[0]}
    never_target |= {line for line in target_machine.TRANSITIONS if line[1] in comes_back[1]}
    assert set(machine.TRANSITIONS) - found.used_source == never_source
    assert set(target_machine.TRANSITIONS) - found.used_target == never_target


def test_a_link_that_comes_back_before_the_freeze_or_after_the_switch_breaks_no_invariant_either() -> None:
    """Also where a question of it, or its answer, arrives when all has been decided."""
    found = explore(Model(links_come_back=True))
    assert not found.violations, "\n".join(f"{rule}\n    " + "\n    ".join(h) for rule, h in found.violations.items())
    assert not found.stuck
    asked = {phase for phase, event in found.used_target if event is TEvent.RESUME}
    assert asked == set(TPhase) - {TPhase.IDLE}
    assert {phase for phase, event in found.used_source if event is SEvent.LINK_BROKE} == {
        SPhase.PRECOPY,
        SPhase.COMMITTED,
    }


def source_bug(changes: Mapping[Any, Any]) -> Model:
    return Model(source_table={**machine.TRANSITIONS, **changes})


def target_bug(changes: Mapping[Any, Any], *, fencing: bool = True) -> Model:
    return Model(target_table={**target_machine.TRANSITIONS, **changes}, fencing=fencing)


BUGS: dict[str, tuple[Model, str]] = {
    "a target that has refused goes on when the link is back": (
        Model(
            target_table={
                **target_machine.TRANSITIONS,
                (TPhase.REFUSED, TEvent.RESUME): (TPhase.RECEIVING, (T.SEND_RESUMED,)),
            },
            links_come_back=True,
        ),
        "1: two copies run",
    ),
    "a link that is not brought back after COMMIT thaws": (
        Model(
            source_table={**machine.TRANSITIONS, (SPhase.COMMITTED, SEvent.LINK_BROKE): machine.ROLL_BACK},
            links_come_back=True,
        ),
        "5: the source thawed",
    ),
    "a source that comes back after the switch is refused": (
        Model(
            target_table={
                **target_machine.TRANSITIONS,
                (TPhase.RESUMED, TEvent.RESUME): (TPhase.RESUMED, (T.SEND_REFUSED,)),
            },
            links_come_back=True,
        ),
        "3: refused",
    ),
    "a link that comes back thaws what is in doubt": (
        Model(
            source_table={**machine.TRANSITIONS, (SPhase.IN_DOUBT, SEvent.TARGET_RESUMED): machine.ROLL_BACK},
            links_come_back=True,
        ),
        "5: the source thawed",
    ),
    "COMMIT is sent before it is on the disk": (
        source_bug({(SPhase.SENDING, SEvent.TARGET_READY): (SPhase.COMMITTED, (S.SEND_COMMIT, S.JOURNAL_COMMITTED))}),
        "3: commit",
    ),
    "COMMITTED is never journaled": (
        source_bug({(SPhase.SENDING, SEvent.TARGET_READY): (SPhase.COMMITTED, (S.SEND_COMMIT,))}),
        "1: two copies run",
    ),
    "the source thaws when COMMIT is not answered": (
        source_bug({(SPhase.COMMITTED, SEvent.TIMEOUT): machine.ROLL_BACK}),
        "5: the source thawed",
    ),
    "the source reclaims without asking": (
        source_bug({(SPhase.IN_DOUBT, SEvent.LINK_LOST): (SPhase.ROLLED_BACK, (S.JOURNAL_RECLAIMED, S.THAW))}),
        "1: both sides",
    ),
    "the source takes HELD for REFUSED": (
        source_bug({(SPhase.IN_DOUBT, SEvent.TARGET_HELD): (SPhase.ROLLED_BACK, (S.JOURNAL_RECLAIMED, S.THAW))}),
        "1: two copies run",
    ),
    "the source thaws before RECLAIMED is on the disk": (
        source_bug({(SPhase.IN_DOUBT, SEvent.TARGET_REFUSED): (SPhase.ROLLED_BACK, (S.THAW, S.JOURNAL_RECLAIMED))}),
        "5: the source thawed",
    ),
    "the source kills its copy at READY": (
        source_bug(
            {
                (SPhase.SENDING, SEvent.TARGET_READY): (
                    SPhase.COMMITTED,
                    (S.JOURNAL_COMMITTED, S.SEND_COMMIT, S.KILL_COPY),
                )
            }
        ),
        "2: no copy is left",
    ),
    "the source kills its copy before DONE is on the disk": (
        source_bug(
            {(SPhase.COMMITTED, SEvent.TARGET_RUNNING): (SPhase.DONE, (S.KILL_COPY, S.JOURNAL_DONE, S.SEND_DONE))}
        ),
        "2: the source threw",
    ),
    "Ctrl-C after COMMIT rolls back": (
        source_bug({(SPhase.COMMITTED, SEvent.CANCELLED): machine.ROLL_BACK}),
        "5: the source thawed",
    ),
    "the source forgets to freeze": (
        source_bug({(SPhase.PRECOPY, SEvent.COPIED): (SPhase.SENDING, (S.SEND_STATE,))}),
        "4: ",
    ),
    "only ptrace holds the source's tasks": (Model(freezer_survives_agent=False), "5: the source thawed"),
    "a restarted source takes COMMITTED for SENDING": (
        Model(source_recovers=lambda last: SPhase.SENDING if last == SPhase.COMMITTED else machine.recovered(last)),
        "5: the source thawed",
    ),
    "a restarted source does not thaw what it rolled back": (
        source_bug({(SPhase.ROLLED_BACK, SEvent.RESTARTED): (SPhase.ROLLED_BACK, ())}),
        "stuck",
    ),
    "a restarted source does not finish killing": (
        source_bug({(SPhase.DONE, SEvent.RESTARTED): (SPhase.DONE, (S.SEND_DONE,))}),
        "stuck",
    ),
    "the target starts on its own": (
        target_bug({(TPhase.VERIFIED, TEvent.RESTORED): (TPhase.RESTORED_HELD, (T.JOURNAL_HELD, T.RELEASE))}),
        "5: the target started",
    ),
    "the target starts when the link is lost": (
        target_bug({(TPhase.RESTORED_HELD, TEvent.LINK_LOST): (TPhase.COMMIT_LOGGED, (T.JOURNAL_COMMIT, T.RELEASE))}),
        "1: both sides",
    ),
    "the target releases before COMMIT is on its disk": (
        target_bug({(TPhase.RESTORED_HELD, TEvent.COMMIT): (TPhase.COMMIT_LOGGED, (T.RELEASE, T.JOURNAL_COMMIT))}),
        "5: the target started",
    ),
    "the target says RUNNING while it holds": (
        target_bug({(TPhase.RESTORED_HELD, TEvent.ASK): (TPhase.RESTORED_HELD, (T.SEND_RUNNING,))}),
        "3: running",
    ),
    "the target says READY before that is on its disk": (
        target_bug({(TPhase.VERIFIED, TEvent.RESTORED): (TPhase.RESTORED_HELD, (T.SEND_READY, T.JOURNAL_HELD))}),
        "3: ready",
    ),
    "the target refuses without writing it down": (
        target_bug({(TPhase.RESTORED_HELD, TEvent.TIMEOUT): (TPhase.REFUSED, (T.UNDO, T.SEND_REFUSED))}),
        "3: refused",
    ),
    "the target refuses what it may have run": (
        target_bug({(TPhase.COMMIT_LOGGED, TEvent.LINK_LOST): (TPhase.REFUSED, (T.JOURNAL_REFUSED, T.SEND_REFUSED))}),
        "1: two copies run",
    ),
    "COMMIT after REFUSED is obeyed": (
        target_bug(
            {
                (TPhase.RESTORED_HELD, TEvent.TIMEOUT): (TPhase.REFUSED, (T.JOURNAL_REFUSED, T.SEND_REFUSED)),
                (TPhase.REFUSED, TEvent.COMMIT): (TPhase.COMMIT_LOGGED, (T.JOURNAL_COMMIT, T.RELEASE)),
            }
        ),
        "1: two copies run",
    ),
    "the target drops what it kept before the source is done": (
        target_bug({(TPhase.COMMIT_LOGGED, TEvent.RELEASED): (TPhase.RESUMED, (T.DROP_KEPT, T.SEND_RUNNING))}),
        "2: the target threw",
    ),
    "the source runs again before the target has given it back": (
        source_bug({(SPhase.KEEPING, SEvent.TAKE_BACK): (SPhase.TAKEN_BACK, (S.JOURNAL_TAKEN_BACK, S.THAW))}),
        "1: two copies run",
    ),
    "the source runs again when its request is not answered": (
        source_bug({(SPhase.RETURNING, SEvent.TIMEOUT): (SPhase.TAKEN_BACK, (S.JOURNAL_TAKEN_BACK, S.THAW))}),
        "5: the source took it back",
    ),
    "the source thaws before TAKEN_BACK is on the disk": (
        source_bug({(SPhase.RETURNING, SEvent.TARGET_RETURNED): (SPhase.TAKEN_BACK, (S.THAW, S.JOURNAL_TAKEN_BACK))}),
        "5: the source thawed",
    ),
    "the source asks for it back before that is on the disk": (
        source_bug({(SPhase.KEEPING, SEvent.TAKE_BACK): (SPhase.RETURNING, (S.SEND_GIVE_BACK, S.JOURNAL_RETURNING))}),
        "3: give-back",
    ),
    "a request to give it back that is late": (
        source_bug({(SPhase.RETURNING, SEvent.TARGET_RUNNING): machine.TRANSITIONS[SPhase.KEEPING, SEvent.ACCEPTED]}),
        "2: no copy is left",
    ),
    "a restarted source forgets that it has asked": (
        Model(source_recovers=lambda last: SPhase.KEEPING if last == SPhase.RETURNING else machine.recovered(last)),
        "2: the source threw its copy away",
    ),
    "a restarted source does not thaw what it took back": (
        source_bug({(SPhase.TAKEN_BACK, SEvent.RESTARTED): (SPhase.TAKEN_BACK, ())}),
        "stuck",
    ),
    "the target kills what runs before that is on its disk": (
        target_bug({(TPhase.RESUMED, TEvent.GIVE_BACK): (TPhase.RETURNING, (T.KILL_COPY, T.JOURNAL_RETURNING))}),
        "2: what ran was killed",
    ),
    "the target has given back what lives": (
        target_bug({(TPhase.RESUMED, TEvent.GIVE_BACK): (TPhase.RETURNED, (T.JOURNAL_RETURNED, T.SEND_RETURNED))}),
        "3: RETURNED is on the target's disk",
    ),
    "the target has given back without writing it down": (
        target_bug({(TPhase.RETURNING, TEvent.COPY_GONE): (TPhase.RETURNED, (T.UNDO, T.SEND_RETURNED))}),
        "3: returned",
    ),
    "a restarted target does not finish killing": (
        target_bug(
            {
                (TPhase.RETURNING, TEvent.RESTARTED): (TPhase.RETURNING, ()),
                (TPhase.RETURNING, TEvent.GIVE_BACK): (TPhase.RETURNING, ()),
            },
            fencing=False,
        ),
        "stuck",
    ),
    "the target gives back what has moved on": (
        target_bug({(TPhase.SETTLED, TEvent.GIVE_BACK): target_machine.TRANSITIONS[TPhase.RESUMED, TEvent.GIVE_BACK]}),
        "1: the target gives back",
    ),
    "the target says that it stays and does not write it down": (
        target_bug({(TPhase.RESUMED, TEvent.GIVE_BACK): (TPhase.RESUMED, (T.SEND_SETTLED,))}),
        "3: settled",
    ),
    "a message has no line in the table": (
        Model(target_table={k: v for k, v in target_machine.TRANSITIONS.items() if k[1] is not TEvent.ASK}),
        "illegal: target: ask",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    model, expected = BUGS[bug]
    if expected == "stuck":
        assert explore(model).stuck
        return
    result = explore(model, until=expected)
    assert any(rule.startswith(expected) for rule in result.violations), sorted(result.violations)


def test_an_event_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(machine.IllegalTransition, match="source: ready while INIT"):
        machine.step(SPhase.INIT, SEvent.TARGET_READY)
    with pytest.raises(machine.IllegalTransition, match="target: commit while IDLE"):
        target_machine.step(TPhase.IDLE, TEvent.COMMIT)


def test_the_plain_history_is_the_one_of_the_design() -> None:
    phases = [SPhase.INIT]
    done: list[S] = []
    for event in (
        SEvent.START,
        SEvent.TARGET_PREPARED,
        SEvent.COPIED,
        SEvent.DUMPED,
        SEvent.TARGET_READY,
        SEvent.TARGET_RUNNING,
    ):
        phase, actions = machine.step(phases[-1], event)
        phases.append(phase)
        done += actions
    names = ["INIT", "PREPARED", "PRECOPY", "FROZEN", "SENDING", "COMMITTED", "DONE"]
    assert [str(phase) for phase in phases] == names
    assert done.index(S.JOURNAL_COMMITTED) + 1 == done.index(S.SEND_COMMIT)


def test_a_restarted_agent_starts_from_what_its_journal_says() -> None:
    assert machine.recovered("") is SPhase.INIT
    assert machine.recovered("RECLAIMED") is SPhase.ROLLED_BACK
    assert machine.recovered("COMMITTED") is SPhase.COMMITTED
    assert machine.recovered("RETURNING") is SPhase.RETURNING
    assert target_machine.recovered("") is TPhase.IDLE
    assert target_machine.recovered("RESTORED_HELD") is TPhase.RESTORED_HELD
    with pytest.raises(ValueError, match="FLYING"):
        machine.recovered("FLYING")
