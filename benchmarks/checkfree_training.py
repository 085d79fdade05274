"""Experiments of `checkfree_study.py` on whole trainings with failures: the paper's figure 2, rates, swaps and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

from checkfree_claims import Claim, Effect, Section, mean_and_half, with_control
from checkfree_compare import (
    CHECKFREE,
    COLUMNS,
    LEAST_LOSS,
    LEAST_RATIO,
    PLUS,
    REDUNDANT,
    SWAPPED,
    Against,
    Failures,
    against,
    control,
    curves_of,
    drawn,
    everywhere,
    inside,
    more_loss,
    none,
    slower,
)
from checkfree_damage import swapped_ends
from checkfree_runs import ENDS, EXACT, STAGES, Study
from record import table

from holdfast.fault_tolerance.stage_policy import Repair
from holdfast.trainer.stage_method import Method

__all__ = ["edges", "figure_two", "rates", "swap"]

CLOSE = 0.05
"""Nats. A final loss is called close where it is higher by less."""


# -- 3: figure 2 ------------------------------------------------------------------------------------------------------


def figure_two(study: Study) -> Section:
    """End stages immune, the highest rate."""
    failures = inside(study.scale.gaps[-1])
    kinds = {"random": Repair.RANDOM, "copy previous": Repair.COPY_PREVIOUS, "uniform": Repair.UNIFORM}
    methods = {**{name: replace(CHECKFREE, repair=kind) for name, kind in kinds.items()}, "ω²": CHECKFREE}
    exact = {"exact": against(study, EXACT, none)}
    ways = exact | {name: against(study, method, failures) for name, method in methods.items()}
    marks = [(len(ways["exact"].runs[0].losses) - 1) * part // 4 for part in (1, 2, 3)]
    rows = [
        [name, *(mean_and_half([run.losses[mark] for run in found.runs]) for mark in marks), *found.cells]
        for name, found in ways.items()
    ]
    columns = ["repair", *(f"loss at {mark * study.scale.every}" for mark in marks), *COLUMNS]
    text = "Validation loss, nats per byte; the same failures and batches for all.\n\n" + table(columns, rows)
    order = ("random", "copy previous", "uniform", "ω²", "exact")
    claims = [
        Claim(f"{worse} ends above {better}", "figure 2", [more_loss(f"{worse} − {better}", ways[worse], ways[better])])
        for worse, better in pairwise(order)
    ]
    title = "The paper's figure 2: ends immune, highest rate"
    return with_control(Section(title, text, claims, curves_of(ways)), control(study))


# -- 4: rates ---------------------------------------------------------------------------------------------------------


def rates(study: Study) -> Section:
    gaps = study.scale.gaps
    methods: Mapping[str, tuple[Method, Callable[[float], Failures]]] = {
        "CheckFree, ends immune": (CHECKFREE, inside),
        "CheckFree, as many failures as CheckFree+": (CHECKFREE, _moved),
        "CheckFree+": (PLUS, everywhere),
    }
    found = {name: {g: against(study, m, of(g)) for g in gaps} for name, (m, of) in methods.items()}
    calm = {"CheckFree": against(study, EXACT, none), "CheckFree+": against(study, SWAPPED, none)}
    rows = [[name, "none", *ways.cells] for name, ways in calm.items()]
    rows += [[name, f"{gap:g}", *ways.cells] for name, by_gap in found.items() for gap, ways in by_gap.items()]
    immune, equal, plus = found.values()
    text = (
        "Failures that average rebuilding cannot repair (adjacent stages at one step) are thinned out for all methods "
        "alike.\n\n" + table(["method", "mean gap, steps", *COLUMNS], rows)
    )
    curves = curves_of({f"{name}, gap {gap:g}": w for name, by_gap in found.items() for gap, w in by_gap.items()})
    claims = [
        *(_growth(name, start, by_gap) for (name, by_gap), start in zip(found.items(), _starts(calm), strict=True)),
        _plus_claim("ends of CheckFree immune", "table 2", immune, plus),
        _plus_claim("as many failures", "not in the paper", equal, plus),
        _close("CheckFree+", plus[gaps[-1]]),
        _close("CheckFree", immune[gaps[-1]]),
        *_prices("CheckFree", immune),
        *_prices("CheckFree+", plus),
    ]
    return with_control(Section("Rates", text, claims, curves), control(study))


def _moved(gap: float) -> Failures:
    return lambda world: world.moved_inside(gap)


def _starts(calm: Mapping[str, Against]) -> list[Against]:
    return [calm["CheckFree"], calm["CheckFree"], calm["CheckFree+"]]


def _growth(name: str, calm: Against, by_gap: Mapping[float, Against]) -> Claim:
    chain = [("none", calm), *((f"{gap:g}", found) for gap, found in by_gap.items())]
    effects = [slower(f"gap {b} − gap {a}", y, x) for (a, x), (b, y) in pairwise(chain)]
    return Claim(f"{name}: more failures, more steps to the target", "table 2", effects)


def _plus_claim(what: str, source: str, checkfree: Mapping[float, Against], plus: Mapping[float, Against]) -> Claim:
    effects = [slower(f"CheckFree − CheckFree+, gap {gap:g}", own, plus[gap]) for gap, own in checkfree.items()]
    return Claim(f"CheckFree+ needs fewer steps than CheckFree, {what}", source, effects)


def _close(name: str, found: Against) -> Claim:
    values = [CLOSE - extra for extra in found.extra_loss]
    effect = Effect(f"{CLOSE:g} nats − extra final loss", values, LEAST_LOSS)
    return Claim(
        f"{name} at the highest rate ends within {CLOSE:g} nats of no failures", "table 3, there in words", [effect]
    )


def _prices(name: str, by_gap: Mapping[float, Against]) -> list[Claim]:
    """Table 2: both beat redundant computation at the lower two rates, neither does at the highest."""
    *low, high = by_gap.items()
    less = [
        Effect(
            f"{REDUNDANT} − N / N, gap {gap:g}", [REDUNDANT - r for r in found.ratios], LEAST_RATIO, found.misses > 0
        )
        for gap, found in low
    ]
    gap, found = high
    values = [ratio - REDUNDANT for ratio in found.ratios]
    more = Effect(f"N / N − {REDUNDANT}, gap {gap:g}", values, LEAST_RATIO, is_too_low=found.misses > 0)
    return [
        Claim(f"{name} takes less time than redundant computation at the lower two rates", "table 2", less),
        Claim(f"{name} takes more time than redundant computation at the highest rate", "table 2", [more]),
    ]


# -- 5: swaps ---------------------------------------------------------------------------------------------------------


def swap(study: Study) -> Section:
    plain, swapped = (against(study, method, none) for method in (EXACT, SWAPPED))
    rows = [[name, *ways.cells[1:5]] for name, ways in (("plain", plain), ("swapped", swapped))]
    ends, claims = swapped_ends(study)
    slow = Claim(
        "Swaps slow training down without failures", "section 5, figure 4", [slower("swapped − plain", swapped, plain)]
    )
    text = f"Without failures:\n\n{table(['routes', *COLUMNS[1:5]], rows)}\n\n"
    text += f"After {study.scale.points[-1]} undisturbed steps:\n\n{ends}"
    return Section("What swaps cost and bring", text, [slow, *claims], curves_of({"plain": plain, "swapped": swapped}))


# -- 6: ends ----------------------------------------------------------------------------------------------------------


def edges(study: Study) -> Section:
    """Only one end stage fails, as often as all six together at the highest rate in the sweep."""
    gap = study.scale.gaps[-1] / STAGES
    rows, claims, ways = [], [], dict[str, Against]()
    for stage, repair in zip(ENDS, (Repair.COPY_NEXT, Repair.COPY_PREVIOUS), strict=True):
        failures = drawn(gap, (stage,))
        naive, plus = (against(study, m, failures) for m in (replace(CHECKFREE, repair=repair), PLUS))
        ways |= {f"S{stage}, copy without swaps": naive, f"S{stage}, CheckFree+": plus}
        effect = more_loss("copy without swaps − CheckFree+, final loss", naive, plus)
        claims.append(
            Claim(f"If only S{stage} fails, CheckFree+ ends lower than copies without swaps", "section 4.3", [effect])
        )
    rows = [[name, *found.cells] for name, found in ways.items()]
    text = f"One end stage fails, on average every {gap * STAGES:g} steps.\n\n" + table(["method", *COLUMNS], rows)
    return Section("Edges", text, claims, curves_of(ways))
