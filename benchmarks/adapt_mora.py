"""Experiment of `adapt_study.py`: does it matter which atoms of MoRA answer, and what do untrained ones cost?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from adapt_frontier import LEAST, gaps, gives
from adapt_runs import Run, Scale, Study, Way
from adapt_ways import find, runs_of, ways
from record import table
from study import Claim, Effect, Section, mean_and_half

__all__ = ["routing"]

_PAPER = "MoRA, arXiv 2506.21035"


def routers(scale: Scale) -> dict[str, Way]:
    """Who says which atoms answer; the first one is the one of the other experiments."""
    usual, equal = (ways(scale)[name] for name in ("MoRA", "MoRA, equal weights"))
    return {
        "the atoms themselves: k = 2r, τ = 0.2, c = 2": usual,
        "nobody: equal weights, k = R, c = 4": equal,
        "random keys": _variant(usual, "random keys", method="mora_random"),
        "a linear router, trained and frozen with each task": _variant(usual, "learned router", method="mora_learned"),
        "experts of rank r: k = 2": _variant(usual, "experts of rank r", top_k=2, group=scale.rank),
    }


def selections(scale: Scale) -> dict[str, Way]:
    """MoRA with one option after the other changed; every way trains, as δ acts in inference only."""
    usual = ways(scale)["MoRA"]
    counts = {2: "2", scale.rank: "r", scale.rank * scale.tasks: "R"}
    changes: dict[str, dict[str, Any]] = {f"k = {name}": {"top_k": count} for count, name in counts.items()}
    changes |= {f"τ = {temperature:g}": {"temperature": temperature} for temperature in (0.01, 0.05, 0.3)}
    changes["k = r, τ = 0.05"] = {"top_k": scale.rank, "temperature": 0.05}
    changes["τ and δ × √(r / R)"] = {"scales_with_bank": True}
    return {
        "k = 2r, τ = 0.2": usual,
        **{name: _variant(usual, name, **options) for name, options in changes.items()},
    }


def _variant(usual: Way, name: str, method: str = "mora", **options: Any) -> Way:
    return replace(usual, name=f"MoRA, {name}", method=method, options={**usual.options, **options})


def routing(study: Study) -> Section:
    systems = find(study)
    sharp, equal = systems["MoRA"], systems["MoRA, equal weights"]
    rate, chance = sharp.tuned, 1 / study.scale.tasks
    asked, chosen = (
        {name: runs_of(study, way, rate) for name, way in of(study.scale).items()} for of in (routers, selections)
    )
    usual, nobody, random, learned, grouped = asked.values()
    own = [_last(run, "mass") - chance for run in usual]
    text = (
        f"At MoRA's tuned rate, {rate:g}, for all. Effective atoms: 1 / Σ w², mean over layers, tokens, domains in the "
        "end, of experts where these are larger. Mass: share of the weights that falls on the atoms of the text's own "
        f"domain; chance is {chance:g}. Jump: what untrained atoms of a next task do to the loss of the domains so "
        "far, largest after any task, in percent of what their tasks had gained.\n\n"
        f"### Who chooses\n\n{_table('chosen by', asked)}\n\n### How many, how sharply\n\n"
        f"{_table('selection', chosen)}\n\n### The threshold\n\n{_thresholds(usual)}"
    )
    rivals = {
        "equal weights, at MoRA's rate": nobody,
        "random keys": random,
        "a learned router": learned,
        "experts of rank r": grouped,
    }
    claims = [
        Claim(
            "Atoms that route themselves end better than equal weights, each tuned",
            _PAPER,
            [Effect("equal weights − MoRA, final", gives(equal, sharp, "final"), LEAST)],
        ),
        Claim(
            "Atoms that route themselves forget less than equal weights at equal diagonals",
            _PAPER,
            [Effect("equal weights − MoRA, forgetting", gaps(equal, sharp), LEAST)],
        ),
        *(_ends_better(name, runs, usual) for name, runs in rivals.items()),
        Claim(
            "A domain's tokens find the domain's own atoms",
            _PAPER,
            [Effect("mass on own atoms − chance", own, 0.05)],
        ),
        Claim(
            "Untrained atoms cost less than 1 % of what was gained",
            "bar",
            [Effect("0.01 − jump / gain", [0.01 - _jump(run) for run in usual], 0.0)],
        ),
    ]
    return Section("Routing without a router", text, claims)


def _ends_better(name: str, rivals: Sequence[Run], usual: Sequence[Run]) -> Claim:
    lost = [rival.matrix().final - run.matrix().final for rival, run in zip(rivals, usual, strict=True)]
    return Claim(f"MoRA ends better than with {name}", _PAPER, [Effect("rival − MoRA, final", lost, LEAST)])


def _table(first: str, found: Mapping[str, Sequence[Run]]) -> str:
    rows = [
        [
            name,
            *(mean_and_half([getattr(run.matrix(), what) for run in runs]) for what in ("final", "forgetting")),
            mean_and_half([_last(run, "atoms") for run in runs], 2),
            mean_and_half([_last(run, "mass") for run in runs]),
            mean_and_half([100 * _jump(run) for run in runs], 1),
        ]
        for name, runs in found.items()
    ]
    columns = [first, "final", "forgetting", "effective atoms", "mass on the domain's own", "jump, % of the gain"]
    return table(columns, rows)


def _last(run: Run, what: str) -> float:
    """In the end, mean over domains."""
    return mean(run.extras[-1][what].values())


def _jump(run: Run) -> float:
    """Largest share of the gain after any task but the last, which nothing follows."""
    matrix, shares = run.matrix(), list[float]()
    gain = dict(zip(run.order, (b - own for b, own in zip(matrix.rows[0], matrix.learned, strict=True)), strict=True))
    for after in run.extras[:-1]:
        jumps: Mapping[str, float] = after["jumps"]
        gained = sum(gain[domain] for domain in jumps)
        shares.append(sum(jumps.values()) / gained if gained > 0 else math.inf)
    return max(shares)


def _thresholds(runs: Sequence[Run]) -> str:
    """Training has none, so that it can be chosen afterwards."""
    rows = [
        [view, *(mean_and_half([getattr(run.matrix(view), what) for run in runs]) for what in ("final", "forgetting"))]
        for view in runs[0].views
    ]
    return table(["δ in use", "final", "forgetting"], rows)
