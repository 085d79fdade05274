"""Experiments of `checkfree_study.py`: rollback and redundant computation, and one choice changed at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from checkfree_claims import Claim, Effect, Section, mean_and_half, with_control
from checkfree_compare import (
    CHECKFREE,
    COLUMNS,
    LEAST_RATIO,
    LEAST_STEPS,
    PLUS,
    REDUNDANT,
    Against,
    against,
    control,
    everywhere,
    inside,
    none,
    plain_runs,
)
from checkfree_runs import EXACT, Study
from record import table

from holdfast.fault_tolerance.stage_policy import MomentRepair, RateMode, Repair
from holdfast.fault_tolerance.stage_repair import CODE_WEIGHTING, Weighting
from holdfast.trainer.stage_method import Method

__all__ = ["ablations", "rollback"]

INTERVALS = (10, 50, 100)
"""Steps made between copies."""


# -- 7: rollback ------------------------------------------------------------------------------------------------------


def rollback(study: Study) -> Section:
    """Really trained: lost steps are made again. Failures of all six stages."""
    price, gaps = _measured_price(study), study.scale.gaps
    own = {
        "CheckFree, ends immune": {gap: against(study, CHECKFREE, inside(gap)) for gap in gaps},
        "CheckFree+": {gap: against(study, PLUS, everywhere(gap)) for gap in gaps},
    }
    rolled = {every: {gap: _rolled(study, gap, every) for gap in gaps} for every in INTERVALS}
    rows = list[list[str]]()
    for gap in gaps:
        for every, by_gap in rolled.items():
            expected = f"{_expected(1 / gap, every):.3f}"
            rows.append([f"{gap:g}", f"rollback, interval {every}", *_priced(by_gap[gap], expected)])
        redundant = ["1.000", "1.000", "all", f"{REDUNDANT:.3f}", f"{price:.3f}"]
        rows.append([f"{gap:g}", "exact (redundant computation)", *redundant])
        for name, found in own.items():
            rows.append([f"{gap:g}", name, *_priced(_Rolled(found[gap].ratios, found[gap].misses), "–")])
    columns = ["mean gap, steps", "method", "N / N no failures", "expected", "reached"]
    columns += ["time by the paper's prices", "by prices measured here"]
    text = (
        "Steps made until the target, in steps of an undisturbed run; priced at 1.00 a step, redundant computation at "
        f"{REDUNDANT} (table 2) and at {price:.2f}, the time of a step here with one more forward pass. Neither saving "
        "nor recovery is priced. Expected of rollback: F·q / (1 − (1 − q)^F) for interval F in steps made and rate q "
        "of all stages together, in the long run; a run that is short against the interval ends before it.\n\n"
        f"{table(columns, rows)}"
    )
    claims = [_beats(name, found, every, rolled[every]) for every in INTERVALS for name, found in own.items()]
    section = Section("Rollback, really trained, and redundant computation", text, claims)
    return with_control(section, control(study))


@dataclass(frozen=True)
class _Rolled:
    ratios: Sequence[float]
    """Steps made in steps that an undisturbed run needs."""
    misses: int
    """Runs given up before the target."""


def _priced(found: _Rolled, expected: str) -> list[str]:
    steps = ("≥ " if found.misses else "") + mean_and_half(found.ratios)
    return [steps, expected, f"{len(found.ratios) - found.misses} of {len(found.ratios)}", steps, steps]


def _rolled(study: Study, gap: float, every: int) -> _Rolled:
    """Rolled back runs walk the undisturbed run's path, so they are at the target when as many steps count."""
    goal = study.scale.target_step
    runs = study.runs(Method(Repair.RANDOM, rollback_every=every), everywhere(gap), until=lambda world: goal)
    targets = [plain.losses[goal // study.scale.every] for plain in plain_runs(study)]
    pairs = [(run, target) for run, target in zip(runs, targets, strict=True) if run.counted == goal]
    if any(run.losses[-1] != target for run, target in pairs):
        raise SystemExit("a run that was rolled back left the path of the undisturbed one: rollback is not exact")
    return _Rolled([run.executed / goal for run in runs], len(runs) - len(pairs))


def _expected(rate: float, every: int) -> float:
    return float(every * rate / (1 - (1 - rate) ** every))


def _beats(name: str, own: Mapping[float, Against], every: int, rolled: Mapping[float, _Rolled]) -> Claim:
    effects = []
    for gap, found in own.items():
        other = rolled[gap]
        values = [theirs - ours for theirs, ours in zip(other.ratios, found.ratios, strict=True)]
        label = f"rollback − {name}, gap {gap:g}"
        effects.append(Effect(label, values, LEAST_RATIO, is_too_high=found.misses > 0, is_too_low=other.misses > 0))
    source = "table 2" if every == INTERVALS[-1] else "figure 4b"
    return Claim(f"{name} needs fewer steps than rollback at interval {every}", source, effects)


def _measured_price(study: Study) -> float:
    """A step and one more forward pass, in steps."""
    world = study.worlds[0]

    def measure() -> float:
        simulation, batch = world.simulation(EXACT), world.batch(0)
        simulation.train_step()
        step_s = min(_seconds(simulation.train_step) for _ in range(20))
        tokens, targets = (torch.cat([microbatch[side] for microbatch in batch]) for side in (0, 1))
        joined = [(tokens, targets)]
        return 1 + min(_seconds(partial(simulation.validate, joined)) for _ in range(20)) / step_s

    return float(study.of(world, "price of redundancy", measure))


def _seconds(work: Callable[[], object]) -> float:
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


# -- 8: ablations -----------------------------------------------------------------------------------------------------


def ablations(study: Study) -> Section:
    """CheckFree inside, at the highest rate."""
    failures, decay = inside(study.scale.gaps[-1]), max(1, round(study.scale.gaps[-1]))
    ways = {name: against(study, m, failures) for name, m in {BASE: CHECKFREE, **_changed(decay)}.items()}
    own_plain = study.runs(replace(EXACT, clips_each_stage=True), none)
    for name, weighting in _CLIPPED.items():
        runs = study.runs(replace(CHECKFREE, clips_each_stage=True, weighting=weighting), failures)
        ways[name] = Against(runs, own_plain, study)
    rows = []
    for name, found in ways.items():
        shift = [] if name == BASE else _fewer(found, ways[BASE]).values
        rows.append([name, *found.cells, mean_and_half(shift, 1, signed=True)])
    columns = ["method", *COLUMNS, "extra steps per failure: base − this"]
    text = (
        "Base: learning rate of a rebuilt stage × 1.1 from its first recovery on, moments reset, squared norms before "
        "clipping, all gradients clipped together. Runs that clip each stage alone, as the released code does, are "
        "held against undisturbed ones that do.\n\n" + table(columns, rows)
    )
    return with_control(Section("Ablations", text, _ablation_claims(ways)), control(study))


BASE = "base: × 1.1 once, reset, ω²"
_CLIPPED = {
    "stages clipped alone, ω² before clipping": Weighting(2),
    "stages clipped alone, ω¹ after clipping (released code)": CODE_WEIGHTING,
}


def _changed(decay: int) -> dict[str, Method]:
    return {
        "× 1.0": replace(CHECKFREE, rate=1.0),
        "× 1.2 once": replace(CHECKFREE, rate=1.2),
        "× 1.1 compounding": replace(CHECKFREE, rate_mode=RateMode.COMPOUNDING),
        f"× 1.1 decaying over {decay} steps": replace(CHECKFREE, rate_mode=RateMode.DECAYING, decay_steps=decay),
        "moments averaged": replace(CHECKFREE, moments=MomentRepair.AVERAGED),
        "moments exact": replace(CHECKFREE, moments=MomentRepair.EXACT),
        "ω¹": replace(CHECKFREE, weighting=Weighting(1)),
    }


def _fewer(own: Against, base: Against) -> Effect:
    values = [b - a for a, b in zip(own.per_failure, base.per_failure, strict=True)]
    return Effect(
        "fewer extra steps per failure", values, LEAST_STEPS, is_too_high=own.misses > 0, is_too_low=base.misses > 0
    )


def _ablation_claims(ways: Mapping[str, Against]) -> list[Claim]:
    before, after = (ways[name] for name in _CLIPPED)
    return [
        Claim("Raising the rate × 1.1 after a recovery helps", "algorithm 1", [_fewer(ways[BASE], ways["× 1.0"])]),
        Claim(
            "Averaged moments are better than none", "not in the paper", [_fewer(ways["moments averaged"], ways[BASE])]
        ),
        Claim("Exact moments are better than none", "not in the paper", [_fewer(ways["moments exact"], ways[BASE])]),
        Claim("Squared norms are better than plain ones", "section 4.2", [_fewer(ways[BASE], ways["ω¹"])]),
        Claim("ω² before clipping is better than ω¹ after it", "paper against code", [_fewer(before, after)]),
    ]
