"""The loop of rounds, with memory that a formula dirties and a clock that a link moves."""

from dataclasses import dataclass, field

import pytest

from migrate.errors import NotConverging
from migrate.observe import Event, RoundEnded, Warning
from migrate.precopy import Budget, Kind
from migrate.rounds import Gauges, Rounds, sample_dirtying, untracked_warning
from runtime.errors import MissingFeature

MIB = 1 << 20


@dataclass
class World:
    """``memory`` bytes, written at ``dirty_Bps`` within a working set of ``hot`` bytes, over a link of ``link_Bps``."""

    memory: int
    dirty_Bps: float
    hot: int
    link_Bps: float
    now: float = 0.0
    cpus: float = 1.0
    scanned_at: float | None = None
    dirty_bytes: int = 0
    hot_bytes: int = 0
    pending_bytes: int = 0
    sent_bytes: int = 0
    cpu_s: float = 0.0
    slowed_to: list[float] = field(default_factory=list)
    lifted: int = 0
    deferred: int = 0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.cpu_s += seconds * self.cpus

    def scan(self) -> None:
        self.pass_time(0.001)
        before = self.dirty_bytes
        if self.scanned_at is None:
            self.dirty_bytes = self.memory
        else:
            self.dirty_bytes = int(min(self.hot, (self.now - self.scanned_at) * self.dirty_Bps * self.cpus))
        self.hot_bytes = min(before, self.dirty_bytes) if before < self.memory else 0
        self.pending_bytes = min(self.memory, max(self.pending_bytes, self.dirty_bytes))
        self.scanned_at = self.now

    def send(self, *, defer_hot: bool = False) -> int:
        size = self.pending_bytes - (self.hot_bytes if defer_hot else 0)
        self.deferred += defer_hot
        self.pass_time(size / self.link_Bps)
        self.pending_bytes -= size
        self.sent_bytes += size
        return size

    def slow_to(self, cpus: float) -> None:
        self.cpus = cpus
        self.slowed_to.append(cpus)

    def still_here(self) -> None:
        pass

    def lift(self) -> None:
        self.lifted += 1
        self.cpus = 1.0


class Told:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)


def rounds_in(world: World, budget: Budget, told: Told | None = None) -> Rounds:
    gauges = Gauges(
        page_wire_bytes=lambda: world.sent_bytes,
        cpu_s=lambda: world.cpu_s,
        now=lambda: world.now,
        sleep=world.pass_time,
    )
    return Rounds(world, gauges, world, told or Told(), budget)


def test_memory_that_is_seldom_written_is_frozen_after_few_rounds_and_each_is_told() -> None:
    world, told = World(1024 * MIB, 20 * MIB, 512 * MIB, 1000 * MIB), Told()
    rounds = rounds_in(world, Budget(downtime_limit_ms=120), told)
    decision = rounds.run()
    assert decision.kind is Kind.FREEZE
    assert 1 <= rounds.count <= 4
    ended = [event for event in told.events if isinstance(event, RoundEnded)]
    assert [event.round for event in ended] == list(range(1, rounds.count + 1))
    assert ended[-1].decision == "freeze"
    assert ended[0].sent_bytes == 1024 * MIB
    assert not world.slowed_to


def test_one_that_writes_faster_than_the_link_is_slowed_down_and_let_go_before_the_freeze() -> None:
    world, told = World(2048 * MIB, 900 * MIB, 2000 * MIB, 300 * MIB), Told()
    rounds = rounds_in(world, Budget(downtime_limit_ms=300), told)
    rounds.run()
    assert world.slowed_to
    assert rounds.throttled_cpus == world.slowed_to[-1]
    assert world.lifted
    assert world.cpus == 1.0


def test_without_throttle_it_is_frozen_nevertheless_or_left_alone_as_the_operator_wants() -> None:
    def world() -> World:
        return World(2048 * MIB, 900 * MIB, 2000 * MIB, 300 * MIB)

    frozen = rounds_in(world(), Budget(throttle=False, on_timeout="stopcopy")).run()
    assert (frozen.kind, frozen.action) == (Kind.STOP, "stopcopy")
    with pytest.raises(NotConverging, match="limit"):
        rounds_in(world(), Budget(throttle=False, on_timeout="abort")).run()


@pytest.mark.parametrize(
    "budget", [Budget(max_rounds=1, throttle=False), Budget(max_time_s=0.1, throttle=False), Budget(max_bytes=MIB)]
)
def test_a_spent_budget_ends_the_rounds(budget: Budget) -> None:
    rounds = rounds_in(World(2048 * MIB, 900 * MIB, 2000 * MIB, 300 * MIB), budget)
    assert rounds.run().kind is Kind.STOP
    assert rounds.count == 1


def test_a_container_that_can_not_be_slowed_down_moves_all_the_same_and_it_is_said() -> None:
    class Unslowable(World):
        def slow_to(self, cpus: float) -> None:
            raise MissingFeature("no cpu controller")

    world, told = Unslowable(2048 * MIB, 900 * MIB, 2000 * MIB, 300 * MIB), Told()
    rounds = rounds_in(world, Budget(), told)
    assert rounds.run().kind is Kind.STOP
    assert any(isinstance(event, Warning) and "no cpu controller" in event.what for event in told.events)
    assert rounds.throttled_cpus is None


def test_the_throttle_is_lifted_when_the_link_breaks() -> None:
    class Broken(World):
        def send(self, *, defer_hot: bool = False) -> int:
            raise ConnectionError("gone")

    world = Broken(MIB, 0, 0, MIB)
    with pytest.raises(ConnectionError):
        rounds_in(world, Budget()).run()
    assert world.lifted


def test_samples_are_taken_before_anything_is_sent() -> None:
    world = World(1024 * MIB, 100 * MIB, 512 * MIB, 1000 * MIB)
    gauges = Gauges(page_wire_bytes=lambda: 0, cpu_s=lambda: None, now=lambda: world.now, sleep=world.pass_time)
    samples = sample_dirtying(world, gauges, (0.01, 0.1))
    assert [round(sample.dirty_bytes / MIB) for sample in samples] == [1, 10]
    assert world.sent_bytes == 0
    assert world.pending_bytes == world.memory


def test_processes_that_could_not_be_tracked_are_told_once() -> None:
    assert untracked_warning({}) is None
    warning = untracked_warning({7: "it is a 32-bit program", 9: "traced"})
    assert warning is not None
    assert warning.what == "the memory of process 7 and 1 more is copied in the blackout: it is a 32-bit program"
