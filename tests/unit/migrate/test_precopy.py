"""The convergence controller against simulated writers whose real curve it does not know."""

import math
import random
from dataclasses import dataclass, field

import pytest

from migrate.costs import MIB, SHORT_ROUND_S, DirtyCurve, DirtySample, FixedCosts
from migrate.precopy import Budget, Decision, Kind, Precopy, Round


@dataclass
class World:
    """A container with a writer, a link, and a driver that does what the controller says."""

    curve: DirtyCurve
    rate_Bps: float
    memory_bytes: int
    cpus: float = 1.0
    slows: bool = True
    noise: float = 0.0
    seed: int = 0
    speed: float = 1.0
    looked_at_s: tuple[float, ...] = ()
    rounds: list[Round] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def move(self, budget: Budget, costs: FixedCosts) -> Decision:
        chance = random.Random(self.seed)
        samples = [DirtySample(seconds=t, dirty_bytes=self.dirty(t)) for t in self.looked_at_s]
        controller = Precopy(budget, costs, samples=samples)
        send, kept, last = float(self.memory_bytes), 0.0, 0.0
        for number in range(1000):
            seconds = max(send / self.rate_Bps, costs.round_s) * (1 + self.noise * chance.uniform(-1, 1))
            dirty = self.dirty(seconds) * (1 + self.noise * chance.uniform(-1, 1))
            # What a random writer of a working set hits in both of two rounds.
            hot = 0.0
            if number and self.curve.hot_bytes:
                hot = min(dirty, last) * min(1.0, last / self.curve.hot_bytes)
            done = Round(
                seconds=seconds,
                page_bytes=int(send),
                wire_bytes=int(send),
                dirty_bytes=int(dirty),
                hot_bytes=int(hot),
                pending_bytes=int(max(dirty, kept + max(0.0, dirty - kept))),
                cpu_s=self.cpus * seconds,
            )
            self.rounds.append(done)
            decision = controller.decide(done)
            self.decisions.append(decision)
            if decision.kind in (Kind.FREEZE, Kind.STOP):
                return decision
            if decision.cpus is not None:
                self.cpus, share = decision.cpus, decision.cpus / self.cpus
                self.speed *= share if self.slows else 1.0
            kept = float(done.hot_bytes) if decision.defer_hot else 0.0
            send, last = done.left_bytes - kept, dirty
        raise AssertionError("it never ends")

    def dirty(self, seconds: float) -> float:
        return min(float(self.memory_bytes), self.curve.dirty_bytes(seconds * self.speed))

    def blackout_ms(self, costs: FixedCosts) -> float:
        """What a freeze after the last round really takes."""
        seconds = self.rounds[-1].seconds
        again = self.dirty(seconds + costs.scan_to_freeze_s) - self.dirty(seconds)
        return costs.blackout_ms(self.rounds[-1].left_bytes + again, self.rate_Bps)


def random_world(seed: int, *, noise: float) -> World:
    chance = random.Random(seed)
    memory = chance.choice([64, 256, 1024, 4096]) * MIB
    return World(
        curve=DirtyCurve(
            hot_bytes=memory * chance.choice([0, 0.01, 0.1, 0.5]) * chance.random(),
            tau_s=10 ** chance.uniform(-2, 1),
            cold_Bps=chance.choice([0, 1, 20, 200, 1500]) * MIB * chance.random(),
        ),
        rate_Bps=10 ** chance.uniform(7, 9.3),
        memory_bytes=memory,
        cpus=chance.uniform(0.1, 4),
        slows=chance.random() < 0.8,
        noise=noise,
        seed=seed,
    )


COSTS = FixedCosts(freeze_ms=25, restore_ms=30)


@pytest.mark.parametrize("seed", range(80))
def test_whatever_the_writer_it_ends_and_predicts_what_the_blackout_will_be(seed: int) -> None:
    world = random_world(seed, noise=0.1)
    budget = Budget(downtime_limit_ms=random.Random(seed).choice([60, 100, 300, 2000]))
    last = world.move(budget, COSTS)
    real_ms = world.blackout_ms(COSTS)
    assert len(world.rounds) <= budget.max_rounds
    assert last.blackout_ms == pytest.approx(real_ms, rel=0.25, abs=10)
    if last.kind is Kind.FREEZE:
        assert real_ms <= budget.downtime_limit_ms * 1.25


@pytest.mark.parametrize("seed", range(80))
def test_every_round_that_was_run_below_the_limit_has_paid(seed: int) -> None:
    world = random_world(seed, noise=0.0)
    budget = Budget(throttle=False)
    world.move(budget, COSTS)
    for before, after, done in zip(world.decisions, world.decisions[1:], world.rounds[1:], strict=False):
        if before.blackout_ms <= budget.downtime_limit_ms:
            gained_ms = before.blackout_ms - after.blackout_ms
            # The writer is not known after one round, so one wrong guess of a straight line is allowed for.
            known = world.decisions.index(before) >= 1
            # A short one costs nobody anything; it must not make things worse.
            wanted_ms = 0.1 * done.seconds * 1000 if done.seconds > SHORT_ROUND_S else 0.0
            assert gained_ms >= (wanted_ms if known else -0.05 * before.blackout_ms)


@pytest.mark.parametrize("seed", range(80))
def test_no_round_is_left_out_that_would_have_halved_the_blackout_cheaply(seed: int) -> None:
    world = random_world(seed, noise=0.0)
    last = world.move(Budget(throttle=False), COSTS)
    left = world.rounds[-1].left_bytes
    seconds = max(left / world.rate_Bps, COSTS.round_s)
    better_ms = COSTS.blackout_ms(world.dirty(seconds), world.rate_Bps)
    gain_ms = last.blackout_ms - better_ms
    assert gain_ms < max(0.5 * last.blackout_ms, 0.6 * seconds * 1000) or len(world.rounds) == 30


def test_a_quiet_container_of_any_size_needs_one_round_after_the_first() -> None:
    for memory in (64 * MIB, 1024 * MIB, 8192 * MIB):
        world = World(curve=DirtyCurve(cold_Bps=20 * MIB), rate_Bps=1.2e9, memory_bytes=memory)
        last = world.move(Budget(), COSTS)
        assert last.kind is Kind.FREEZE
        assert len(world.rounds) <= 3
        assert last.blackout_ms < 60


def test_a_writer_faster_than_the_link_is_slowed_until_the_limit_is_met() -> None:
    world = World(curve=DirtyCurve(cold_Bps=400 * MIB), rate_Bps=100e6, memory_bytes=8192 * MIB)
    last = world.move(Budget(), COSTS)
    assert Kind.THROTTLE in [decision.kind for decision in world.decisions]
    assert last.kind is Kind.FREEZE
    assert 0.1 <= world.cpus < 0.25


def test_a_look_at_the_writer_beforehand_saves_most_of_the_traffic() -> None:
    def traffic(looked_at_s: tuple[float, ...]) -> int:
        curve = DirtyCurve(cold_Bps=400 * MIB)
        world = World(curve=curve, rate_Bps=100e6, memory_bytes=8192 * MIB, looked_at_s=looked_at_s)
        assert world.move(Budget(), COSTS).kind is Kind.FREEZE
        return sum(done.page_bytes for done in world.rounds)

    # In 85 s of the first round everything becomes dirty, which says nothing about how fast.
    assert traffic((0.05, 0.2, 0.5)) < 0.6 * traffic(())


def test_a_writer_that_no_quota_slows_is_noticed() -> None:
    curve = DirtyCurve(hot_bytes=1024 * MIB, tau_s=3)
    world = World(curve=curve, rate_Bps=200e6, memory_bytes=8192 * MIB, slows=False)
    last = world.move(Budget(on_timeout="postcopy"), COSTS)
    assert last.kind is Kind.STOP
    assert last.action == "postcopy"
    assert "slowing the container down does not slow its writing" in last.reasons
    assert len(world.rounds) < 8


@pytest.mark.parametrize("action", ["abort", "stopcopy", "postcopy"])
def test_without_throttling_what_the_operator_said_is_done(action: str) -> None:
    world = World(curve=DirtyCurve(cold_Bps=400 * MIB), rate_Bps=100e6, memory_bytes=8192 * MIB)
    last = world.move(Budget(throttle=False, on_timeout=action), COSTS)  # type: ignore[arg-type]
    assert (last.kind, last.action) == (Kind.STOP, action)
    assert "throttling is off" in last.reasons[-1]


def test_a_limit_below_the_fixed_costs_is_said_to_be_so_and_nothing_is_slowed() -> None:
    world = World(curve=DirtyCurve(cold_Bps=20 * MIB), rate_Bps=1e9, memory_bytes=256 * MIB)
    last = world.move(Budget(downtime_limit_ms=10), COSTS)
    assert (last.kind, last.action) == (Kind.STOP, "stopcopy")
    assert last.reasons[-1] == "the fixed costs alone are 55 ms"
    assert Kind.THROTTLE not in [decision.kind for decision in world.decisions]


def test_rounds_time_and_bytes_are_limits() -> None:
    def stopped(budget: Budget) -> World:
        world = World(curve=DirtyCurve(cold_Bps=80e6), rate_Bps=100e6, memory_bytes=1024 * MIB)
        assert world.move(budget, COSTS).kind is Kind.STOP
        return world

    assert len(stopped(Budget(max_rounds=3)).rounds) == 3
    assert sum(done.seconds for done in stopped(Budget(max_time_s=15)).rounds) <= 15
    assert sum(done.wire_bytes for done in stopped(Budget(max_bytes=1.5e9)).rounds) <= 1.5e9


def test_a_limit_that_is_met_when_the_rounds_are_over_is_a_freeze() -> None:
    world = World(curve=DirtyCurve(cold_Bps=MIB), rate_Bps=1e9, memory_bytes=1024 * MIB)
    assert world.move(Budget(max_rounds=1), COSTS).kind is Kind.FREEZE


def test_pages_that_stay_hot_are_sent_once_and_kept_for_the_freeze() -> None:
    # 200 MiB, all of it rewritten every few milliseconds: sending it again is traffic without effect.
    curve = DirtyCurve(hot_bytes=200 * MIB, tau_s=0.004, cold_Bps=5 * MIB)
    world = World(curve=curve, rate_Bps=200e6, memory_bytes=2048 * MIB)
    last = world.move(Budget(downtime_limit_ms=1500), COSTS)
    assert last.kind is Kind.FREEZE
    assert sum(done.page_bytes for done in world.rounds[2:]) < 100 * MIB


def test_hybrid_switches_early_and_whatever_is_dirty() -> None:
    world = World(curve=DirtyCurve(cold_Bps=400 * MIB), rate_Bps=100e6, memory_bytes=1024 * MIB)
    last = world.move(Budget(hybrid=True, downtime_limit_ms=100), COSTS)
    assert last.kind is Kind.FREEZE
    assert last.blackout_ms == 55
    assert len(world.rounds) <= 3


def test_every_decision_tells_its_reasons_in_words() -> None:
    world = World(curve=DirtyCurve(cold_Bps=20 * MIB), rate_Bps=1e9, memory_bytes=256 * MIB)
    last = world.move(Budget(), COSTS)
    assert last.reasons[0].startswith("a freeze now is predicted to take ")
    assert last.reasons[-1] == "one more round gains less than it costs"


@pytest.mark.parametrize("bad", [{"downtime_limit_ms": 0}, {"max_rounds": 0}, {"max_time_s": -1}, {"min_cpu": 0}])
def test_a_budget_that_allows_nothing_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Budget(**bad)  # type: ignore[arg-type]


def test_a_round_in_which_nothing_was_sent_does_not_change_the_rate() -> None:
    controller = Precopy(Budget(), COSTS, rate_Bps=5e8)
    controller.decide(Round(seconds=0.02, page_bytes=0, wire_bytes=0, dirty_bytes=0))
    assert controller.rate_Bps == 5e8
    assert math.isfinite(controller.decide(Round(seconds=0.02, page_bytes=0, wire_bytes=0, dirty_bytes=0)).remaining_s)
