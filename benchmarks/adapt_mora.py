"""Experiment of `adapt_study.py`: does it matter which atoms of MoRA answer, and what do untrained ones cost?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

from adapt_frontier import LEAST, gaps, gives
from adapt_runs import Run, Scale, Study, Way
from adapt_ways import find, runs_of, ways
from record import table
from study import Claim, Effect, Section, mean_and_half

__all__ = ["routing"]

_PAPER = "MoRA, arXiv 2506.21035"


def variants(scale: Scale) -> dict[str, Way]:
    """MoRA with other selections; the first one is the one of the other experiments."""
    usual, equal = (ways(scale)[name] for name in ("MoRA", "MoRA, equal weights"))
    others = {
        "k = r, τ = 0.05": {"top_k": scale.rank, "temperature": 0.05},
        "τ and δ × √(r / R)": {"scales_with_bank": True},
    }
    return {
        "k = 2r, τ = 0.2, c = 2": usual,
        "equal weights: k = R, τ = 1000, c = 4": equal,
        **{n: replace(usual, name=f"MoRA, {n}", options={**usual.options, **o}) for n, o in others.items()},
    }


def routing(study: Study) -> Section:
    systems = find(study)
    sharp, equal = systems["MoRA"], systems["MoRA, equal weights"]
    rate = sharp.tuned
    found = {name: runs_of(study, way, rate) for name, way in variants(study.scale).items()}
    usual = next(iter(found.values()))
    chance = 1 / study.scale.tasks
    own = [_last(run, "mass") - chance for run in usual]
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
    columns = ["selection", "final", "forgetting", "effective atoms", "mass on the domain's own atoms"]
    text = (
        f"At MoRA's tuned rate, {rate:g}. Effective atoms: 1 / Σ w², mean over layers, tokens, domains in the end. "
        f"Mass: share of the weights that falls on the atoms of the text's own domain; chance is {chance:g}. Jump: "
        "what untrained atoms of a next task do to the loss of the domains so far, largest after any task, in percent "
        "of what their tasks had gained. Not run, for lack of such options: a learned router, random keys, experts of "
        f"a higher rank.\n\n{table([*columns, 'jump, % of the gain'], rows)}\n\n### The threshold\n\n"
        f"{_thresholds(usual)}"
    )
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
