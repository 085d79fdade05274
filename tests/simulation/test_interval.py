"""The formulas of intervals and survival against runs, losses and repairs played through event by event.

Nothing here is taken from the formulas: failures fall at random instants of the wall clock, in training, in saves and
in recoveries alike, and a run does what it would do then.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import pytest

from holdfast.fault_tolerance.interval import (
    GroupLayout,
    Tier,
    ettr,
    expected_split,
    nested_steps,
    optimal_interval_s,
    survival_after,
    survival_of_losses,
    unrecoverable_rate,
)

_SIGMAS = 4.0
"""Of the simulated mean: a right formula fails once in 16,000 seeds, and these are fixed."""


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Storm:
    """Instants at which failures of one kind strike."""

    rate: float
    chance: random.Random
    next_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.strike(0.0)

    def strike(self, now_s: float) -> None:
        """It has struck at ``now_s``; roll when it will again."""
        self.next_s = now_s + self.chance.expovariate(self.rate) if self.rate else math.inf


class Run:
    """A run that computes in steps of the shortest interval and saves on its way, weakest tier first.

    A failure of tier i throws it back to the newest save of tier i or stronger; the recovery starts again when it is
    struck by its own or a stronger kind. Weaker failures find a recovery in progress and change nothing. A save that
    a failure has cut short is made again.
    """

    def __init__(self, plan: Sequence[tuple[Tier, float]], seed: int) -> None:
        chance = random.Random(seed)
        self.plan = plan
        self.unit_s = plan[0][1]
        self.storms = [Storm(tier.rate_per_s, chance) for tier, _ in plan]
        self.now_s, self.done = 0.0, 0
        self.saved = [0] * len(plan)
        """Units that the newest save of each tier holds."""

    def until(self, units: int) -> list[float]:
        """Wall time of every unit of the strongest tier's interval that is newly saved by it."""
        spans: list[float] = []
        began_s = 0.0
        while len(spans) < units:
            due = self._save_due()
            if due is None:
                if self._pass(self.unit_s):  # a failure moves ``done`` back
                    self.done += 1
            elif self._pass(self.plan[due][0].cost_s):
                self.saved[due] = self.done
                if due == len(self.plan) - 1:
                    spans.append(self.now_s - began_s)
                    began_s = self.now_s
        return spans

    def _save_due(self) -> int | None:
        """The weakest tier whose turn it is."""
        for i, (_, interval_s) in enumerate(self.plan):
            if self.done % round(interval_s / self.unit_s) == 0 and self.saved[i] < self.done:
                return i
        return None

    def _pass(self, seconds: float) -> bool:
        """Let time go by; False if a failure came first, and then the run has recovered from it."""
        kind = min(range(len(self.storms)), key=lambda i: self.storms[i].next_s)
        if self.storms[kind].next_s >= self.now_s + seconds:
            self.now_s += seconds
            return True
        self._recover(kind)
        return False

    def _recover(self, kind: int) -> None:
        while True:
            self.now_s = self.storms[kind].next_s
            self.storms[kind].strike(self.now_s)
            end_s = self.now_s + self.plan[kind][0].recovery_s
            worse = min(range(kind, len(self.storms)), key=lambda i: self.storms[i].next_s)
            if self.storms[worse].next_s >= end_s:
                break
            kind = worse
        for storm in self.storms[:kind]:
            while storm.next_s < end_s:
                storm.strike(storm.next_s)
        self.now_s = end_s
        self.done = max(self.saved[kind:])
        self.saved = [min(units, self.done) for units in self.saved[:kind]] + self.saved[kind:]


def _simulated(plan: Sequence[tuple[Tier, float]], units: int, seed: int) -> tuple[float, float]:
    """Useful share of the wall time, and its standard error: the spans are independent of each other."""
    spans = Run(plan, seed).until(units)
    useful = plan[-1][1] / statistics.fmean(spans)
    return useful, useful * statistics.stdev(spans) / statistics.fmean(spans) / math.sqrt(units)


_REGIMES = {
    "an hour of work a failure": (1099.0, 60.0, 10_800.0, 600.0),
    "cheap saves, slow recovery": (104.0, 0.5, 10_800.0, 60.0),
    "far too long": (9_000.0, 60.0, 10_800.0, 600.0),
    "far too short": (60.0, 60.0, 10_800.0, 600.0),
    "recovery as long as the MTBF": (300.0, 30.0, 1_000.0, 1_000.0),
    "a save as long as the MTBF": (800.0, 1_000.0, 1_000.0, 10.0),
    "nothing lost but the work": (50.0, 0.0, 200.0, 0.0),
}


@pytest.mark.parametrize("regime", _REGIMES)
def test_the_exact_ratio_is_that_of_a_played_run(regime: str) -> None:
    interval_s, cost_s, mtbf_s, recovery_s = _REGIMES[regime]
    tier = Tier(rate_per_s=1 / mtbf_s, stall_s=cost_s, restore_s=recovery_s)
    useful, error = _simulated([(tier, interval_s)], units=30_000, seed=1)
    assert ettr(interval_s, cost_s, mtbf_s, recovery_s) == pytest.approx(useful, abs=_SIGMAS * error)
    assert error < 0.02 * useful


@pytest.mark.parametrize(("cost_s", "mtbf_s", "recovery_s"), [(60.0, 10_800.0, 600.0), (300.0, 900.0, 60.0)])
def test_the_best_played_interval_is_around_the_advised_one(cost_s: float, mtbf_s: float, recovery_s: float) -> None:
    advised_s = optimal_interval_s(cost_s, mtbf_s)
    factors = (0.25, 0.5, 1.0, 2.0, 4.0)
    tier = Tier(rate_per_s=1 / mtbf_s, stall_s=cost_s, restore_s=recovery_s)
    played = []
    for factor in factors:
        units = round(20_000 / factor)  # the same amount of work
        played.append(_simulated([(tier, factor * advised_s)], units, seed=2))
    best = max(range(len(factors)), key=lambda i: played[i][0])
    assert factors[best] == 1.0
    gaps = [played[best][0] - useful - _SIGMAS * math.hypot(error, played[best][1]) for useful, error in played]
    assert all(gap > 0 for i, gap in enumerate(gaps) if i != best)


_TIERS = [
    Tier(rate_per_s=1 / 2_000, stall_s=0.5, background_s=2.0, slowdown=0.1, lag_s=2.0, detect_s=1.0, restore_s=10.0),
    Tier(rate_per_s=1 / 15_000, background_s=5.0, slowdown=0.2, lag_s=5.0, detect_s=1.0, restore_s=60.0),
    Tier(rate_per_s=1 / 80_000, background_s=60.0, slowdown=0.2, lag_s=60.0, detect_s=5.0, restore_s=300.0),
]


def _advised(factors: Sequence[float] = (1.0, 1.0, 1.0)) -> list[tuple[Tier, float]]:
    """Intervals in steps of a second; each tier's optimum is multiplied before they are nested."""
    optima = [
        optimal_interval_s(tier.cost_s, tier.mtbf_s) * factor for tier, factor in zip(_TIERS, factors, strict=True)
    ]
    return [(tier, float(n)) for tier, n in zip(_TIERS, nested_steps(optima, [0.0] * 3, 1.0), strict=True)]


@cache
def _played(*factors: float) -> tuple[float, float]:
    plan = _advised(factors)
    return _simulated(plan, units=round(1e7 / plan[-1][1]), seed=4)


_OTHERS = [(4.0, 1.0, 1.0), (0.2, 1.0, 1.0), (1.0, 4.0, 1.0), (1.0, 0.2, 1.0), (1.0, 1.0, 4.0), (1.0, 1.0, 0.2)]


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), *_OTHERS], ids=str)
def test_three_tiers_together_give_the_ratio_of_a_played_run(factors: tuple[float, ...]) -> None:
    """A twelfth of the time is lost, and still the formula's second-order error does not show."""
    useful, error = _played(*factors)
    assert expected_split(_advised(factors)).useful == pytest.approx(useful, abs=_SIGMAS * error)
    assert error < 0.004


@pytest.mark.parametrize("factors", _OTHERS, ids=str)
def test_a_run_with_one_tier_off_its_advice_plays_worse(factors: tuple[float, ...]) -> None:
    (best, best_error), (useful, error) = _played(1.0, 1.0, 1.0), _played(*factors)
    assert useful < best - 2 * math.hypot(error, best_error)


# -- losses -----------------------------------------------------------------------------------------------------------


def _is_survived(layout: GroupLayout, lost: Sequence[int]) -> bool:
    start = 0
    for size in layout.sizes:
        if sum(start <= node < start + size for node in lost) > layout.parity:
            return False
        start += size
    return True


_LAYOUTS = [GroupLayout.of(64, 8, 1), GroupLayout.of(64, 4, 1), GroupLayout.of(64, 2, 1), GroupLayout((5, 4, 4), 2)]


@pytest.mark.parametrize("layout", _LAYOUTS, ids=str)
def test_random_losses_are_survived_as_often_as_counted(layout: GroupLayout) -> None:
    chance, trials = random.Random(5), 20_000
    for losses in (1, 2, 3, 5):
        share = sum(_is_survived(layout, chance.sample(range(layout.nodes), losses)) for _ in range(trials)) / trials
        expected = survival_of_losses(layout, losses)
        assert share == pytest.approx(expected, abs=_SIGMAS * math.sqrt(expected * (1 - expected) / trials))
    if layout.nodes <= 16:
        every = list(combinations(range(layout.nodes), 4))
        harmless = sum(_is_survived(layout, lost) for lost in every)
        assert survival_of_losses(layout, 4) == pytest.approx(harmless / len(every))


@pytest.mark.parametrize("layout", _LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [1.0, 0.7])
def test_nodes_that_die_one_by_one_are_survived_as_often_as_computed(layout: GroupLayout, shape: float) -> None:
    chance, trials, time = random.Random(6), 10_000, 0.05
    survived = 0
    for _ in range(trials):
        lost = [node for node in range(layout.nodes) if chance.weibullvariate(1.0, shape) < time]
        survived += _is_survived(layout, lost)
    expected = survival_after(layout, time, 1.0, shape=shape)
    assert survived / trials == pytest.approx(expected, abs=_SIGMAS * math.sqrt(expected * (1 - expected) / trials))


@pytest.mark.parametrize(("layout", "window"), [(_LAYOUTS[0], 0.01), (_LAYOUTS[3], 0.1), (GroupLayout((6,), 0), 0.1)])
def test_losses_beyond_repair_come_as_often_as_computed(layout: GroupLayout, window: float) -> None:
    """Every node dies once per unit of time on average and is replaced at once, protected again after the window."""
    chance, expected = random.Random(7), unrecoverable_rate(layout, 1.0, window)
    time = 4_000 / expected
    beyond, total_rate, now = 0, float(layout.nodes), 0.0
    group_of = [g for g, size in enumerate(layout.sizes) for _ in range(size)]
    last = [-math.inf] * layout.nodes
    members = [[n for n in range(layout.nodes) if group_of[n] == g] for g in range(len(layout.sizes))]
    while True:
        now += chance.expovariate(total_rate)
        if now > time:
            break
        node = chance.randrange(layout.nodes)
        unprotected = sum(now - last[other] < window for other in members[group_of[node]] if other != node)
        beyond += unprotected >= layout.parity
        last[node] = now
    # Losses beyond repair come in clusters, which widens their spread a little.
    assert beyond / time == pytest.approx(expected, abs=1.5 * _SIGMAS * math.sqrt(4_000) / time)
