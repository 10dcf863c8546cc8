"""A model of two hosts that follow the tables of migrate.machine and migrate.target_machine, and every history of it.

What it has: two journals, two sets of tasks, a network, agents that are killed between any two actions and start again.
The network is the set of all messages ever sent, and any of them may arrive at any time, any number of times, or never:
that is loss, duplication and reordering at once. A world event (link lost, timeout, fault, Ctrl-C) may come at any
time, and any action may fail, with the driver's rule of machine.py for what follows. A state is all of that;
``explore`` visits each reachable one once and checks it.

What it does not have: more than one attempt at once (messages carry move id and epoch, and a driver looks), a disk that
loses what it has synced, and a host that reboots while the container runs on it (any container is lost then).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

from migrate import machine as source_side
from migrate import target_machine as target_side
from migrate.machine import Action as S
from migrate.machine import Event as SEvent
from migrate.machine import Phase as SPhase
from migrate.target_machine import Action as T
from migrate.target_machine import Event as TEvent
from migrate.target_machine import Phase as TPhase

SourceTable: TypeAlias = Mapping[tuple[SPhase, SEvent], tuple[SPhase, tuple[S, ...]]]
TargetTable: TypeAlias = Mapping[tuple[TPhase, TEvent], tuple[TPhase, tuple[T, ...]]]


class Tasks(StrEnum):
    """The container's tasks on one host."""

    NONE = "none"
    RUNNING = "running"
    FROZEN = "frozen"
    HELD = "held"  # restored by CRIU, no instruction has run


# Action that sends -> event that arrives at the other side.
TO_TARGET = {
    S.SEND_OFFER: TEvent.OFFER,
    S.COPY: TEvent.BULK,
    S.SEND_STATE: TEvent.STATE,
    S.SEND_COMMIT: TEvent.COMMIT,
    S.SEND_DONE: TEvent.DONE,
    S.SEND_DISCARD: TEvent.DISCARD,
    S.SEND_GIVE_BACK: TEvent.GIVE_BACK,
    S.ASK: TEvent.ASK,
    S.SEND_RESUME: TEvent.RESUME,
}
TO_SOURCE = {
    T.SEND_PREPARED: SEvent.TARGET_PREPARED,
    T.SEND_READY: SEvent.TARGET_READY,
    T.SEND_RUNNING: SEvent.TARGET_RUNNING,
    T.SEND_REFUSED: SEvent.TARGET_REFUSED,
    T.SEND_HELD: SEvent.TARGET_HELD,
    T.SEND_RETURNED: SEvent.TARGET_RETURNED,
    T.SEND_SETTLED: SEvent.TARGET_SETTLED,
    T.SEND_RESUMED: SEvent.TARGET_RESUMED,
}
# Phases in which a person may say that the target is cut off for good.
FENCEABLE = (SPhase.IN_DOUBT, SPhase.KEEPING, SPhase.RETURNING)


TAKEN = frozenset({SPhase.RECLAIMED, SPhase.TAKEN_BACK})
"""Records by which the source has the token again."""
GIVEN = frozenset({TPhase.REFUSED, TPhase.RETURNED})
"""Records by which the target will never have it again."""


class World(NamedTuple):
    """One global state. ``pending`` are actions decided and not yet done, ``from`` is the phase before them."""

    source: SPhase = SPhase.INIT
    source_from: SPhase = SPhase.INIT
    source_pending: tuple[S, ...] = ()
    source_disk: frozenset[SPhase] = frozenset()
    source_last: str = ""
    source_tasks: Tasks = Tasks.RUNNING
    target: TPhase = TPhase.IDLE
    target_from: TPhase = TPhase.IDLE
    target_pending: tuple[T, ...] = ()
    target_disk: frozenset[TPhase] = frozenset()
    target_last: str = ""
    target_tasks: Tasks = Tasks.NONE
    target_ran: bool = False
    """Whether an instruction of the container ever ran on the target: what NEVER_RAN needs proof of."""
    target_kept: bool = False
    """What was received is still there."""
    fenced: bool = False
    """A person has cut the target off for good."""
    to_target: frozenset[TEvent] = frozenset()
    to_source: frozenset[SEvent] = frozenset()

    @property
    def source_has_token(self) -> bool:
        return SPhase.COMMITTED not in self.source_disk or bool(TAKEN & self.source_disk)

    @property
    def target_has_token(self) -> bool:
        return TPhase.COMMIT_LOGGED in self.target_disk and not GIVEN & self.target_disk and not self.fenced


Successor: TypeAlias = tuple[str, World]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The tables, and what the world around them does. Tests plant bugs by changing either."""

    source_table: SourceTable = field(default_factory=lambda: source_side.TRANSITIONS)
    target_table: TargetTable = field(default_factory=lambda: target_side.TRANSITIONS)
    freezer_survives_agent: bool = True
    """The cgroup freezer holds the tasks when CRIU and agent die; ptrace alone would not."""
    fencing: bool = True
    """A person may cut the target off for good, which is a way out of every doubt."""
    links_come_back: bool = False
    """A link that breaks before the freeze may be brought back. In a walk of its own: it makes many more states."""
    source_recovers: Callable[[str], SPhase] = source_side.recovered
    target_recovers: Callable[[str], TPhase] = target_side.recovered

    def successors(self, world: World) -> Iterator[Successor]:
        yield from self._source_steps(world)
        if not world.fenced:
            yield from self._target_steps(world)
            if self.fencing and world.source in FENCEABLE:
                yield "fence target", fence(world)

    # The source

    def _source_steps(self, world: World) -> Iterator[Successor]:
        if world.source_pending:
            action, *rest = world.source_pending
            yield f"source does {action}", self._source_act(world._replace(source_pending=tuple(rest)), action)
            yield f"source fails to {action}", self._source_fails(world)
        else:
            for event in self._source_events(world):
                phase, actions = source_side.step(world.source, event, self.source_table)
                yield (
                    f"source: {event}",
                    world._replace(
                        source=phase, source_pending=actions, source_from=world.source if actions else phase
                    ),
                )
        if world.source is not SPhase.INIT:
            yield "source killed and started", self._source_crash(world)

    def _source_events(self, world: World) -> Iterator[SEvent]:
        if world.source is SPhase.INIT:
            yield SEvent.START
            return
        yield from world.to_source
        if world.source is SPhase.COMMITTED and SEvent.TARGET_RUNNING in world.to_source:
            yield SEvent.TARGET_RUNNING_KEEP
        if world.source is SPhase.KEEPING:
            yield SEvent.TAKE_BACK
            if not world.fenced:  # it asks the target whether that has it still
                yield SEvent.ACCEPTED
        yield from (SEvent.CANCELLED, SEvent.FAULT, SEvent.LINK_LOST, SEvent.TIMEOUT)
        if world.source is SPhase.PRECOPY:
            yield SEvent.COPIED
            if self.links_come_back:
                yield SEvent.LINK_BROKE
        if world.source is SPhase.FROZEN and world.source_tasks is Tasks.FROZEN:
            yield SEvent.DUMPED
        if world.source in FENCEABLE and world.fenced:
            yield SEvent.KEEP_SOURCE
        if world.source in (SPhase.IN_DOUBT, SPhase.KEEPING) and world.target_tasks is Tasks.RUNNING:
            yield SEvent.KEEP_TARGET

    def _source_act(self, world: World, action: S) -> World:
        if action in source_side.JOURNALED:
            phase = source_side.JOURNALED[action]
            return world._replace(source_disk=world.source_disk | {phase}, source_last=str(phase))
        if action is S.FREEZE_AND_DUMP:
            return world._replace(source_tasks=Tasks.FROZEN)
        if action is S.THAW and world.source_tasks is Tasks.FROZEN:
            return world._replace(source_tasks=Tasks.RUNNING)
        if action is S.KILL_COPY:
            return world._replace(source_tasks=Tasks.NONE)
        if action in TO_TARGET:
            return world._replace(to_target=world.to_target | {TO_TARGET[action]})
        return world

    def _source_fails(self, world: World) -> World:
        rest = world.source_pending
        if rest == source_side.ROLL_BACK[1][-len(rest) :]:
            return world._replace(source_pending=rest[1:])
        unwritten = any(action in source_side.JOURNALED for action in rest)
        return world._replace(source=world.source_from if unwritten else world.source, source_pending=())

    def _source_crash(self, world: World) -> World:
        before = self.source_recovers(world.source_last)
        phase, actions = source_side.step(before, SEvent.RESTARTED, self.source_table)
        thawed = world.source_tasks is Tasks.FROZEN and not self.freezer_survives_agent
        tasks = Tasks.RUNNING if thawed else world.source_tasks
        return world._replace(source=phase, source_pending=actions, source_from=before, source_tasks=tasks)

    # The target

    def _target_steps(self, world: World) -> Iterator[Successor]:
        if world.target_pending:
            action, *rest = world.target_pending
            after = world._replace(target_pending=tuple(rest))
            for done in self._target_act(after, action):
                yield f"target does {action}", done
            unwritten = any(action in target_side.JOURNALED for action in world.target_pending)
            phase = world.target_from if unwritten else world.target
            yield f"target fails to {action}", world._replace(target=phase, target_pending=())
        else:
            for event in self._target_events(world):
                phase, actions = target_side.step(world.target, event, self.target_table)
                yield (
                    f"target: {event}",
                    world._replace(
                        target=phase, target_pending=actions, target_from=world.target if actions else phase
                    ),
                )
        if world.target_last:
            yield "target killed and started", self._target_crash(world)

    def _target_events(self, world: World) -> Iterator[TEvent]:
        yield from world.to_target
        if world.target is not TPhase.IDLE:
            yield from (TEvent.FAULT, TEvent.LINK_LOST, TEvent.TIMEOUT)
        if world.target is TPhase.VERIFIED and world.target_tasks is Tasks.HELD:
            yield TEvent.RESTORED
        if self.links_come_back and world.target in (TPhase.RESERVED, TPhase.RECEIVING):
            yield TEvent.LINK_BROKE
        if world.target is TPhase.RETURNING and world.target_tasks is Tasks.NONE:
            yield TEvent.COPY_GONE
        if world.target is TPhase.RESUMED and world.target_tasks is Tasks.RUNNING:
            yield TEvent.MOVED_ON
        if world.target is TPhase.COMMIT_LOGGED:
            if world.target_tasks is Tasks.RUNNING:
                yield TEvent.RELEASED
            elif world.target_tasks is Tasks.NONE:
                yield TEvent.RELEASE_FAILED
                if not world.target_ran:
                    yield TEvent.NEVER_RAN

    def _target_act(self, world: World, action: T) -> Iterator[World]:
        if action in target_side.JOURNALED:
            phase = target_side.JOURNALED[action]
            yield world._replace(target_disk=world.target_disk | {phase}, target_last=str(phase))
        elif action is T.STORE:
            yield world._replace(target_kept=True)
        elif action is T.VERIFY_AND_RESTORE:
            yield world._replace(target_tasks=Tasks.HELD, target_kept=True)
            yield world  # the manifest does not agree, or CRIU refuses: FAULT or TIMEOUT follows
        elif action is T.RELEASE and world.target_tasks is Tasks.HELD:
            yield world._replace(target_tasks=Tasks.RUNNING, target_ran=True)
            yield world._replace(target_tasks=Tasks.NONE)
        elif action is T.RUN_AGAIN and world.target_tasks is not Tasks.RUNNING:
            if world.target_kept:
                yield world._replace(target_tasks=Tasks.RUNNING, target_ran=True)
            yield world._replace(target_tasks=Tasks.NONE)
        elif action is T.KILL_COPY:
            yield world._replace(target_tasks=Tasks.NONE)
            yield world  # a process hangs in the kernel
        elif action is T.UNDO:
            yield world._replace(target_tasks=Tasks.NONE, target_kept=False)
        elif action is T.DROP_KEPT:
            yield world._replace(target_kept=False)
        elif action in TO_SOURCE:
            yield world._replace(to_source=world.to_source | {TO_SOURCE[action]})
        else:
            yield world

    def _target_crash(self, world: World) -> World:
        before = self.target_recovers(world.target_last)
        phase, actions = target_side.step(before, TEvent.RESTARTED, self.target_table)
        # CRIU loses its caller and kills what it holds; what was released has a monitor of its own.
        tasks = Tasks.NONE if world.target_tasks is Tasks.HELD else world.target_tasks
        return world._replace(target=phase, target_pending=actions, target_from=before, target_tasks=tasks)


def fence(world: World) -> World:
    """A person has cut the target off: it does nothing any more, and nothing it said arrives any more."""
    return world._replace(
        fenced=True, target_pending=(), target_tasks=Tasks.NONE, target_kept=False, to_source=frozenset()
    )


def broken_invariants(world: World) -> Iterator[str]:
    """The five of the handover, and what they are for, in one global state."""
    s_disk, t_disk = world.source_disk, world.target_disk
    live = {Tasks.RUNNING}
    if world.source_has_token and world.target_has_token:
        yield "1: both sides hold the token"
    if world.source_tasks in live and world.target_tasks in live:
        yield "1: two copies run"
    if {TPhase.SETTLED, TPhase.RETURNING} <= t_disk:
        yield "1: the target gives back what has moved on"
    here = world.source_tasks is not Tasks.NONE
    there = world.target_tasks is Tasks.RUNNING or (TPhase.COMMIT_LOGGED in t_disk and world.target_kept)
    if not here and not there:
        yield "2: no copy is left"
    if not here and TPhase.RETURNING in t_disk:
        yield "2: the source threw its copy away, and the target gives its own back"
    if not here and not (TPhase.COMMIT_LOGGED in t_disk and SPhase.DONE in s_disk):
        yield "2: the source threw its copy away without a durable COMMIT_LOGGED there and DONE here"
    # What never ran there is still here as it was; what ran can only be brought up again from what was kept.
    if world.target_has_token and world.target_ran and not world.target_kept and SPhase.DONE not in s_disk:
        yield "2: the target threw away what it kept before the source was done"
    runs_there = (TPhase.RESUMED, TPhase.SETTLED, TPhase.CONFIRMED)
    if world.target in runs_there and world.target_tasks is Tasks.NONE and not world.fenced:
        yield f"2: what ran was killed on the target while {world.target}"
    for message, phase in (
        (TEvent.OFFER, SPhase.PREPARED),
        (TEvent.COMMIT, SPhase.COMMITTED),
        (TEvent.DONE, SPhase.DONE),
        (TEvent.GIVE_BACK, SPhase.RETURNING),
    ):
        if message in world.to_target and phase not in s_disk:
            yield f"3: {message} was sent before {phase} was on the source's disk"
    for answer, where in (
        (SEvent.TARGET_PREPARED, TPhase.RESERVED),
        (SEvent.TARGET_RESUMED, TPhase.RESERVED),
        (SEvent.TARGET_READY, TPhase.RESTORED_HELD),
        (SEvent.TARGET_RUNNING, TPhase.COMMIT_LOGGED),
        (SEvent.TARGET_REFUSED, TPhase.REFUSED),
        (SEvent.TARGET_RETURNED, TPhase.RETURNED),
    ):
        if answer in world.to_source and where not in t_disk:
            yield f"3: {answer} was sent before {where} was on the target's disk"
    if SEvent.TARGET_SETTLED in world.to_source and not {TPhase.SETTLED, TPhase.CONFIRMED} & t_disk:
        yield "3: settled was sent before that was on the target's disk"
    if TPhase.RETURNED in t_disk and world.target_tasks is not Tasks.NONE:
        yield "3: RETURNED is on the target's disk, and its copy lives"
    held = (SPhase.SENDING, SPhase.COMMITTED, SPhase.IN_DOUBT, SPhase.KEEPING, SPhase.RETURNING)
    if world.source in held and world.source_tasks in live:
        yield f"4: the source's tasks run while {world.source}"
    if world.target_tasks in live and TPhase.COMMIT_LOGGED not in t_disk:
        yield "5: the target started on its own"
    if SPhase.COMMITTED in s_disk and world.source_tasks in live and not TAKEN & s_disk:
        yield "5: the source thawed after COMMITTED"
    if SPhase.TAKEN_BACK in s_disk and TPhase.RETURNED not in t_disk and not world.fenced:
        yield "5: the source took it back without a durable RETURNED there"
    if SPhase.RECLAIMED in s_disk and TPhase.REFUSED not in t_disk and not world.fenced:
        yield "5: the source reclaimed without a durable REFUSED there"


def is_good_end(world: World) -> bool:
    """Settled: one copy runs, where the token is, and the other side has nothing left of the container."""
    if world.source_pending or world.target_pending:
        return False
    if world.source is SPhase.DONE:
        runs = world.target is TPhase.CONFIRMED and world.target_tasks is Tasks.RUNNING
        return runs and world.source_tasks is Tasks.NONE and not world.target_kept
    if world.source is SPhase.TAKEN_BACK and world.source_tasks is Tasks.RUNNING:
        gone = world.target_tasks is Tasks.NONE and not world.target_kept
        return world.fenced or (world.target is TPhase.RETURNED and gone)
    if world.source is SPhase.ROLLED_BACK and world.source_tasks is Tasks.RUNNING:
        return world.fenced or (world.target in (TPhase.IDLE, TPhase.REFUSED) and world.target_tasks is Tasks.NONE)
    return False


@dataclass(kw_only=True)
class Found:
    """What ``explore`` saw. A violation comes with the shortest history that leads to it."""

    states: int = 0
    steps: int = 0
    violations: dict[str, list[str]] = field(default_factory=dict)
    ends: int = 0
    stuck: list[World] = field(default_factory=list)
    """States from which no history reaches a good end."""
    used_source: set[tuple[SPhase, SEvent]] = field(default_factory=set)
    used_target: set[tuple[TPhase, TEvent]] = field(default_factory=set)


def explore(model: Model, *, until: str | None = None) -> Found:
    """Every reachable state, breadth first, so that the history told is a shortest one.

    ``until`` ends the walk at the first violation whose text begins so.
    """
    start = World()
    parents: dict[World, tuple[World, str] | None] = {start: None}
    reverse: dict[World, list[World]] = {}
    waiting = [start]
    found = Found()
    for world in waiting:
        for rule in broken_invariants(world):
            found.violations.setdefault(rule, history(parents, world))
        if until is not None and any(rule.startswith(until) for rule in found.violations):
            return found
        try:
            for name, after in model.successors(world):
                found.steps += 1
                _note_use(found, world, name)
                earlier = reverse.get(after)
                if earlier is None:
                    reverse[after] = [world]
                    if after not in parents:
                        parents[after] = (world, name)
                        waiting.append(after)
                else:
                    earlier.append(world)
        except source_side.IllegalTransition as error:
            found.violations.setdefault(f"illegal: {error}", history(parents, world))
    found.states = len(parents)
    good = [world for world in parents if is_good_end(world)]
    found.ends = len(good)
    reaching = set(good)
    while good:
        for before in reverse.get(good.pop(), ()):
            if before not in reaching:
                reaching.add(before)
                good.append(before)
    found.stuck = [world for world in parents if world not in reaching]
    return found


def _note_use(found: Found, world: World, name: str) -> None:
    side, _, event = name.partition(": ")
    if side == "source":
        found.used_source.add((world.source, SEvent(event)))
    elif side == "target":
        found.used_target.add((world.target, TEvent(event)))
    elif name == "source killed and started":
        found.used_source.add((source_side.recovered(world.source_last), SEvent.RESTARTED))
    elif name == "target killed and started":
        found.used_target.add((target_side.recovered(world.target_last), TEvent.RESTARTED))


def history(parents: Mapping[World, Any], world: World) -> list[str]:
    steps: list[str] = []
    link = parents[world]
    while link is not None:
        before, name = link
        steps.append(name)
        link = parents[before]
    return steps[::-1]
