"""Runs of a method held against undisturbed ones of the same seeds, for the experiments of `checkfree_study.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from checkfree_claims import Effect, mean_and_half
from checkfree_runs import EXACT, INNER, STAGES, Run, Study, World

from holdfast.fault_tolerance.stage_policy import Repair
from holdfast.trainer.stage_method import Method
from holdfast.trainer.stage_simulation import Failure

__all__ = [
    "CHECKFREE",
    "COLUMNS",
    "LEAST_LOSS",
    "LEAST_RATIO",
    "LEAST_STEPS",
    "PLUS",
    "REDUNDANT",
    "SWAPPED",
    "Against",
    "Failures",
    "against",
    "control",
    "curves_of",
    "drawn",
    "everywhere",
    "inside",
    "more_loss",
    "none",
    "plain_runs",
    "slower",
]

CHECKFREE = Method(Repair.CHECKFREE, rate=1.1)
"""As algorithm 1 has it, the raised rate once."""
PLUS = replace(CHECKFREE, repair=Repair.CHECKFREE_PLUS, swapped=True)
SWAPPED = replace(EXACT, swapped=True)
LEAST_LOSS, LEAST_RATIO, LEAST_STEPS = 0.01, 0.02, 1.0
"""Effects below these many nats, share of an undisturbed run's steps, and steps per failure are of no interest."""
REDUNDANT = 1.65
"""Time of a step with redundant computation, in plain steps: table 2 of the paper, 151.04 s against 91.3 s."""

Failures = Callable[[World], Sequence[Failure]]


def none(world: World) -> list[Failure]:
    return []


def drawn(gap: float, stages: Sequence[int]) -> Failures:
    return lambda world: world.schedule(gap, stages)


def everywhere(gap: float) -> Failures:
    return drawn(gap, range(STAGES))


def inside(gap: float) -> Failures:
    return drawn(gap, INNER)


@dataclass(frozen=True)
class Against:
    """Runs of a method beside undisturbed ones, seed by seed."""

    runs: Sequence[Run]
    plain: Sequence[Run]
    study: Study

    @property
    def steps(self) -> list[float]:
        """To the target; for some only so many that were not enough."""
        return [steps for steps, _ in self._reached(self.runs)]

    @property
    def misses(self) -> int:
        return sum(not has for _, has in self._reached(self.runs))

    @property
    def ratios(self) -> list[float]:
        """NaN for a target that is no better than the start."""
        return [
            own / plain if plain else math.nan
            for own, (plain, _) in zip(self.steps, self._reached(self.plain), strict=True)
        ]

    @property
    def per_failure(self) -> list[float]:
        """Extra steps to the target, divided by the failures until then."""
        pairs = zip(self.runs, self.steps, self._reached(self.plain), strict=True)
        return [(own - plain) / max(1, run.failures_before(own)) for run, own, (plain, _) in pairs]

    @property
    def extra_loss(self) -> list[float]:
        """At the end, nats."""
        return [run.losses[-1] - plain.losses[-1] for run, plain in zip(self.runs, self.plain, strict=True)]

    @property
    def failures(self) -> float:
        return sum(len(run.failures) for run in self.runs) / len(self.runs)

    def _reached(self, runs: Sequence[Run]) -> list[tuple[float, bool]]:
        scale = self.study.scale
        targets = [plain.losses[scale.target_step // scale.every] for plain in self.plain]
        return [run.reach(target, scale.every) for run, target in zip(runs, targets, strict=True)]

    @property
    def cells(self) -> list[str]:
        reached = f"{len(self.runs) - self.misses} of {len(self.runs)}"
        loss = mean_and_half([run.losses[-1] for run in self.runs])
        extra = mean_and_half(self.extra_loss, signed=True)
        ratio = ("≥ " if self.misses else "") + mean_and_half(self.ratios)
        return [f"{self.failures:.1f}", loss, extra, ratio, reached, mean_and_half(self.per_failure, 1, signed=True)]


COLUMNS = ("failures", "final loss", "− no failures", "N / N no failures", "reached", "extra steps per failure")


def plain_runs(study: Study) -> list[Run]:
    return study.runs(EXACT, none)


def against(study: Study, method: Method, failures: Failures) -> Against:
    return Against(study.runs(method, failures), plain_runs(study), study)


def more_loss(name: str, own: Against, other: Against, least: float = LEAST_LOSS) -> Effect:
    values = [a - b for a, b in zip(own.extra_loss, other.extra_loss, strict=True)]
    return Effect(name, values, least)


def slower(name: str, own: Against, other: Against) -> Effect:
    values = [a - b for a, b in zip(own.ratios, other.ratios, strict=True)]
    return Effect(name, values, LEAST_RATIO, is_too_low=own.misses > 0, is_too_high=other.misses > 0)


def curves_of(ways: Mapping[str, Against]) -> dict[str, list[list[float]]]:
    return {name: [run.losses for run in found.runs] for name, found in ways.items()}


def control(study: Study) -> Effect:
    """What fresh stages cost at the highest rate, ends immune: where that is not seen, nothing smaller would be."""
    fresh = against(study, replace(CHECKFREE, repair=Repair.RANDOM), inside(study.scale.gaps[-1]))
    return Effect("random − no failures, final loss", fresh.extra_loss, LEAST_LOSS)
