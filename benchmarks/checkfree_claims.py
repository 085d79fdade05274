"""How `checkfree_study.py` judges: a claim is a set of effects, each of which has to be above zero.

An effect is one number per seed, positive where the claim holds, with the 95 % interval of its mean (Student's t). The
least effect of interest is fixed beforehand. An effect is

- confirmed, if the whole interval is above zero;
- contradicted, if the whole interval is below zero;
- not confirmed, if it holds zero and ends below the least effect of interest: nothing worth having is left;
- not decided at this scale, otherwise.

A claim of several effects is contradicted if one is, else not confirmed if one is, else not decided if one is, else
confirmed. Where a run did not reach the target its count of steps is too low: an effect that such runs speak against is
as good as stated or better, one that they speak for is not decided. Where even the control of an experiment, the cost
of fresh stages, is not confirmed, the experiment is blind: it decides nothing, neither for a method nor against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from optim_quality import interval
from record import table

__all__ = [
    "Claim",
    "Effect",
    "Section",
    "Verdict",
    "claims_table",
    "in_words",
    "judge",
    "mean_and_half",
    "with_control",
]


class Verdict(Enum):
    CONTRADICTED = "contradicted"
    NOT_CONFIRMED = "not confirmed"
    NOT_DECIDED = "not decided at this scale"
    CONFIRMED = "confirmed"


@dataclass(frozen=True)
class Effect:
    """Something that has to be above zero."""

    name: str
    values: Sequence[float]
    """One per seed, in nats, steps or as a ratio."""
    least: float
    """Of interest."""
    is_too_high: bool = False
    """Some values are only known to be at most this."""
    is_too_low: bool = False
    """Some values are only known to be at least this."""

    @property
    def verdict(self) -> Verdict:
        found = judge(*_interval(self.values), least=self.least)
        is_open = (self.is_too_high and found is Verdict.CONFIRMED) or (
            self.is_too_low and found in (Verdict.CONTRADICTED, Verdict.NOT_CONFIRMED)
        )
        return Verdict.NOT_DECIDED if is_open else found


def judge(mean: float, half: float, *, least: float) -> Verdict:
    """By the rules above."""
    if not (math.isfinite(mean) and math.isfinite(half)):
        return Verdict.NOT_DECIDED
    if mean - half > 0:
        return Verdict.CONFIRMED
    if mean + half < 0:
        return Verdict.CONTRADICTED
    return Verdict.NOT_CONFIRMED if mean + half < least else Verdict.NOT_DECIDED


@dataclass(frozen=True)
class Claim:
    statement: str
    source: str
    """Where the paper says it, or whose expectation it is."""
    effects: Sequence[Effect]
    is_blind: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst; an empty claim is not decided."""
        order = list(Verdict)
        worst = min((effect.verdict for effect in self.effects), key=order.index, default=Verdict.NOT_DECIDED)
        return Verdict.NOT_DECIDED if self.is_blind else worst


@dataclass(frozen=True)
class Section:
    """What an experiment found."""

    title: str
    text: str
    claims: Sequence[Claim] = ()
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """Validation losses by label and seed, at the start and after every ``Scale.every`` steps."""


def with_control(section: Section, control: Effect) -> Section:
    """The section, its claims judged blind where the control is not confirmed."""
    is_blind = control.verdict is not Verdict.CONFIRMED
    blind = " So this experiment is blind and decides nothing." if is_blind else ""
    claims = [replace(claim, is_blind=is_blind) for claim in section.claims]
    return replace(section, text=f"Control: {in_words(control)}.{blind}\n\n{section.text}", claims=claims)


def mean_and_half(values: Sequence[float], digits: int = 3, *, signed: bool = False) -> str:
    """``mean ± half the width of its interval``; a value that is not finite is shown as such."""
    if not all(map(math.isfinite, values)) or not values:
        return "not finite" if values else "–"
    mean, half = interval(values)
    sign = "+" if signed else ""
    return f"{mean:{sign}.{digits}f}" + ("" if math.isinf(half) else f" ± {half:.{digits}f}")


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Infinitely wide where a value is not finite."""
    return interval(values) if all(map(math.isfinite, values)) else (math.nan, math.inf)


def in_words(effect: Effect) -> str:
    mean, half = _interval(effect.values)
    known = ", at most" if effect.is_too_high else ", at least" if effect.is_too_low else ""
    return f"{effect.name}: {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]{known} ({effect.verdict.value})"


def claims_table(claims: Sequence[Claim]) -> str:
    columns = ["claim", "of", "verdict", "effects: mean [95 % interval], above 0 where the claim holds"]
    return table(
        columns, [[c.statement, c.source, c.verdict.value, "; ".join(map(in_words, c.effects))] for c in claims]
    )
