import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.costs import MIB, DirtyCurve, DirtySample, FixedCosts, blended_rate, fit_curve

TIMES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


def sampled(curve: DirtyCurve, times: tuple[float, ...] = TIMES_S) -> list[DirtySample]:
    return [DirtySample(seconds=t, dirty_bytes=curve.dirty_bytes(t)) for t in times]


@settings(deadline=None)
@given(hot=st.floats(1, 2000), tau=st.floats(0.02, 5), cold=st.floats(0, 500), at=st.floats(0.05, 2.0))
def test_a_curve_seen_at_six_moments_is_known_in_between(hot: float, tau: float, cold: float, at: float) -> None:
    curve = DirtyCurve(hot_bytes=hot * MIB, tau_s=tau, cold_Bps=cold * MIB)
    assert fit_curve(sampled(curve)).dirty_bytes(at) == pytest.approx(curve.dirty_bytes(at), rel=0.1, abs=0.2 * MIB)


def test_neither_part_of_a_fit_is_ever_negative() -> None:
    # Dirtier per second the longer one waits: no curve of the family does that.
    samples = [DirtySample(seconds=t, dirty_bytes=t * t * 100 * MIB) for t in TIMES_S]
    curve = fit_curve(samples)
    assert curve.hot_bytes >= 0
    assert curve.cold_Bps >= 0


def test_one_sample_is_a_straight_line_through_it() -> None:
    curve = fit_curve([DirtySample(seconds=2, dirty_bytes=40 * MIB)])
    assert curve.dirty_bytes(1) == pytest.approx(20 * MIB)


def test_one_sample_scales_what_was_known_before() -> None:
    prior = DirtyCurve(hot_bytes=100 * MIB, tau_s=0.5, cold_Bps=10 * MIB)
    curve = fit_curve([DirtySample(seconds=1, dirty_bytes=prior.dirty_bytes(1) / 2)], prior)
    assert curve.dirty_bytes(0.1) == pytest.approx(prior.dirty_bytes(0.1) / 2)


def test_without_samples_there_is_only_what_was_known_before() -> None:
    prior = DirtyCurve(cold_Bps=MIB)
    assert fit_curve([], prior) is prior
    with pytest.raises(ValueError):
        fit_curve([])


def test_a_slowed_writer_gets_as_far_in_twice_the_time() -> None:
    curve = DirtyCurve(hot_bytes=100 * MIB, tau_s=0.5, cold_Bps=10 * MIB)
    assert curve.slowed(0.5).dirty_bytes(2) == pytest.approx(curve.dirty_bytes(1))


def test_the_blackout_is_fixed_costs_and_what_is_sent_in_it() -> None:
    costs = FixedCosts(freeze_ms=20, restore_ms=30, state_bytes=1_000_000)
    assert costs.blackout_ms(9_000_000, rate_Bps=1e9) == pytest.approx(60)


@pytest.mark.parametrize(("seconds", "dirty"), [(0, 1), (-1, 1), (1, -1)])
def test_a_sample_of_no_time_is_refused(seconds: float, dirty: float) -> None:
    with pytest.raises(ValueError):
        DirtySample(seconds=seconds, dirty_bytes=dirty)


def test_a_small_round_hardly_changes_the_rate_and_a_large_one_does() -> None:
    assert blended_rate(None, 10 * MIB, 0.1) == 100 * MIB
    assert blended_rate(1e9, 0, 0.1) == 1e9
    small, large = blended_rate(1e9, 4096, 0.1), blended_rate(1e9, 50_000_000, 0.1)
    assert small == pytest.approx(1e9, rel=0.01)
    assert large == pytest.approx(7.5e8)
