"""A model of two hosts that follow the tables of migrate.machine and migrate.target_machine, and every history of it.

What it has: two journals, two sets of tasks, a network, agents that are killed between any two actions and start again.
The network is the set of all messages ever sent, and any of them may arrive at any time, any number of times, or never:
that is loss, duplication and reordering at once. A world event (link lost, timeout, fault, Ctrl-C) may come at any
time, and any action may fail, with the driver's rule of machine.py for what follows. A state is all of that;
handover_walk.py visits each reachable one once and checks it.

What it does not have: more than one attempt at once (messages carry move id and epoch, and a driver looks), a disk that
loses what it has synced, and a host that reboots while the container runs on it (any container is lost then).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from migrate import machine as source_side
from migrate import target_machine as target_side
from migrate.machine import Action as S
from migrate.machine import Event as SEvent
from migrate.machine import IllegalTransition
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One state of the source. ``pending`` are actions decided and not yet done, ``came_from`` is the phase before."""

    phase: SPhase = SPhase.INIT
    came_from: SPhase = SPhase.INIT
    pending: tuple[S, ...] = ()
    disk: frozenset[SPhase] = frozenset()
    last: str = ""
    tasks: Tasks = Tasks.RUNNING

    @property
    def has_token(self) -> bool:
        return SPhase.COMMITTED not in self.disk or bool(TAKEN & self.disk)


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One state of the target."""

    phase: TPhase = TPhase.IDLE
    came_from: TPhase = TPhase.IDLE
    pending: tuple[T, ...] = ()
    disk: frozenset[TPhase] = frozenset()
    last: str = ""
    tasks: Tasks = Tasks.NONE
    ran: bool = False
    """Whether an instruction of the container ever ran there: what NEVER_RAN needs proof of."""
    kept: bool = False
    """What was received is still there."""

    @property
    def has_token(self) -> bool:
        return TPhase.COMMIT_LOGGED in self.disk and not GIVEN & self.disk


class World(NamedTuple):
    """One global state."""

    source: Source
    target: Target
    fenced: bool = False
    """A person has cut the target off for good."""
    to_target: frozenset[TEvent] = frozenset()
    to_source: frozenset[SEvent] = frozenset()


class SourceStep(NamedTuple):
    """``line`` is the one of the table that was followed; ``illegal`` where it has none for what happened."""

    name: str
    after: Source
    sent: TEvent | None = None
    line: tuple[SPhase, SEvent] | None = None
    illegal: bool = False


class TargetStep(NamedTuple):
    name: str
    after: Target
    sent: SEvent | None = None
    line: tuple[TPhase, TEvent] | None = None
    illegal: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """The tables, and what the world around them does. Tests plant bugs by changing either.

    What one side can do depends on itself and on little else: the arguments of ``source_steps`` and ``target_steps``.
    """

    source_table: SourceTable = field(default_factory=lambda: source_side.TRANSITIONS)
    target_table: TargetTable = field(default_factory=lambda: target_side.TRANSITIONS)
    freezer_survives_agent: bool = True
    """The cgroup freezer holds the tasks when CRIU and agent die; ptrace alone would not."""
    fencing: bool = True
    """A person may cut the target off for good, which is a way out of every doubt."""
    links_come_back: bool = False
    """A link that breaks before the freeze, or while memory follows after the switch, may be brought back. In a walk of
    its own: it makes many more states."""
    source_recovers: Callable[[str], SPhase] = source_side.recovered
    target_recovers: Callable[[str], TPhase] = target_side.recovered

    # The source

    def source_steps(
        self, source: Source, arrived: frozenset[SEvent], *, fenced: bool, runs_there: bool
    ) -> Iterator[SourceStep]:
        if source.pending:
            action, *rest = source.pending
            after = _source_act(replace(source, pending=tuple(rest)), action)
            yield SourceStep(f"source does {action}", after, TO_TARGET.get(action))
            yield SourceStep(f"source fails to {action}", _source_fails(source))
        else:
            for event in self._source_events(source, arrived, fenced=fenced, runs_there=runs_there):
                try:
                    phase, actions = source_side.step(source.phase, event, self.source_table)
                except IllegalTransition as error:
                    yield SourceStep(f"illegal: {error}", source, illegal=True)
                    continue
                after = replace(source, phase=phase, pending=actions, came_from=source.phase if actions else phase)
                yield SourceStep(f"source: {event}", after, line=(source.phase, event))
        if source.phase is not SPhase.INIT:
            yield self._source_crash(source)

    def _source_events(
        self, source: Source, arrived: frozenset[SEvent], *, fenced: bool, runs_there: bool
    ) -> Iterator[SEvent]:
        if source.phase is SPhase.INIT:
            yield SEvent.START
            return
        yield from sorted(arrived)
        if source.phase is SPhase.COMMITTED and SEvent.TARGET_RUNNING in arrived:
            yield SEvent.TARGET_RUNNING_KEEP
        if source.phase is SPhase.KEEPING:
            yield SEvent.TAKE_BACK
            if not fenced:  # it asks the target whether that has it still
                yield SEvent.ACCEPTED
        yield from (SEvent.CANCELLED, SEvent.FAULT, SEvent.LINK_LOST, SEvent.TIMEOUT)
        if source.phase is SPhase.PRECOPY:
            yield SEvent.COPIED
        if self.links_come_back and source.phase in (SPhase.PRECOPY, SPhase.COMMITTED):
            yield SEvent.LINK_BROKE
        if source.phase is SPhase.FROZEN and source.tasks is Tasks.FROZEN:
            yield SEvent.DUMPED
        if source.phase in FENCEABLE and fenced:
            yield SEvent.KEEP_SOURCE
        if source.phase in (SPhase.IN_DOUBT, SPhase.KEEPING) and runs_there:
            yield SEvent.KEEP_TARGET

    def _source_crash(self, source: Source) -> SourceStep:
        before = self.source_recovers(source.last)
        phase, actions = source_side.step(before, SEvent.RESTARTED, self.source_table)
        thawed = source.tasks is Tasks.FROZEN and not self.freezer_survives_agent
        tasks = Tasks.RUNNING if thawed else source.tasks
        after = replace(source, phase=phase, pending=actions, came_from=before, tasks=tasks)
        return SourceStep("source killed and started", after, line=(before, SEvent.RESTARTED))

    # The target

    def target_steps(self, target: Target, arrived: frozenset[TEvent]) -> Iterator[TargetStep]:
        if target.pending:
            action, *rest = target.pending
            for done in _target_act(replace(target, pending=tuple(rest)), action):
                yield TargetStep(f"target does {action}", done, TO_SOURCE.get(action))
            unwritten = any(action in target_side.JOURNALED for action in target.pending)
            phase = target.came_from if unwritten else target.phase
            yield TargetStep(f"target fails to {action}", replace(target, phase=phase, pending=()))
        else:
            for event in self._target_events(target, arrived):
                try:
                    phase, actions = target_side.step(target.phase, event, self.target_table)
                except IllegalTransition as error:
                    yield TargetStep(f"illegal: {error}", target, illegal=True)
                    continue
                after = replace(target, phase=phase, pending=actions, came_from=target.phase if actions else phase)
                yield TargetStep(f"target: {event}", after, line=(target.phase, event))
        if target.last:
            yield self._target_crash(target)

    def _target_events(self, target: Target, arrived: frozenset[TEvent]) -> Iterator[TEvent]:
        yield from sorted(arrived)
        if target.phase is not TPhase.IDLE:
            yield from (TEvent.FAULT, TEvent.LINK_LOST, TEvent.TIMEOUT)
        if target.phase is TPhase.VERIFIED and target.tasks is Tasks.HELD:
            yield TEvent.RESTORED
        waits = (TPhase.RESERVED, TPhase.RECEIVING, TPhase.COMMIT_LOGGED, TPhase.RESUMED)
        if self.links_come_back and target.phase in waits:
            yield TEvent.LINK_BROKE
        if target.phase is TPhase.RETURNING and target.tasks is Tasks.NONE:
            yield TEvent.COPY_GONE
        if target.phase is TPhase.RESUMED and target.tasks is Tasks.RUNNING:
            yield TEvent.MOVED_ON
        if target.phase is TPhase.COMMIT_LOGGED:
            if target.tasks is Tasks.RUNNING:
                yield TEvent.RELEASED
            elif target.tasks is Tasks.NONE:
                yield TEvent.RELEASE_FAILED
                if not target.ran:
                    yield TEvent.NEVER_RAN

    def _target_crash(self, target: Target) -> TargetStep:
        before = self.target_recovers(target.last)
        phase, actions = target_side.step(before, TEvent.RESTARTED, self.target_table)
        # CRIU loses its caller and kills what it holds; what was released has a monitor of its own.
        tasks = Tasks.NONE if target.tasks is Tasks.HELD else target.tasks
        after = replace(target, phase=phase, pending=actions, came_from=before, tasks=tasks)
        return TargetStep("target killed and started", after, line=(before, TEvent.RESTARTED))


def _source_act(source: Source, action: S) -> Source:
    if action in source_side.JOURNALED:
        phase = source_side.JOURNALED[action]
        return replace(source, disk=source.disk | {phase}, last=str(phase))
    if action is S.FREEZE_AND_DUMP:
        return replace(source, tasks=Tasks.FROZEN)
    if action is S.THAW and source.tasks is Tasks.FROZEN:
        return replace(source, tasks=Tasks.RUNNING)
    if action is S.KILL_COPY:
        return replace(source, tasks=Tasks.NONE)
    return source


def _source_fails(source: Source) -> Source:
    rest = source.pending
    if rest == source_side.ROLL_BACK[1][-len(rest) :]:
        return replace(source, pending=rest[1:])
    unwritten = any(action in source_side.JOURNALED for action in rest)
    return replace(source, phase=source.came_from if unwritten else source.phase, pending=())


def _target_act(target: Target, action: T) -> Iterator[Target]:
    if action in target_side.JOURNALED:
        phase = target_side.JOURNALED[action]
        yield replace(target, disk=target.disk | {phase}, last=str(phase))
    elif action is T.STORE:
        yield replace(target, kept=True)
    elif action is T.VERIFY_AND_RESTORE:
        yield replace(target, tasks=Tasks.HELD, kept=True)
        yield target  # the manifest does not agree, or CRIU refuses: FAULT or TIMEOUT follows
    elif action is T.RELEASE and target.tasks is Tasks.HELD:
        yield replace(target, tasks=Tasks.RUNNING, ran=True)
        yield replace(target, tasks=Tasks.NONE)
    elif action is T.RUN_AGAIN and target.tasks is not Tasks.RUNNING:
        if target.kept:
            yield replace(target, tasks=Tasks.RUNNING, ran=True)
        yield replace(target, tasks=Tasks.NONE)
    elif action is T.KILL_COPY:
        yield replace(target, tasks=Tasks.NONE)
        yield target  # a process hangs in the kernel
    elif action is T.UNDO:
        yield replace(target, tasks=Tasks.NONE, kept=False)
    elif action is T.DROP_KEPT:
        yield replace(target, kept=False)
    else:
        yield target


def broken_invariants(world: World) -> Iterator[str]:
    """The five of the handover, and what they are for, in one global state."""
    source, target = world.source, world.target
    s_disk, t_disk = source.disk, target.disk
    target_has_token = target.has_token and not world.fenced
    if source.has_token and target_has_token:
        yield "1: both sides hold the token"
    if source.tasks is Tasks.RUNNING and target.tasks is Tasks.RUNNING:
        yield "1: two copies run"
    if {TPhase.SETTLED, TPhase.RETURNING} <= t_disk:
        yield "1: the target gives back what has moved on"
    here = source.tasks is not Tasks.NONE
    there = target.tasks is Tasks.RUNNING or (TPhase.COMMIT_LOGGED in t_disk and target.kept)
    if not here and not there:
        yield "2: no copy is left"
    if not here and TPhase.RETURNING in t_disk:
        yield "2: the source threw its copy away, and the target gives its own back"
    if not here and not (TPhase.COMMIT_LOGGED in t_disk and SPhase.DONE in s_disk):
        yield "2: the source threw its copy away without a durable COMMIT_LOGGED there and DONE here"
    # What never ran there is still here as it was; what ran can only be brought up again from what was kept.
    if target_has_token and target.ran and not target.kept and SPhase.DONE not in s_disk:
        yield "2: the target threw away what it kept before the source was done"
    runs_there = (TPhase.RESUMED, TPhase.SETTLED, TPhase.CONFIRMED)
    if target.phase in runs_there and target.tasks is Tasks.NONE and not world.fenced:
        yield f"2: what ran was killed on the target while {target.phase}"
    yield from _sent_before_written(world)
    if TPhase.RETURNED in t_disk and target.tasks is not Tasks.NONE:
        yield "3: RETURNED is on the target's disk, and its copy lives"
    held = (SPhase.SENDING, SPhase.COMMITTED, SPhase.IN_DOUBT, SPhase.KEEPING, SPhase.RETURNING)
    if source.phase in held and source.tasks is Tasks.RUNNING:
        yield f"4: the source's tasks run while {source.phase}"
    if target.tasks is Tasks.RUNNING and TPhase.COMMIT_LOGGED not in t_disk:
        yield "5: the target started on its own"
    if SPhase.COMMITTED in s_disk and source.tasks is Tasks.RUNNING and not TAKEN & s_disk:
        yield "5: the source thawed after COMMITTED"
    if SPhase.TAKEN_BACK in s_disk and TPhase.RETURNED not in t_disk and not world.fenced:
        yield "5: the source took it back without a durable RETURNED there"
    if SPhase.RECLAIMED in s_disk and TPhase.REFUSED not in t_disk and not world.fenced:
        yield "5: the source reclaimed without a durable REFUSED there"


def _sent_before_written(world: World) -> Iterator[str]:
    for message, phase in (
        (TEvent.OFFER, SPhase.PREPARED),
        (TEvent.COMMIT, SPhase.COMMITTED),
        (TEvent.DONE, SPhase.DONE),
        (TEvent.GIVE_BACK, SPhase.RETURNING),
    ):
        if message in world.to_target and phase not in world.source.disk:
            yield f"3: {message} was sent before {phase} was on the source's disk"
    for answer, where in (
        (SEvent.TARGET_PREPARED, TPhase.RESERVED),
        (SEvent.TARGET_RESUMED, TPhase.RESERVED),
        (SEvent.TARGET_READY, TPhase.RESTORED_HELD),
        (SEvent.TARGET_RUNNING, TPhase.COMMIT_LOGGED),
        (SEvent.TARGET_REFUSED, TPhase.REFUSED),
        (SEvent.TARGET_RETURNED, TPhase.RETURNED),
    ):
        if answer in world.to_source and where not in world.target.disk:
            yield f"3: {answer} was sent before {where} was on the target's disk"
    if SEvent.TARGET_SETTLED in world.to_source and not {TPhase.SETTLED, TPhase.CONFIRMED} & world.target.disk:
        yield "3: settled was sent before that was on the target's disk"


def is_good_end(world: World) -> bool:
    """Settled: one copy runs, where the token is, and the other side has nothing left of the container."""
    source, target = world.source, world.target
    if source.pending or target.pending:
        return False
    if source.phase is SPhase.DONE:
        runs = target.phase is TPhase.CONFIRMED and target.tasks is Tasks.RUNNING
        return runs and source.tasks is Tasks.NONE and not target.kept
    if source.phase is SPhase.TAKEN_BACK and source.tasks is Tasks.RUNNING:
        gone = target.tasks is Tasks.NONE and not target.kept
        return world.fenced or (target.phase is TPhase.RETURNED and gone)
    if source.phase is SPhase.ROLLED_BACK and source.tasks is Tasks.RUNNING:
        return world.fenced or (target.phase in (TPhase.IDLE, TPhase.REFUSED) and target.tasks is Tasks.NONE)
    return False
