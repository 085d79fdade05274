"""How often to save, what a group of nodes survives, and what of the wall time is left for training. Pure arithmetic.

A *tier* is one kind of save (memory snapshot, parity, durable checkpoint) together with the failures that need it and
no weaker one. Failures are memoryless; they also strike during saves and recoveries.

::

    C   training time one save costs: its stall, and the slowdown while it is copied, encoded or written
    M   mean time between the failures that a tier serves
    D   detection    R   restore and restart    L   lag from a step boundary until its save is committed

Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly,
"A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006;
groups with parity: REFT, arXiv 2310.12670; cost as blocked time rather than transfer time: DataStates-LLM,
arXiv 2406.10707, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast.errors import ConfigurationError

__all__ = [
    "GroupLayout",
    "RateEstimate",
    "Split",
    "Tier",
    "daly_interval_s",
    "ettr",
    "expected_split",
    "minimise",
    "nested_steps",
    "optimal_interval_s",
    "survival_after",
    "survival_of_losses",
    "unrecoverable_rate",
    "young_interval_s",
]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_SHORTEST = 1e-12
"""No optimum is below this share of the MTBF unless a save costs nothing measurable."""
_HOPELESS = 500.0
"""Mean failures during one stretch beyond which it is never finished; e to this power is still a float."""


# -- one tier ---------------------------------------------------------------------------------------------------------


def young_interval_s(cost_s: float, mtbf_s: float) -> float:
    """First-order optimum of the interval between saves, sqrt(2 C M). Source: Young 1974."""
    _refuse_bad(cost_s, mtbf_s)
    return math.sqrt(2.0 * cost_s * mtbf_s)


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Higher-order optimum; the MTBF itself once a save costs twice as much. Source: Daly 2006."""
    _refuse_bad(cost_s, mtbf_s)
    if cost_s >= 2.0 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2.0 * mtbf_s)
    return math.sqrt(2.0 * cost_s * mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - cost_s


def optimal_interval_s(cost_s: float, mtbf_s: float) -> float:
    """The interval with the highest :func:`ettr`, which does not depend on the time to recover; 0 if a save is free."""
    _refuse_bad(cost_s, mtbf_s)
    if cost_s == 0.0 or math.isinf(mtbf_s):
        return 0.0 if cost_s == 0.0 else math.inf
    lowest = math.log(_SHORTEST * mtbf_s)
    # At the optimum tau = M (1 - exp(-(tau + C) / M)), so it is below M. In logarithms the search is as fine for an
    # interval of a second as for one of a week.
    best = minimise(lambda log_tau: -_log_ettr(math.exp(log_tau), cost_s, mtbf_s, 0.0), lowest, math.log(mtbf_s))
    return math.exp(best)


def ettr(interval_s: float, cost_s: float, mtbf_s: float, recovery_s: float = 0.0) -> float:
    """Effective training time ratio: useful seconds per second of wall time, between 0 and 1.

    tau / (M exp(R' / M) (exp((tau + C) / M) - 1)) with R' = ``recovery_s`` = D + R + L. Exact for memoryless failures,
    which strike during saves and recoveries too. Source: Daly 2006.
    """
    _refuse_bad(cost_s, mtbf_s)
    if not (0.0 < interval_s < math.inf and 0.0 <= recovery_s < math.inf):
        raise ConfigurationError(f"interval_s={interval_s} must be above 0, recovery_s={recovery_s} at least 0, finite")
    if math.isinf(mtbf_s):
        return interval_s / (interval_s + cost_s)
    return math.exp(_log_ettr(interval_s, cost_s, mtbf_s, recovery_s))


def _log_ettr(interval_s: float, cost_s: float, mtbf_s: float, recovery_s: float) -> float:
    span = (interval_s + cost_s) / mtbf_s
    log_expm1 = span if span > _HOPELESS else math.log(math.expm1(span))
    return math.log(interval_s / mtbf_s) - recovery_s / mtbf_s - log_expm1


def minimise(cost: Callable[[float], float], low: float, high: float, *, tolerance: float = 1e-9) -> float:
    """Where ``cost``, which falls and then rises on [low, high], is lowest: golden-section search.

    ``tolerance`` is in units of the argument. Rounding makes a smooth minimum flat, so about half of a float's digits
    can be had.
    """
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = cost(left), cost(right)
    while high - low > tolerance + 4.0 * math.ulp(max(abs(low), abs(high))):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = cost(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = cost(right)
    return (low + high) / 2.0


def _refuse_bad(cost_s: float, mtbf_s: float) -> None:
    problems = []
    if not 0.0 <= cost_s < math.inf:
        problems.append(f"cost_s={cost_s} must be a finite number of seconds, at least 0")
    if not mtbf_s > 0.0:
        problems.append(f"mtbf_s={mtbf_s} must be above 0 seconds; inf means that nothing ever fails")
    if problems:
        raise ConfigurationError(problems)


# -- tiers together ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One kind of save and the failures that need it and no weaker one."""

    rate_per_s: float
    """Failures per second of training; 0 if nothing needs this tier."""
    stall_s: float = 0.0
    """Seconds training stands still per save."""
    background_s: float = 0.0
    """Seconds of copying, encoding or writing per save while training goes on; the shortest possible interval."""
    slowdown: float = 0.0
    """Share of its speed, 0 to 1, that training loses during ``background_s``."""
    lag_s: float = 0.0
    """Seconds from a step boundary until its save is committed."""
    detect_s: float = 0.0
    restore_s: float = 0.0
    """Seconds from detection until training goes on."""

    def __post_init__(self) -> None:
        names = ("rate_per_s", "stall_s", "background_s", "slowdown", "lag_s", "detect_s", "restore_s")
        limits = {"slowdown": 1.0}
        problems = [
            f"{name}={getattr(self, name)} must be a number from 0 to {limits.get(name, math.inf)}, finite"
            for name in names
            if not 0.0 <= getattr(self, name) <= limits.get(name, math.inf) or math.isinf(getattr(self, name))
        ]
        if problems:
            raise ConfigurationError(problems)

    @property
    def cost_s(self) -> float:
        """C: seconds of training that one save takes away."""
        return self.stall_s + self.slowdown * self.background_s

    @property
    def mtbf_s(self) -> float:
        """M; infinite if nothing needs this tier."""
        return 1.0 / self.rate_per_s if self.rate_per_s else math.inf

    @property
    def recovery_s(self) -> float:
        """R' = D + R + L."""
        return self.detect_s + self.restore_s + self.lag_s


@dataclass(frozen=True, slots=True)
class Split:
    """Where the time goes: seconds, or shares of the wall time."""

    useful: float = 0.0
    stall: float = 0.0
    slowdown: float = 0.0
    recomputed: float = 0.0
    """Steps done again, and the lag between a step boundary and its commit."""
    detection: float = 0.0
    restore: float = 0.0

    @property
    def total(self) -> float:
        return self.useful + self.stall + self.slowdown + self.recomputed + self.detection + self.restore

    def times(self, factor: float) -> Split:
        """Every part multiplied."""
        return Split(*(getattr(self, name) * factor for name in self.__slots__))

    def plus(self, other: Split) -> Split:
        """The sum, part by part."""
        return Split(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


def expected_split(plan: Sequence[tuple[Tier, float]]) -> Split:
    """Expected shares of the wall time; ``useful`` is the effective training time ratio.

    ``plan``: tiers with their intervals in seconds of useful time, weakest first, each interval a multiple of the one
    before. Exact for one tier. With several, what a weaker tier's stretch takes on average is taken for its duration,
    and a recovery is interrupted by failures of its own tier only; both errors are of second order in the losses.

    Raises: ConfigurationError for no tier, or if failures come so fast that a stretch between saves is never finished.
    """
    if not plan:
        raise ConfigurationError("a plan needs at least one tier")
    previous_s = plan[0][1]
    spent = Split(useful=previous_s)
    for tier, interval_s in plan:
        spent = _through_failures(spent.times(interval_s / previous_s), tier)
        previous_s = interval_s
    return spent.times(1.0 / spent.total)


def _through_failures(stretch: Split, tier: Tier) -> Split:
    """One stretch and its save, finished in spite of the failures that throw it back to its beginning."""
    stretch = stretch.plus(Split(stall=tier.stall_s, slowdown=tier.slowdown * tier.background_s))
    span_s, rate, down_s = stretch.total, tier.rate_per_s, tier.recovery_s
    if rate == 0.0:
        return stretch
    if max(span_s, down_s) * rate > _HOPELESS:
        raise ConfigurationError(
            f"a failure every {1.0 / rate:.3g} s leaves no chance to a stretch of {max(span_s, down_s):.3g} s between "
            "two saves; save more often, make saves cheaper or failures rarer"
        )
    failures = math.expm1(span_s * rate)  # failed attempts before the one that succeeds
    redone_s = failures / rate - span_s
    recovering_s = failures * math.expm1(down_s * rate) / rate  # a failure during recovery starts it again
    share = recovering_s / down_s if down_s else 0.0
    return stretch.plus(
        Split(recomputed=redone_s + share * tier.lag_s, detection=share * tier.detect_s, restore=share * tier.restore_s)
    )


def nested_steps(intervals_s: Sequence[float], floors_s: Sequence[float], step_s: float) -> list[int]:
    """Intervals in whole steps, weakest tier first, each a multiple of the one before, because a stronger save is
    made from a weaker one.

    ``floors_s`` are what a save needs (transfer, commit): an interval is not shorter. A tier that would rather save
    more often than a weaker one takes the weaker one along.
    """
    wanted = [interval_s / step_s for interval_s in intervals_s]
    for weaker in reversed(range(len(wanted) - 1)):
        wanted[weaker] = min(wanted[weaker], wanted[weaker + 1])
    steps: list[int] = []
    for ideal, floor_s in zip(wanted, floors_s, strict=True):
        unit = steps[-1] if steps else 1
        at_least = math.ceil(floor_s / step_s / unit - 1e-9)  # 2.1 / 0.7 is 3.0000000000000004
        steps.append(unit * max(1, round(ideal / unit), at_least))
    return steps


# -- groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Nodes in protection groups, each of which survives the loss of any ``parity`` of its members.

    RAIM5 is parity 1 (REFT, arXiv 2310.12670); mirrored pairs are groups of 2 with parity 1; m replicas (Gemini) are
    groups of m with parity m - 1; parity 0 protects nothing.
    """

    sizes: tuple[int, ...]
    parity: int

    def __post_init__(self) -> None:
        problems = []
        if not self.sizes or min(self.sizes) < 1:
            problems.append(f"group sizes {list(self.sizes)} must be at least one group of at least 1 node")
        elif not 0 <= self.parity < min(self.sizes):
            problems.append(
                f"parity={self.parity} must be at least 0 and below the smallest group, {min(self.sizes)} node(s); "
                "take larger groups or less parity"
            )
        if problems:
            raise ConfigurationError(problems)

    @classmethod
    def of(cls, nodes: int, group: int, parity: int) -> GroupLayout:
        """``nodes`` in as few groups of at most ``group`` members as possible, sizes differing by one at most."""
        if nodes < 1 or group < 1:
            raise ConfigurationError(f"nodes={nodes} and group={group} must be whole numbers of at least 1")
        groups = -(-nodes // group)
        small, larger = divmod(nodes, groups)
        return cls((small + 1,) * larger + (small,) * (groups - larger), parity)

    @property
    def nodes(self) -> int:
        return sum(self.sizes)


def survival_of_losses(layout: GroupLayout, losses: int) -> float:
    """Probability that no group loses more than its parity when ``losses`` of all nodes are lost, each set equally
    likely. For equal groups with parity 1 this is C(G, k) n^k / C(N, k). Source: arXiv 2310.12670, RAIM5."""
    if not 0 <= losses <= layout.nodes:
        raise ConfigurationError(f"losses={losses} must be from 0 to the number of nodes, {layout.nodes}")
    survived = [1]  # coefficient k: harmless sets of k nodes among the groups so far
    for size in layout.sizes:
        survived = _product(survived, [math.comb(size, lost) for lost in range(layout.parity + 1)], losses)
    harmless = survived[losses] if losses < len(survived) else 0
    return harmless / math.comb(layout.nodes, losses)


def _product(a: Sequence[int], b: Sequence[int], degree: int) -> list[int]:
    """Of two polynomials, up to ``degree``."""
    result = [0] * min(len(a) + len(b) - 1, degree + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            if i + j < len(result):
                result[i + j] += x * y
    return result


def survival_after(layout: GroupLayout, time: float, node_mtbf: float, *, shape: float = 1.0) -> float:
    """Probability that no group has lost more than its parity after ``time`` without any re-protection.

    A node is left with probability exp(-(time / node_mtbf)^shape): memoryless for shape 1, else Weibull with scale
    ``node_mtbf``. **Units**: time and node_mtbf in the same unit. Source: arXiv 2310.12670.
    """
    if not (time >= 0.0 and node_mtbf > 0.0 and shape > 0.0):
        raise ConfigurationError(f"time={time} must be at least 0, node_mtbf={node_mtbf} and shape={shape} above 0")
    lost = -math.expm1(-((time / node_mtbf) ** shape))
    return math.prod(1.0 - _tail(size, lost, layout.parity + 1) for size in layout.sizes)


def unrecoverable_rate(layout: GroupLayout, node_mtbf: float, window: float) -> float:
    """Losses per unit of time that the groups cannot repair, when a lost node is protected again after ``window``.

    A loss is unrecoverable if ``parity`` others of its group were lost within the window before it; for parity 1 and
    a short window G n (n - 1) lambda^2 W. **Units**: node_mtbf and window in the same unit, the result per this unit.
    """
    if not (node_mtbf > 0.0 and window >= 0.0):
        raise ConfigurationError(f"node_mtbf={node_mtbf} must be above 0 and window={window} at least 0")
    recently = -math.expm1(-window / node_mtbf)
    return sum(size / node_mtbf * _tail(size - 1, recently, layout.parity) for size in layout.sizes)


def _tail(trials: int, chance: float, at_least: int) -> float:
    """Probability of ``at_least`` successes or more; summed from the tail, which may be tiny."""
    return math.fsum(
        math.comb(trials, k) * chance**k * (1.0 - chance) ** (trials - k) for k in range(at_least, trials + 1)
    )


# -- how often things fail --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RateEstimate:
    """A failure rate as a Gamma distribution: what was believed before, and what has been seen since.

    The prior counts as ``prior_failures`` failures in ``prior_hours``; counts are Poisson, so the posterior is Gamma
    again and its mean is (a + failures) / (b + hours).
    """

    prior_failures: float
    prior_hours: float
    failures: int = 0
    hours: float = 0.0

    def __post_init__(self) -> None:
        is_prior = 0.0 < self.prior_failures < math.inf and 0.0 < self.prior_hours < math.inf
        if not (is_prior and self.failures >= 0 and 0.0 <= self.hours < math.inf):
            raise ConfigurationError(f"{self}: the prior must be above 0, what was seen at least 0, all finite")

    def seen(self, failures: int, hours: float) -> RateEstimate:
        """The estimate after some more hours."""
        return RateEstimate(self.prior_failures, self.prior_hours, self.failures + failures, self.hours + hours)

    @property
    def per_hour(self) -> float:
        """Mean."""
        return (self.prior_failures + self.failures) / (self.prior_hours + self.hours)

    def credible(self, level: float = 0.9) -> tuple[float, float]:
        """Failures per hour: the rate is between these two with probability ``level``, each tail equally likely."""
        shape, hours = self.prior_failures + self.failures, self.prior_hours + self.hours
        return _gamma_quantile(shape, (1.0 - level) / 2.0) / hours, _gamma_quantile(shape, (1.0 + level) / 2.0) / hours


def _gamma_quantile(shape: float, probability: float) -> float:
    """Bisection in logarithms: a small shape has quantiles near 1e-100."""
    low, high = -1000.0, math.log(shape + 40.0 * math.sqrt(shape) + 100.0)
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (low, middle) if _gamma_cdf(shape, math.exp(middle)) >= probability else (middle, high)
    return math.exp((low + high) / 2.0)


def _gamma_cdf(shape: float, x: float) -> float:
    """Regularised lower incomplete gamma function, by its series, whose terms are all positive."""
    if x == 0.0:
        return 0.0
    term, total, n = 1.0, 1.0, 1
    while term > 1e-17 * total:
        term *= x / (shape + n)
        total += term
        n += 1
    return min(1.0, total * math.exp(shape * math.log(x) - x - math.lgamma(shape + 1.0)))
