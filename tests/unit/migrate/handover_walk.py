"""Every history of the model of handover_model.py, by visiting each state that can be reached, once.

A hundred thousand worlds are made of a few thousand states of two sides. What a side can do is worked out once for all
worlds in which it sees the same, and a world is one number: which state each side is in, and which messages were sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from migrate.machine import Event as SEvent
from migrate.machine import Phase as SPhase
from migrate.target_machine import Event as TEvent
from migrate.target_machine import Phase as TPhase
from tests.unit.migrate.handover_model import (
    FENCEABLE,
    Model,
    Source,
    SourceStep,
    Target,
    TargetStep,
    Tasks,
    World,
    broken_invariants,
    is_good_end,
)

TO_TARGET_BIT = {event: 1 << number for number, event in enumerate(TEvent)}
TO_SOURCE_BIT = {event: 1 << 32 + number for number, event in enumerate(SEvent)}
FENCED = 1 << 64
# Whether the target's copy runs is all that a source can see of the state there.
RUNS_THERE, TARGET_SHIFT, SOURCE_SHIFT = 1 << 65, 66, 82
SIDE_BITS = 16

TO_TARGET, TO_SOURCE = sum(TO_TARGET_BIT.values()), sum(TO_SOURCE_BIT.values())
TARGET = ((1 << SIDE_BITS) - 1) << TARGET_SHIFT | RUNS_THERE
SOURCE = ((1 << SIDE_BITS) - 1) << SOURCE_SHIFT
SOURCE_SEES = SOURCE | TO_SOURCE | FENCED | RUNS_THERE
TARGET_SEES = TARGET | TO_TARGET

Side = TypeVar("Side", Source, Target)
AnyStep = TypeVar("AnyStep", SourceStep, TargetStep)


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

    ``until`` ends the walk at the first violation whose text begins so; what is stuck is not looked for then.
    """
    found = Found()
    walk = _Walk(model, found)
    waiting = [walk.start()]
    parents: dict[int, tuple[int, str] | None] = {waiting[0]: None}
    edges: dict[int, list[int]] = {}
    for world in waiting:
        for rule in walk.broken(world):
            found.violations.setdefault(rule, _history(parents, world))
            if until is not None and rule.startswith(until):
                return found
        steps = walk.steps(world)
        edges[world] = [after for after, _name in steps]
        for after, name in steps:
            if after not in parents:
                parents[after] = (world, name)
                waiting.append(after)
    found.states = len(waiting)
    if until is None:
        good = [world for world in waiting if walk.is_good_end(world)]
        found.ends = len(good)
        found.stuck = [walk.world(world) for world in _not_leading_to(good, edges)]
    return found


def _not_leading_to(good: list[int], edges: dict[int, list[int]]) -> list[int]:
    before: dict[int, list[int]] = {world: [] for world in edges}
    for world, afters in edges.items():
        for after in afters:
            before[after].append(world)
    leading, waiting = set(good), list(good)
    for world in waiting:
        new = [earlier for earlier in before[world] if earlier not in leading]
        leading.update(new)
        waiting += new
    return [world for world in edges if world not in leading]


def _history(parents: dict[int, tuple[int, str] | None], world: int) -> list[str]:
    steps: list[str] = []
    link = parents[world]
    while link is not None:
        before, name = link
        steps.append(name)
        link = parents[before]
    return steps[::-1]


@functools.cache
def _sent_to_target(bits: int) -> frozenset[TEvent]:
    return frozenset(event for event, bit in TO_TARGET_BIT.items() if bits & bit)


@functools.cache
def _sent_to_source(bits: int) -> frozenset[SEvent]:
    return frozenset(event for event, bit in TO_SOURCE_BIT.items() if bits & bit)


class _States(Generic[Side]):
    """Numbers for the states of one side, in the bits from ``shift`` on."""

    def __init__(self, shift: int) -> None:
        self._shift = shift
        self._numbers: dict[tuple[object, ...], int] = {}
        self._states: list[Side] = []
        self._bare: list[int] = []

    def bits(self, state: Side) -> int:
        key = tuple(vars(state).values())
        if key not in self._numbers:
            number = self._numbers[key] = len(self._states)
            assert number < 1 << SIDE_BITS
            self._states.append(state)
            self._bare.append(0)
            bare = replace(state, pending=(), last="")
            self._bare[number] = self.bits(bare)
        return self._numbers[key] << self._shift

    def of(self, world: int) -> Side:
        return self._states[self._number(world)]

    def bare(self, world: int) -> int:
        """The bits of the same state without what it has in mind."""
        return self._bare[self._number(world)]

    def _number(self, world: int) -> int:
        return world >> self._shift & (1 << SIDE_BITS) - 1


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """What one side can do next: bits that take the place of its own in a world's number, and a name. Of steps that
    lead to the same world one is here, and none that leads nowhere."""

    taken: tuple[tuple[int, str], ...]
    happened: int
    illegal: list[str]
    """What can happen, and has no line in the table."""


class _Walk:
    def __init__(self, model: Model, found: Found) -> None:
        self._model = model
        self._found = found
        self._sources = _States[Source](SOURCE_SHIFT)
        self._targets = _States[Target](TARGET_SHIFT)
        self._source_steps: dict[int, _Steps] = {}
        self._target_steps: dict[int, _Steps] = {}
        self._checked: set[int] = set()
        self._is_good: dict[int, bool] = {}

    def start(self) -> int:
        return self._sources.bits(Source()) | self._target_bits(Target())

    def world(self, number: int) -> World:
        return World(
            source=self._sources.of(number),
            target=self._targets.of(number),
            fenced=bool(number & FENCED),
            to_target=_sent_to_target(number & TO_TARGET),
            to_source=_sent_to_source(number & TO_SOURCE),
        )

    def steps(self, number: int) -> list[tuple[int, str]]:
        """The worlds that come next, and how."""
        source = self._of_source(number)
        rest = number & ~SOURCE
        afters = [(rest | bits, name) for bits, name in source.taken]
        self._found.steps += source.happened
        if number & FENCED:
            return afters
        target = self._of_target(number)
        rest = number & ~TARGET
        afters += [(rest | bits, name) for bits, name in target.taken]
        self._found.steps += target.happened
        if self._model.fencing and self._sources.of(number).phase in FENCEABLE:
            # It does nothing any more, and nothing it said arrives any more.
            cut_off = replace(self._targets.of(number), pending=(), tasks=Tasks.NONE, kept=False)
            afters.append((rest & ~TO_SOURCE | FENCED | self._target_bits(cut_off), "fence target"))
            self._found.steps += 1
        return afters

    def broken(self, number: int) -> list[str]:
        """Rules, and tables that have no line for what happens here."""
        illegal = self._of_source(number).illegal
        if not number & FENCED:
            illegal = illegal + self._of_target(number).illegal
        # No rule is about what a side has in mind: worlds that differ in nothing else are one to them.
        bare = number & ~(SOURCE | TARGET) | self._sources.bare(number) | self._targets.bare(number)
        if bare in self._checked:
            return illegal
        self._checked.add(bare)
        return illegal + list(broken_invariants(self.world(bare)))

    def is_good_end(self, number: int) -> bool:
        settled = number & (SOURCE | TARGET | FENCED)  # what was sent says nothing about that
        if settled not in self._is_good:
            self._is_good[settled] = is_good_end(self.world(settled))
        return self._is_good[settled]

    def _of_source(self, number: int) -> _Steps:
        seen = number & SOURCE_SEES
        if seen not in self._source_steps:
            world = self.world(number)
            steps = self._model.source_steps(
                world.source, world.to_source, fenced=world.fenced, runs_there=bool(number & RUNS_THERE)
            )
            self._source_steps[seen] = _worked_out(steps, number & SOURCE, self._source_after, self._found.used_source)
        return self._source_steps[seen]

    def _of_target(self, number: int) -> _Steps:
        seen = number & TARGET_SEES
        if seen not in self._target_steps:
            world = self.world(number)
            steps = self._model.target_steps(world.target, world.to_target)
            self._target_steps[seen] = _worked_out(steps, number & TARGET, self._target_after, self._found.used_target)
        return self._target_steps[seen]

    def _source_after(self, step: SourceStep) -> int:
        return self._sources.bits(step.after) | (TO_TARGET_BIT[step.sent] if step.sent else 0)

    def _target_after(self, step: TargetStep) -> int:
        return self._target_bits(step.after) | (TO_SOURCE_BIT[step.sent] if step.sent else 0)

    def _target_bits(self, target: Target) -> int:
        return self._targets.bits(target) | (RUNS_THERE if target.tasks is Tasks.RUNNING else 0)


def _worked_out(steps: Iterator[AnyStep], own: int, bits_of: Callable[[AnyStep], int], used: set[Any]) -> _Steps:
    taken: dict[int, str] = {}
    happened, illegal = 0, []
    for step in steps:
        if step.illegal:
            illegal.append(step.name)
            continue
        happened += 1
        taken.setdefault(bits_of(step), step.name)
        if step.line is not None:
            used.add(step.line)
    taken.pop(own, None)
    return _Steps(taken=tuple(taken.items()), happened=happened, illegal=illegal)
