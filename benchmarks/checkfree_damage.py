"""Experiments of `checkfree_study.py` on one lost stage: is it rebuilt by the formula, and what does it cost at once
and until that is made good?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from checkfree_claims import Claim, Effect, Section, mean_and_half, with_control
from checkfree_runs import EXACT, MICROBATCHES, STAGES, Study, World
from record import table

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stage_policy import Repair
from holdfast.fault_tolerance.stage_repair import Weighting
from holdfast.trainer.stage_method import Method
from holdfast.trainer.stage_simulation import StageSimulation

__all__ = ["LEAST_JUMP", "MIDDLE", "WAYS", "fidelity", "instant", "swapped_ends"]

WAYS: Mapping[str, Method] = {
    "exact": EXACT,
    "random": Method(Repair.RANDOM),
    "identity": Method(Repair.IDENTITY),
    "copy previous": Method(Repair.COPY_PREVIOUS),
    "copy next": Method(Repair.COPY_NEXT),
    "uniform": Method(Repair.UNIFORM),
    "ω¹": Method(Repair.CHECKFREE, weighting=Weighting(1)),
    "ω²": Method(Repair.CHECKFREE, weighting=Weighting(2)),
}
AVERAGES = ("uniform", "ω¹", "ω²")
LEAST_JUMP = 0.01
"""Nats: a smaller difference in damage is of no interest."""
_CHECK_EVERY = 2
"""Steps between looks at whether the damage is made good."""
MIDDLE = 2

Damage = dict[str, dict[str, dict[str, float]]]
"""Point -> stage -> way -> jump of the validation loss, nats."""


# -- 1: fidelity ------------------------------------------------------------------------------------------------------


def fidelity(study: Study) -> Section:
    """Against a separate computation in fp64, on every stage inside."""
    checks = [study.of(world, "fidelity", lambda: _fidelity(world, study)) for world in study.worlds]  # noqa: B023
    names = {
        "error": "largest error against the formula in fp64, ω¹ and ω², all inner stages (the dead one is NaN)",
        "finite": "weights and the loss of the next step finite",
        "others": "tensors of other stages, embedding and head that changed by a bit",
        "batches": "batches of the next step equal to those without failure",
        "refused": "two adjacent stages lost together refused",
    }
    rows = [[text, *(check[name] for check in checks)] for name, text in names.items()]
    sound = all(
        c["error"] <= 1e-6 and c["finite"] and c["others"] == 0 and c["batches"] and c["refused"] for c in checks
    )
    verdict = "Every check holds." if sound else "A CHECK FAILS: nothing below can be trusted."
    text = f"{verdict} Embedding and head are never lost here, so that they are restored is not shown by this.\n\n"
    return Section("Fidelity", text + table(["check", *(f"seed {w.seed}" for w in study.worlds)], rows))


def _fidelity(world: World, study: Study) -> dict[str, Any]:
    base = study.base(world, point=study.scale.points[0])
    error, others, is_finite = 0.0, 0, True
    for stage in range(1, STAGES - 1):
        for way in ("ω¹", "ω²"):
            fork = base.fork(WAYS[way])
            fork.fail([stage])
            wanted = _by_formula(base, stage, WAYS[way].weighting.exponent)
            error = max(error, *(float((_own(fork, stage)[n].double() - w).abs().max()) for n, w in wanted.items()))
            others += _changed_elsewhere(base, fork, stage)
            is_finite &= bool(torch.isfinite(torch.tensor(fork.train_step())))
            is_finite &= all(bool(torch.isfinite(p).all()) for p in fork.model.parameters())
    same = all(torch.equal(world.batch(base.step)[m][0], fork._batch_of(base.step)[m][0]) for m in range(MICROBATCHES))
    return {"error": error, "finite": is_finite, "others": others, "batches": same, "refused": _refuses_adjacent(base)}


def _own(simulation: StageSimulation, stage: int) -> dict[str, torch.Tensor]:
    per_stage = len(simulation.model.blocks) // STAGES
    blocks = simulation.model.blocks[stage * per_stage : (stage + 1) * per_stage]
    return {f"{n}.{name}": p.detach() for n, block in enumerate(blocks) for name, p in block.named_parameters()}


def _by_formula(base: StageSimulation, stage: int, exponent: int) -> dict[str, torch.Tensor]:
    a, b = (base.norms.get(s) ** exponent for s in (stage - 1, stage + 1))
    before, behind = _own(base, stage - 1), _own(base, stage + 1)
    return {name: (a * before[name].double() + b * behind[name].double()) / (a + b) for name in before}


def _changed_elsewhere(base: StageSimulation, fork: StageSimulation, stage: int) -> int:
    per_stage = len(base.model.blocks) // STAGES
    own = tuple(f"blocks.{stage * per_stage + n}." for n in range(per_stage))
    pairs = zip(base.model.named_parameters(), fork.model.parameters(), strict=True)
    return sum(not torch.equal(p, q) for (name, p), q in pairs if not name.startswith(own))


def _refuses_adjacent(base: StageSimulation) -> bool:
    try:
        base.fork(WAYS["ω²"]).fail([2, 3])
    except ConfigurationError:
        return True
    return False


# -- 2: instant damage ------------------------------------------------------------------------------------------------


def instant(study: Study) -> Section:
    found: list[Damage] = [study.of(world, "instant", lambda: _damage(world, study)) for world in study.worlds]  # noqa: B023
    regained = [study.of(world, "regain", lambda: _regain(world, study)) for world in study.worlds]  # noqa: B023
    points = [str(point) for point in study.scale.points]
    rows = [
        [point, stage, *(_cell(found, point, str(stage), way) for way in WAYS)]
        for point in points
        for stage in range(STAGES)
    ]
    text = (
        "Jump of the validation loss in nats when a stage (counted from 0) is lost after so many steps and rebuilt; "
        "mean ± half the 95 % interval over seeds. –: cannot be rebuilt so.\n\n"
        f"{table(['after steps', 'stage', *WAYS], rows)}\n\n"
        "Training steps until the validation loss is where it was before the failure, looked at after every "
        f"{_CHECK_EVERY}; at most {study.scale.regain_steps}, and how many seeds got there. An undisturbed run takes "
        "0 by definition, though it moves on meanwhile.\n\n" + _regain_table(study, regained)
    )
    control = _worse(found, points[-1], "random", "exact")
    return with_control(Section("Instant damage", text, _damage_claims(found, points[-1])), control)


def _damage(world: World, study: Study) -> Damage:
    bases = {point: study.base(world, point=point) for point in study.scale.points}
    return {
        str(point): {str(stage): _jumps(world, base, stage) for stage in range(STAGES)} for point, base in bases.items()
    }


def _jumps(world: World, base: StageSimulation, stage: int) -> dict[str, float]:
    before = base.validate(world.validation)
    found = {}
    for name, method in WAYS.items():
        if (fork := _failed(base, method, stage)) is not None:
            found[name] = fork.validate(world.validation) - before
    return found


def _failed(base: StageSimulation, method: Method, stage: int) -> StageSimulation | None:
    """None where the stage cannot be rebuilt so."""
    fork = base.fork(method)
    try:
        fork.fail([stage])
    except ConfigurationError:
        return None
    return fork


def _cell(found: Sequence[Damage], point: str, stage: str, way: str) -> str:
    values = [damage[point][stage][way] for damage in found if way in damage[point][stage]]
    return mean_and_half(values)


def _regain(world: World, study: Study) -> dict[str, dict[str, list[float]]]:
    """``point/stage`` -> way -> steps and whether that was enough."""
    found: dict[str, dict[str, list[float]]] = {}
    bases = {point: study.base(world, point=point) for point in {point for point, _ in study.scale.regain}}
    for point, stage in study.scale.regain:
        before, forks = bases[point].validate(world.validation), dict[str, StageSimulation]()
        for name, method in WAYS.items():
            if (fork := _failed(bases[point], method, stage)) is not None:
                forks[name] = fork
        limit = study.scale.regain_steps
        found[f"{point}/{stage}"] = {n: _steps_until(world, fork, before, limit) for n, fork in forks.items()}
    return found


def _steps_until(world: World, fork: StageSimulation, loss: float, limit: int) -> list[float]:
    for step in range(0, limit + 1, _CHECK_EVERY):
        if fork.validate(world.validation) <= loss:
            return [step, 1]
        for _ in range(_CHECK_EVERY):
            fork.train_step()
    return [limit, 0]


def _regain_table(study: Study, found: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    rows = []
    for point, stage in study.scale.regain:
        ways = [seed[f"{point}/{stage}"] for seed in found]
        cells = []
        for way in WAYS:
            steps = [own[way] for own in ways if way in own]
            reached = sum(int(has) for _, has in steps)
            cells.append(f"{mean_and_half([s for s, _ in steps], 1)} ({reached} of {len(steps)})" if steps else "–")
        rows.append([point, stage, *cells])
    return table(["after steps", "stage", *WAYS], rows)


def _worse(found: Sequence[Damage], point: str, way: str, other: str) -> Effect:
    """Over the stages inside, that every way can rebuild."""
    inside = [str(stage) for stage in range(1, STAGES - 1)]
    values = [sum(d[point][s][way] - d[point][s][other] for s in inside) / len(inside) for d in found]
    return Effect(f"{way} − {other}", values, LEAST_JUMP)


def _damage_claims(found: Sequence[Damage], point: str) -> list[Claim]:
    """At the last point."""

    def worse(way: str, other: str) -> Effect:
        return _worse(found, point, way, other)

    source = "expected of figure 2, at once instead of after training"
    rivals = ("identity", "copy previous", "copy next")
    return [
        Claim(
            "A fresh stage does more instant damage than any average", source, [worse("random", a) for a in AVERAGES]
        ),
        Claim("Averages do less instant damage than copies", source, [worse(r, "ω²") for r in rivals[1:]]),
        Claim(
            "Weighting by gradient norms does less instant damage than a plain average",
            source,
            [worse("uniform", "ω²")],
        ),
        Claim(
            "An average does less instant damage than leaving the stage out",
            "not in the paper",
            [worse("identity", "ω²")],
        ),
    ]


# -- 5: what swaps are for --------------------------------------------------------------------------------------------


def swapped_ends(study: Study) -> tuple[str, list[Claim]]:
    """How far the end stages are from their partners with swapped training and without, and what copying costs."""
    found = [study.of(world, "swapped ends", lambda: _ends(world, study)) for world in study.worlds]  # noqa: B023
    measures = {
        "distance 0": "‖S0 − S1‖ / ‖S1‖",
        "distance 5": "‖S5 − S4‖ / ‖S4‖",
        "damage 0": "jump when S0 becomes a copy of S1, nats",
        "damage 5": "jump when S5 becomes a copy of S4, nats",
    }
    rows, claims = [], []
    for name, text in measures.items():
        plain, swapped = ([seed[key][name] for seed in found] for key in ("plain", "swapped"))
        gains = [p - s for p, s in zip(plain, swapped, strict=True)]
        rows.append([text, *(mean_and_half(v) for v in (plain, swapped)), mean_and_half(gains, signed=True)])
        claims.append(Effect(f"plain − swapped: {text}", gains, LEAST_JUMP))
    text = table(["measure", "plain training", "swapped", "plain − swapped"], rows)
    return text, [
        Claim("Swaps bring the weights of end stages nearer to their partners'", "expected of section 4.3", claims[:2]),
        Claim("Swaps lower the damage of copying a partner into an end stage", "section 4.3", claims[2:]),
    ]


def _ends(world: World, study: Study) -> dict[str, dict[str, float]]:
    return {
        name: _ends_of(world, study.base(world, swapped=swapped))
        for name, swapped in (("plain", False), ("swapped", True))
    }


def _ends_of(world: World, base: StageSimulation) -> dict[str, float]:
    before, found = base.validate(world.validation), {}
    for stage, partner, repair in ((0, 1, Repair.COPY_NEXT), (STAGES - 1, STAGES - 2, Repair.COPY_PREVIOUS)):
        own, other = (torch.cat([p.flatten() for p in _own(base, s).values()]) for s in (stage, partner))
        found[f"distance {stage}"] = float((own - other).norm() / other.norm())
        fork = base.fork(replace(base.method, repair=repair, healing=None))
        fork.fail([stage])
        found[f"damage {stage}"] = fork.validate(world.validation) - before
    return found
