"""Experiment of `adapt_study.py`: forgetting against what is learned, at equal rates and at equal learning.

A method that learns little forgets little, so forgetting is compared where the mean diagonal is the same. A system's
curve has a point for each learning rate and the base, which is every method at rate 0. Of these points those count that
no other one beats in both; between them is interpolated, and what a system reaches with less forgetting it also has for
worse diagonals. The gap of two systems is the mean difference of their forgetting over the diagonals that both reach,
per seed: where its interval holds zero they are called a tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean

from adapt_runs import Study
from adapt_ways import Found, find
from record import table
from study import Claim, Effect, Section, interval, mean_and_half

from holdfast.adapters import LossMatrix

__all__ = ["LEAST", "at", "curve", "equal_rates", "front", "frontier", "gap", "gaps", "gives"]

LEAST = 0.01
"""Bits per byte: the least difference of interest."""
_SAMPLES = 21
_SMALL, _LARGE = "LoRA r", "LoRA r·T"

Point = tuple[float, float]
"""Mean diagonal and forgetting, bits per byte."""


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both, best diagonal first."""
    kept = list[Point]()
    for diagonal, forgetting in sorted(points):
        if not kept or forgetting < kept[-1][1]:
            kept.append((diagonal, forgetting))
    return kept


def at(points: Sequence[Point], diagonal: float) -> float:
    """Forgetting at a mean diagonal; NaN where it is not reached."""
    best = front(points)
    if diagonal < best[0][0]:
        return math.nan
    for (left, high), (right, low) in pairwise(best):
        if diagonal < right:
            return high + (low - high) * (diagonal - left) / (right - left)
    return best[-1][1]


def gap(one: Sequence[Point], other: Sequence[Point], base: float) -> float:
    """Mean of one's forgetting minus the other's from the best diagonal that both reach to the base's. NaN where
    one of them does not get below the base."""
    start = max(front(points)[0][0] for points in (one, other))
    if start >= base:
        return math.nan
    steps = [start + (base - start) * number / (_SAMPLES - 1) for number in range(_SAMPLES)]
    return mean(at(one, step) - at(other, step) for step in steps)


def curve(found: Found, seed: int) -> list[Point]:
    """The base and a point for each rate."""
    of_seed = [matrices[seed] for matrices in found.matrices.values()]
    return [(of_seed[0].base, 0.0), *((matrix.diagonal, matrix.forgetting) for matrix in of_seed)]


def gaps(one: Found, other: Found) -> list[float]:
    """One per seed."""
    return [gap(curve(one, s), curve(other, s), one.best[s].base) for s in range(len(one.best))]


def equal_rates(one: Found, other: Found) -> list[float]:
    """Mean difference of forgetting over the rates that both were trained at, one per seed."""
    shared = [rate for rate in one.matrices if rate in other.matrices]
    pairs = [zip(one.matrices[rate], other.matrices[rate], strict=True) for rate in shared]
    by_rate = [[a.forgetting - b.forgetting for a, b in pair] for pair in pairs]
    return [mean(of_seed) for of_seed in zip(*by_rate, strict=True)]


def gives(one: Found, other: Found, what: str) -> list[float]:
    """Difference of a number of both matrices, each at its tuned rate, one per seed."""
    return [getattr(a, what) - getattr(b, what) for a, b in zip(one.best, other.best, strict=True)]


def negated(values: Sequence[float]) -> list[float]:
    return [-value for value in values]


# -- the section ------------------------------------------------------------------------------------------------------


def frontier(study: Study) -> Section:
    found = find(study)
    text = (
        f"{_rules()}\n\n### At the tuned rate, and at equal diagonals\n\nThe tuned rate has the lowest final loss of "
        f"those tried; * marks the lowest or highest of them. Gaps are against {_SMALL}, which is tuned too.\n\n"
        f"{_overview(found)}\n\n### Every rate\n\nBits per byte; clipped: changes clipped at zero, divided by T. "
        f"Drift is of text that is no task's.\n\n{_every_rate(found)}"
    )
    return Section("Forgetting against learning", text, _claims(found))


def _rules() -> str:
    return str(__doc__).partition("\n\n")[2].strip()


def _overview(found: Mapping[str, Found]) -> str:
    rows = []
    for name, system in found.items():
        told = f" (told {system.system.knows})" if system.system.knows else ""
        numbers = [_column(system.best, what) for what in ("diagonal", "forgetting", "final", "drift")]
        versus = gaps(system, found[_SMALL]) if name != _SMALL else []
        rate = f"{system.tuned:g}{'*' * system.is_at_edge}"
        rows.append([name + told, f"{system.stored:,}", f"{system.active:,}", rate, *numbers, _versus(versus)])
    columns = ["system", "stored", "active", "rate", "mean diagonal", "forgetting", "final", "drift"]
    return table([*columns, f"forgetting − that of {_SMALL}, equal diagonals"], rows)


def _column(matrices: Sequence[LossMatrix], what: str) -> str:
    return mean_and_half([getattr(matrix, what) for matrix in matrices])


def _versus(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if not all(map(math.isfinite, values)):
        return "no shared diagonal in every seed"
    middle, half = interval(values)
    word = "tie" if abs(middle) <= half else "less" if middle < 0 else "more"
    return f"{mean_and_half(values, signed=True)}: {word}"


def _every_rate(found: Mapping[str, Found]) -> str:
    numbers = ("diagonal", "forgetting", "clipped_forgetting", "final", "drift")
    rows = [
        [name, f"{rate:g}", *(_column(matrices, what) for what in numbers)]
        for name, system in found.items()
        for rate, matrices in system.matrices.items()
    ]
    return table(["system", "rate", "mean diagonal", "forgetting", "clipped", "final", "drift"], rows)


def _claims(found: Mapping[str, Found]) -> list[Claim]:
    small, large, mora = found[_SMALL], found[_LARGE], found["MoRA"]
    added, oracle = found["freeze and add"], found["LoRA per domain"]
    routed, ungated = found["Brainstacks, routed"], found["Brainstacks, ungated"]
    mora_paper, stacks_paper = "MoRA, arXiv 2506.21035", "Brainstacks, arXiv 2604.01152"

    def less(name: str, values: Sequence[float]) -> Effect:
        return Effect(name, negated(values), LEAST)

    tuned = [
        less(f"{_LARGE} − MoRA, forgetting", gives(mora, large, "forgetting")),
        less("freeze and add − MoRA, forgetting", gives(mora, added, "forgetting")),
        less(f"{_LARGE} − MoRA, final", gives(mora, large, "final")),
    ]
    margin = [1.02 * b.final - a.final for a, b in zip(routed.best, oracle.best, strict=True)]
    claims = [
        Claim(
            "MoRA, tuned, forgets less than as large a LoRA and freeze-and-add, and ends no worse", mora_paper, tuned
        ),
        _bar("MoRA forgets less than as large a LoRA at equal rates", mora, large),
        _bar("Routed Brainstacks forgets less than as large a LoRA at equal rates", routed, large),
        _bar("Routed Brainstacks forgets less than O-LoRA at equal rates", routed, found["O-LoRA"]),
        Claim(
            "Routed Brainstacks ends within 2 % of a LoRA for each known domain",
            stacks_paper,
            [Effect("1.02 × LoRA per domain − routed, final", margin, 0.0)],
        ),
        _curve("MoRA forgets less than as large a LoRA at equal diagonals", mora_paper, mora, large),
        _curve("MoRA forgets less than a small LoRA at equal diagonals", mora_paper, mora, small),
        _curve("O-LoRA forgets less than a small LoRA at equal diagonals", "arXiv 2310.14152", found["O-LoRA"], small),
        _curve(
            "InfLoRA forgets less than O-LoRA at equal diagonals", "arXiv 2404.00228", found["InfLoRA"], found["O-LoRA"]
        ),
        _curve("Ungated Brainstacks forgets more than a small LoRA at equal diagonals", "expected", small, ungated),
    ]
    for name in [name for name in found if name.startswith("ours: ")]:
        statement = f"{name.removeprefix('ours: ')} forgets less than a small LoRA at equal diagonals"
        claims.append(_curve(statement, "ours", found[name], small))
    return claims


def _bar(statement: str, one: Found, other: Found) -> Claim:
    name = f"{other.system.name} − {one.system.name}, forgetting, mean over shared rates"
    return Claim(statement, "bar", [Effect(name, negated(equal_rates(one, other)), LEAST)])


def _curve(statement: str, source: str, one: Found, other: Found) -> Claim:
    name = f"{other.system.name} − {one.system.name}, forgetting, mean over shared diagonals"
    return Claim(statement, source, [Effect(name, negated(gaps(one, other)), LEAST)])
