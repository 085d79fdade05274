"""What studies share: parts that are kept in a file once they are made, and claims that are judged by intervals.

An effect is one number per seed, positive where the claim holds, with the 95 % interval of its mean (Student's t).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from optim_quality import interval
from record import table

__all__ = [
    "Claim",
    "Effect",
    "Memo",
    "Section",
    "Verdict",
    "claims_table",
    "counts",
    "in_words",
    "interval",
    "judge",
    "mean_and_half",
]


class Memo:
    """JSON values by key; with a file those of earlier calls count too, and new ones are added to it."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._known, self._reused = path, dict[str, Any](), set[str]()
        for line in path.read_text().splitlines() if path and path.exists() else ():
            entry = json.loads(line)
            self._known[entry["key"]] = entry["value"]
        self._older = set(self._known)

    def of(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            started_s = time.perf_counter()
            self._known[key] = make()
            print(f"{time.perf_counter() - started_s:.1f} s: {key[:160]}", file=sys.stderr, flush=True)
            if self._path:
                with self._path.open("a") as file:
                    file.write(json.dumps({"key": key, "value": self._known[key]}) + "\n")
        if key in self._older:
            self._reused.add(key)
        return self._known[key]

    @property
    def reused(self) -> int:
        """Values of earlier calls that were asked for."""
        return len(self._reused)


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
    """Of interest; 0 for a distance from a bar, which is confirmed, contradicted or not decided."""
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
    """Confirmed if the whole interval is above zero, contradicted if it is below. If it holds zero: not confirmed where
    it ends below the least effect of interest, so that nothing worth having is left, else not decided."""
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


def counts(claims: Sequence[Claim]) -> str:
    """How many ended in each verdict."""
    found = [claim.verdict for claim in claims]
    return "; ".join(f"{verdict.value}: {found.count(verdict)}" for verdict in reversed(Verdict)) + "."
