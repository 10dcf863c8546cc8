from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from migrate.costs import GIB, MIB, DirtyCurve, FixedCosts
from migrate.plan import MODES, MoveFacts, Prediction, choose, choose_mode, predict, predict_all
from migrate.precopy import Budget, Kind, Precopy, Round
from runtime.errors import BadInput

COSTS = FixedCosts(freeze_ms=25, restore_ms=30)
FACTS = MoveFacts(memory_bytes=GIB, rate_Bps=1.2e9, curve=DirtyCurve(cold_Bps=20 * MIB), costs=COSTS)


def of(facts: MoveFacts) -> dict[str, Prediction]:
    return {found.mode: found for found in predict_all(facts)}


@pytest.mark.parametrize("mode", MODES)
def test_what_was_asked_for_is_done(mode: str) -> None:
    assert choose_mode(mode).mode == mode
    assert choose(mode, FACTS, allow_postcopy=True).reason == "asked for"


def test_an_unknown_mode_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadInput) as caught:
        choose_mode("teleport")
    assert "stopcopy" in caught.value.hint


def test_auto_without_facts_says_why() -> None:
    assert choose_mode("auto").reason


@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
def test_modes_that_can_lose_the_container_need_consent(mode: str) -> None:
    with pytest.raises(BadInput) as caught:
        choose(mode, FACTS)
    assert "--allow-postcopy" in caught.value.hint


def test_precopy_is_taken_when_it_meets_the_limit() -> None:
    plan = choose("auto", FACTS, allow_postcopy=True)
    assert plan.mode == "precopy"
    assert "within the limit of 300 ms" in plan.reason
    assert {found.mode for found in plan.predictions} == set(MODES)


def test_memory_that_is_nothing_is_copied_once() -> None:
    assert choose("auto", replace(FACTS, memory_bytes=2 * MIB)).mode == "diskless"


def test_a_writer_faster_than_the_link_needs_the_switch_first() -> None:
    facts = replace(FACTS, rate_Bps=100e6, curve=DirtyCurve(cold_Bps=200 * MIB))
    assert not predict(facts, "precopy").converges
    assert choose("auto", facts, allow_postcopy=True).mode in ("hybrid", "postcopy")
    plan = choose("auto", facts)
    assert plan.mode in ("precopy", "diskless")
    assert "no mode that is allowed meets 300 ms" in plan.reason


def test_only_rounds_keep_the_blackout_from_growing_with_memory() -> None:
    small, large = of(replace(FACTS, memory_bytes=64 * MIB)), of(replace(FACTS, memory_bytes=4 * GIB))
    for mode in ("precopy", "hybrid", "postcopy"):
        assert large[mode].blackout_ms - small[mode].blackout_ms < 20 * 4
    for mode in ("stopcopy", "diskless"):
        assert large[mode].blackout_ms > 10 * small[mode].blackout_ms


def test_stop_and_copy_is_the_slowest_and_postcopy_sends_each_page_once() -> None:
    found = of(FACTS)
    assert found["stopcopy"].blackout_ms == max(each.blackout_ms for each in found.values())
    assert found["postcopy"].sent_bytes == GIB
    assert found["postcopy"].complete_ms > found["postcopy"].total_ms
    assert found["precopy"].sent_bytes >= GIB


def test_shared_memory_is_sent_in_every_blackout() -> None:
    more = of(replace(FACTS, shared_bytes=GIB))
    for mode, found in of(FACTS).items():
        assert more[mode].blackout_ms > found.blackout_ms + 800


def test_an_eager_restore_counts_all_memory_again() -> None:
    lazy, eager = predict(FACTS, "precopy"), predict(replace(FACTS, lazy_restore=False), "precopy")
    assert eager.blackout_ms >= lazy.blackout_ms + GIB / FACTS.speeds.restore_Bps * 1000


@settings(deadline=None)
@given(
    memory=st.integers(1 * MIB, 64 * GIB),
    rate=st.floats(1e6, 1e10),
    hot=st.floats(0, 8 * GIB),
    tau=st.floats(0.001, 100),
    cold=st.floats(0, 1e10),
    limit=st.floats(1, 10000),
    allowed=st.booleans(),
)
def test_whatever_the_facts_there_is_an_answer_that_the_operator_allows(
    memory: int, rate: float, hot: float, tau: float, cold: float, limit: float, allowed: bool
) -> None:
    curve = DirtyCurve(hot_bytes=hot, tau_s=tau, cold_Bps=cold)
    facts = MoveFacts(memory_bytes=memory, rate_Bps=rate, curve=curve)
    plan = choose("auto", facts, downtime_limit_ms=limit, allow_postcopy=allowed)
    assert allowed or plan.mode not in ("postcopy", "hybrid")
    for found in plan.predictions:
        assert 0 < found.blackout_ms <= found.total_ms <= found.complete_ms
        assert found.rounds <= 30


@settings(deadline=None)
@given(memory=st.integers(16 * MIB, 8 * GIB), rate=st.floats(1e7, 3e9), cold=st.floats(0, 5e8))
def test_the_plan_is_what_the_controller_then_does(memory: int, rate: float, cold: float) -> None:
    # Beyond, each further round is nearly not worth it, and a rounding error decides.
    assume(cold < 0.6 * rate)
    curve = DirtyCurve(cold_Bps=cold)
    facts = MoveFacts(memory_bytes=memory, rate_Bps=rate, curve=curve, costs=COSTS)
    planned = predict(facts, "precopy")
    controller = Precopy(Budget(throttle=False), COSTS)
    send = float(memory)
    while True:
        seconds = max(send / rate, COSTS.round_s)
        dirty = min(float(memory), curve.dirty_bytes(seconds))
        done = Round(seconds=seconds, page_bytes=int(send), wire_bytes=int(send), dirty_bytes=int(dirty))
        decision = controller.decide(done)
        if decision.kind is not Kind.CONTINUE:
            break
        send = dirty
    walked_ms = memory / GIB * facts.speeds.frozen_s_per_GiB * 1000
    assert abs(controller.rounds - planned.rounds) <= 2 + planned.rounds / 4
    assert decision.blackout_ms + walked_ms == pytest.approx(planned.blackout_ms, rel=0.35, abs=20)


def test_a_link_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError):
        replace(FACTS, rate_Bps=0)


def test_a_limit_on_bandwidth_lengthens_what_happens_before_the_blackout_and_not_the_blackout_of_one_go() -> None:
    free, limited = of(FACTS), of(replace(FACTS, bandwidth_Bps=100e6))
    assert limited["precopy"].total_ms > 5 * free["precopy"].total_ms
    assert limited["precopy"].blackout_ms >= free["precopy"].blackout_ms
    for mode in ("stopcopy", "diskless", "postcopy"):
        assert limited[mode] == free[mode]


def test_a_bandwidth_above_the_links_changes_nothing() -> None:
    assert of(replace(FACTS, bandwidth_Bps=1e12)) == of(FACTS)
