"""Intervals, splits, survival and rates against published numbers, closed forms and enumeration."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.interval import (
    GroupLayout,
    RateEstimate,
    Split,
    Tier,
    daly_interval_s,
    ettr,
    expected_split,
    minimise,
    nested_steps,
    optimal_interval_s,
    survival_after,
    survival_of_losses,
    unrecoverable_rate,
    young_interval_s,
)

_HOUR_S = 3600.0
_YEAR_H = 8760.0

# -- one tier ---------------------------------------------------------------------------------------------------------


def test_a_minute_of_cost_every_three_hours() -> None:
    cost_s, mtbf_s = 60.0, 3 * _HOUR_S
    assert round(young_interval_s(cost_s, mtbf_s)) == 1138
    assert round(daly_interval_s(cost_s, mtbf_s)) == 1099
    best_s = optimal_interval_s(cost_s, mtbf_s)
    assert round(best_s) == 1099
    assert round(ettr(best_s, cost_s, mtbf_s, 600.0), 3) == 0.850


def test_half_a_second_of_cost_every_three_hours() -> None:
    best_s = optimal_interval_s(0.5, 3 * _HOUR_S)
    assert round(best_s) == 104
    assert round(ettr(best_s, 0.5, 3 * _HOUR_S, 60.0), 3) == 0.985


@pytest.mark.parametrize(("mtbf_min", "published_min"), [(24 * 60, "117"), (6 * 60, "57"), (15, "9.1")])
def test_daly_gives_the_intervals_of_his_figures_3_to_5(mtbf_min: float, published_min: str) -> None:
    """Cost 5 min. Source: Daly 2006."""
    digits = len(published_min.partition(".")[2])
    assert f"{daly_interval_s(5 * 60.0, mtbf_min * 60.0) / 60:.{digits}f}" == published_min


def test_daly_stops_at_the_mtbf() -> None:
    assert daly_interval_s(200.0, 100.0) == 100.0
    assert daly_interval_s(1e6, 100.0) == 100.0


_COSTS = st.floats(1e-6, 2.0)
"""In units of the MTBF."""


@given(_COSTS, st.floats(1e-3, 1e9))
def test_the_optimum_satisfies_its_own_equation(cost: float, mtbf_s: float) -> None:
    """The derivative vanishes where tau / M = 1 - exp(-(tau + C) / M), solved here by iteration from above."""
    tau = 1.0
    for _ in range(200_000):
        following = -math.expm1(-(tau + cost))
        if abs(following - tau) < 1e-15:
            break
        tau = following
    assert optimal_interval_s(cost * mtbf_s, mtbf_s) / mtbf_s == pytest.approx(tau, rel=2e-4)


@given(_COSTS, st.floats(0.0, 3.0), st.floats(0.01, 3.0))
def test_no_other_interval_is_better(cost: float, recovery: float, factor: float) -> None:
    best = optimal_interval_s(cost, 1.0)
    assert ettr(best * factor, cost, 1.0, recovery) <= ettr(best, cost, 1.0, recovery) * (1 + 1e-12)


@given(st.floats(1e-9, 1e-3), st.floats(0.0, 1e-3), st.floats(0.5, 2.0))
def test_the_loss_of_rare_failures_is_the_first_order_one(cost: float, recovery: float, factor: float) -> None:
    """C / tau + (tau / 2 + R') / M, up to its square."""
    tau = factor * math.sqrt(2 * cost)
    first_order = cost / tau + tau / 2 + recovery
    assert 1 - ettr(tau, cost, 1.0, recovery) == pytest.approx(first_order, abs=3 * first_order**2)


def test_free_saves_and_machines_that_never_fail() -> None:
    assert optimal_interval_s(0.0, 100.0) == 0.0
    assert optimal_interval_s(1.0, math.inf) == math.inf
    assert ettr(9.0, 1.0, math.inf, 5.0) == 0.9
    assert ettr(1e6, 1.0, 1.0) == 0.0  # no overflow


@pytest.mark.parametrize("answer", [young_interval_s, daly_interval_s, optimal_interval_s])
def test_impossible_costs_and_rates_are_all_named(answer: Callable[[float, float], float]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        answer(-1.0, 0.0)
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == ["cost_s=-1.0", "mtbf_s=0.0"]


@pytest.mark.parametrize(("interval_s", "recovery_s"), [(0.0, 0.0), (math.inf, 0.0), (1.0, -1.0), (1.0, math.nan)])
def test_impossible_intervals_are_refused(interval_s: float, recovery_s: float) -> None:
    with pytest.raises(ConfigurationError, match="interval_s"):
        ettr(interval_s, 1.0, 1.0, recovery_s)


@given(st.floats(-100.0, 100.0), st.floats(0.0, 50.0), st.floats(0.0, 50.0))
def test_the_minimum_of_a_parabola_is_found_within_the_bounds(bottom: float, below: float, above: float) -> None:
    found = minimise(lambda x: (x - bottom) ** 2, bottom - below, bottom + above, tolerance=1e-6)
    assert found == pytest.approx(bottom, abs=1e-5)
    assert minimise(lambda x: x, 1.0, 2.0) == pytest.approx(1.0, abs=1e-8)


# -- tiers together ---------------------------------------------------------------------------------------------------


@given(_COSTS, st.floats(0.01, 2.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_one_tier_is_exact(cost: float, interval: float, detect: float, restore: float, lag: float) -> None:
    tier = Tier(rate_per_s=1.0, stall_s=cost, detect_s=detect, restore_s=restore, lag_s=lag)
    split = expected_split([(tier, interval)])
    assert split.useful == pytest.approx(ettr(interval, cost, 1.0, detect + restore + lag), rel=1e-9)
    assert split.total == pytest.approx(1.0)
    assert split.stall / split.useful == pytest.approx(cost / interval)
    assert split.detection * restore == pytest.approx(split.restore * detect)


def test_a_tier_that_nothing_needs_costs_its_saves_only() -> None:
    idle = Tier(rate_per_s=0.0, stall_s=1.0, background_s=10.0, slowdown=0.1)
    split = expected_split([(Tier(rate_per_s=0.0), 4.0), (idle, 8.0)])
    assert split == Split(useful=pytest.approx(0.8), stall=pytest.approx(0.1), slowdown=pytest.approx(0.1))


def test_tiers_add_up_when_failures_are_rare() -> None:
    """Each tier's first-order loss: C / tau + lambda (tau / 2 + D + R + L)."""
    tiers = [
        Tier(rate_per_s=1e-5, stall_s=0.01, detect_s=1.0, restore_s=5.0, lag_s=2.0),
        Tier(rate_per_s=1e-6, background_s=2.0, slowdown=0.05, detect_s=1.0, restore_s=30.0, lag_s=3.0),
        Tier(rate_per_s=1e-7, background_s=60.0, slowdown=0.05, detect_s=1.0, restore_s=300.0, lag_s=60.0),
    ]
    intervals = [40.0, 400.0, 8000.0]
    loss = sum(
        t.cost_s / tau + t.rate_per_s * (tau / 2 + t.recovery_s) for t, tau in zip(tiers, intervals, strict=True)
    )
    split = expected_split(list(zip(tiers, intervals, strict=True)))
    assert 1 - split.useful == pytest.approx(loss, abs=2 * loss**2)
    assert split.restore == pytest.approx(sum(t.rate_per_s * t.restore_s for t in tiers), rel=0.01)


def test_a_stretch_that_is_never_finished_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="leaves no chance"):
        expected_split([(Tier(rate_per_s=1.0), 501.0)])
    with pytest.raises(ConfigurationError, match="at least one tier"):
        expected_split([])


def test_impossible_tiers_are_refused_with_every_reason() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Tier(rate_per_s=-1.0, stall_s=math.inf, slowdown=1.5, lag_s=math.nan)
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "rate_per_s",
        "stall_s",
        "slowdown",
        "lag_s",
    ]


@pytest.mark.parametrize(
    ("intervals_s", "floors_s", "step_s", "steps"),
    [
        ([100.0, 250.0, 1000.0], [0.0, 0.0, 0.0], 1.0, [100, 200, 1000]),
        ([100.0, 251.0, 1000.0], [0.0, 0.0, 0.0], 1.0, [100, 300, 900]),
        ([100.0, 250.0, 1000.0], [0.0, 0.0, 0.0], 0.5, [200, 400, 2000]),
        ([0.0, 0.0], [0.0, 0.0], 1.0, [1, 1]),
        ([0.0, 0.0], [2.5, 7.0], 1.0, [3, 9]),  # transfer and commit take their time
        ([math.inf, 20.0, 100.0], [0.0, 0.0, 0.0], 1.0, [20, 20, 100]),  # parity needs a snapshot to be made of
        ([100.0, 20.0], [0.0, 0.0], 1.0, [20, 20]),
        ([2.1], [2.1], 0.7, [3]),  # 2.1 / 0.7 is a little more than three, and no reason for a fourth step
        ([5.0], [0.0], 100.0, [1]),
    ],
)
def test_intervals_are_nested_whole_steps(
    intervals_s: Sequence[float], floors_s: Sequence[float], step_s: float, steps: list[int]
) -> None:
    assert nested_steps(intervals_s, floors_s, step_s) == steps


@given(st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e3)), min_size=1, max_size=4), st.floats(0.01, 100.0))
def test_nested_intervals_keep_their_promises(tiers: list[tuple[float, float]], step_s: float) -> None:
    intervals_s, floors_s = [t[0] for t in tiers], [t[1] for t in tiers]
    steps = nested_steps(intervals_s, floors_s, step_s)
    assert all(n >= 1 for n in steps)
    assert all(later % earlier == 0 for earlier, later in pairwise(steps))
    assert all(n * step_s >= floor_s * (1 - 1e-6) for n, floor_s in zip(steps, floors_s, strict=True))


# -- groups -----------------------------------------------------------------------------------------------------------

_PERCENT_OF_64 = {(8, 1): [100.0, 88.9, 68.8], (4, 1): [100.0, 95.2, 86.0], (2, 1): [100.0, 98.4, 95.2]}


@pytest.mark.parametrize(("group", "parity"), _PERCENT_OF_64)
def test_survival_of_64_nodes(group: int, parity: int) -> None:
    """RAIM5 in groups of 8 and 4, and mirrored pairs; the first is C(G, k) n^k / C(N, k)."""
    layout = GroupLayout.of(64, group, parity)
    expected = _PERCENT_OF_64[group, parity]
    assert [round(100 * survival_of_losses(layout, k), 1) for k in (1, 2, 3)] == expected
    groups = 64 // group
    closed = [math.comb(groups, k) * group**k / math.comb(64, k) for k in (1, 2, 3)]
    assert [survival_of_losses(layout, k) for k in (1, 2, 3)] == pytest.approx(closed)


def test_survival_of_two_replicas_on_16_nodes() -> None:
    """Gemini, groups of m = 2."""
    layout = GroupLayout.of(16, 2, 1)
    assert round(survival_of_losses(layout, 2), 3) == 0.933
    assert survival_of_losses(layout, 3) == pytest.approx(0.8)


def test_512_nodes_of_a_year_each() -> None:
    layout = GroupLayout.of(512, 8, 1)
    assert 1 / unrecoverable_rate(layout, _YEAR_H, 0.25) == pytest.approx(8.6e4, rel=0.01)
    assert 1 / unrecoverable_rate(GroupLayout.of(512, 8, 0), _YEAR_H, 0.25) == pytest.approx(17.1, rel=0.01)
    first_order = 64 * 8 * 7 / _YEAR_H**2 * 0.25
    assert unrecoverable_rate(layout, _YEAR_H, 0.25) == pytest.approx(first_order, rel=1e-3)


_LAYOUTS = st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
    lambda sizes: st.builds(GroupLayout, st.just(tuple(sizes)), st.integers(0, min(sizes) - 1))
)


def _losses(layout: GroupLayout, lost: Sequence[int]) -> list[int]:
    """Lost nodes by group; nodes are numbered group after group."""
    group_of = [g for g, size in enumerate(layout.sizes) for _ in range(size)]
    return [sum(group_of[node] == g for node in lost) for g in range(len(layout.sizes))]


@given(_LAYOUTS, st.data())
def test_survival_of_losses_counts_every_set_of_nodes(layout: GroupLayout, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, min(layout.nodes, 6)))
    every = list(combinations(range(layout.nodes), k))
    harmless = sum(max(_losses(layout, lost)) <= layout.parity for lost in every)
    assert survival_of_losses(layout, k) == float(Fraction(harmless, len(every)))


@given(_LAYOUTS, st.floats(0.0, 3.0), st.floats(0.3, 3.0))
def test_survival_after_a_time_weighs_every_number_of_losses(layout: GroupLayout, time: float, shape: float) -> None:
    left = math.exp(-(time**shape))
    n = layout.nodes
    expected = sum(
        survival_of_losses(layout, k) * math.comb(n, k) * (1 - left) ** k * left ** (n - k) for k in range(n + 1)
    )
    assert survival_after(layout, 7 * time, 7.0, shape=shape) == pytest.approx(expected, abs=1e-12)


def test_survival_after_a_time_has_the_closed_forms() -> None:
    p, n = math.exp(-0.1), 4
    assert survival_after(GroupLayout.of(12, 4, 0), 0.1, 1.0) == pytest.approx(p**12)
    assert survival_after(GroupLayout.of(12, 4, 1), 0.1, 1.0) == pytest.approx((p**n + n * p ** (n - 1) * (1 - p)) ** 3)
    assert survival_after(GroupLayout.of(12, 3, 2), 0.1, 1.0) == pytest.approx((1 - (1 - p) ** 3) ** 4)


@pytest.mark.parametrize(
    ("nodes", "group", "sizes"),
    [(8, 8, (8,)), (9, 8, (5, 4)), (10, 4, (4, 3, 3)), (3, 8, (3,)), (1, 1, (1,)), (64, 8, (8,) * 8)],
)
def test_groups_are_few_and_equal(nodes: int, group: int, sizes: tuple[int, ...]) -> None:
    assert GroupLayout.of(nodes, group, 0).sizes == sizes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GroupLayout.of(0, 1, 0), "nodes=0"),
        (lambda: GroupLayout.of(9, 8, 4), "parity=4 .* below the smallest group, 4"),
        (lambda: GroupLayout((), 0), "at least one group"),
        (lambda: GroupLayout((3, 0), 0), "at least 1 node"),
        (lambda: survival_of_losses(GroupLayout((3,), 1), 4), "losses=4"),
        (lambda: survival_after(GroupLayout((3,), 1), 1.0, 0.0), "node_mtbf=0"),
        (lambda: unrecoverable_rate(GroupLayout((3,), 1), 1.0, -1.0), "window=-1"),
    ],
)
def test_impossible_groups_and_questions_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


# -- how often things fail --------------------------------------------------------------------------------------------


def test_the_rate_is_prior_plus_evidence() -> None:
    estimate = RateEstimate(2.0, 100.0).seen(1, 30.0).seen(2, 20.0)
    assert estimate.per_hour == pytest.approx((2 + 3) / (100 + 50))


@given(st.integers(1, 60), st.floats(0.1, 1e5), st.floats(0.5, 0.99))
def test_credible_bounds_leave_equal_tails(failures: int, hours: float, level: float) -> None:
    """A Gamma of whole shape a is below x as often as a Poisson of mean x is at least a."""
    for bound, below in zip(
        RateEstimate(1.0, hours / 2).seen(failures - 1, hours / 2).credible(level),
        ((1 - level) / 2, (1 + level) / 2),
        strict=True,
    ):
        x = bound * hours
        poisson = math.fsum(math.exp(k * math.log(x) - x - math.lgamma(k + 1)) for k in range(failures))
        assert 1 - poisson == pytest.approx(below, abs=1e-9)


def test_credible_bounds_of_a_rate_hold_the_sampled_share() -> None:
    chance = random.Random(5)
    estimate = RateEstimate(0.4, 10.0).seen(2, 50.0)
    low, high = estimate.credible(0.8)
    drawn = [chance.gammavariate(2.4, 1 / 60) for _ in range(20_000)]
    assert sum(d < low for d in drawn) / len(drawn) == pytest.approx(0.1, abs=0.01)
    assert sum(d > high for d in drawn) / len(drawn) == pytest.approx(0.1, abs=0.01)


def test_many_failures_have_bounds_of_a_normal_distribution() -> None:
    low, high = RateEstimate(1.0, 1.0).seen(39_999, 1e5 - 1).credible(0.9)
    assert (low, high) == (pytest.approx(0.4 - 1.645 * 0.002, abs=2e-5), pytest.approx(0.4 + 1.645 * 0.002, abs=2e-5))


def test_a_prior_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="prior"):
        RateEstimate(0.0, 1.0)
