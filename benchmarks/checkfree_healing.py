"""Experiments of `checkfree_study.py`: does healing by boundary logs pay, for one stage and for two adjacent ones?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from checkfree_claims import Claim, Effect, Section, mean_and_half, with_control
from checkfree_damage import LEAST_JUMP, MIDDLE, WAYS
from checkfree_runs import MICROBATCHES, STAGES, Study, World
from record import table

from holdfast.fault_tolerance.stage_policy import GapRepair, Repair
from holdfast.trainer.stage_method import HealingPlan, Method
from holdfast.trainer.stage_simulation import StageSimulation

__all__ = ["gaps", "healing"]

_STATES = ("at once", "healed", "trained", "healed, trained", "trained twice")
States = Mapping[str, float]
"""Validation loss above that before the failure, nats, by what has been done about it."""

_NOT_HEALED = HealingPlan(0)


# -- 9: one stage -----------------------------------------------------------------------------------------------------


def healing(study: Study) -> Section:
    """From every start, at equal compute."""
    ways = {way: replace(method, healing=_NOT_HEALED) for way, method in WAYS.items() if way != "exact"}
    found = _measured(study, "healing", ways, (MIDDLE,))
    budget = study.scale.healing_budget
    text = f"Stage {MIDDLE} is lost. {_setting(study, 1)}\n\n{_table(study, found)}"
    claim = Claim(
        f"Healing, then {budget} steps, beats as much training, from every start", "not in the paper", _gains(found)
    )
    return Section("Healing by boundary logs", text, [claim])


# -- 10: two adjacent stages ------------------------------------------------------------------------------------------

GAP = (MIDDLE, MIDDLE + 1)
INTERPOLATED = "interpolated, ω²"
_ACROSS = {
    INTERPOLATED: Method(Repair.CHECKFREE, gaps=GapRepair.INTERPOLATED, healing=_NOT_HEALED),
    "interpolated, uniform": Method(Repair.UNIFORM, gaps=GapRepair.INTERPOLATED, healing=_NOT_HEALED),
    "each its one neighbour": Method(Repair.UNIFORM, gaps=GapRepair.COPIED, healing=_NOT_HEALED),
    "identity": Method(Repair.IDENTITY, healing=_NOT_HEALED),
    "random": Method(Repair.RANDOM, healing=_NOT_HEALED),
}
_RIVALS = ("each its one neighbour", "identity", "random")


def gaps(study: Study) -> Section:
    """From every start that a gap leaves, at equal compute."""
    found = _measured(study, "gaps", _ACROSS, GAP)
    budget = study.scale.healing_budget
    text = (
        f"Stages {GAP[0]} and {GAP[1]} are lost together. {_setting(study, len(GAP))} Both are one chain, fitted to "
        f"what went into stage {GAP[0]} and came out of stage {GAP[1]}; what crossed in between is lost. Interpolated: "
        f"of stages {GAP[0] - 1} and {GAP[1] + 1}, 2/3 of the nearer and 1/3 of the farther, for ω² times their "
        f"weights.\n\n{_table(study, found)}"
    )
    claims = [
        Claim(
            f"Two adjacent stages healed together, then {budget} steps, beat as much training, from every start",
            "not in the paper",
            _gains(found),
        ),
        *(_against_rivals(found, state, words) for state, words in _ENDS.items()),
    ]
    control = Effect("random − before, at once", [seed["random"]["at once"] for seed in found], LEAST_JUMP)
    return with_control(Section("Two adjacent stages lost, healed together", text, claims), control)


_ENDS = {"at once": "at once", "healed": "once healed", "healed, trained": "once healed and trained on"}


def _against_rivals(found: Sequence[Mapping[str, States]], state: str, words: str) -> Claim:
    effects = [
        Effect(f"{rival} − interpolated", [own[rival][state] - own[INTERPOLATED][state] for own in found], LEAST_JUMP)
        for rival in _RIVALS
    ]
    return Claim(f"Two stages interpolated across the gap do the least damage, {words}", "not in the paper", effects)


# -- both -------------------------------------------------------------------------------------------------------------


def _setting(study: Study, lost: int) -> str:
    budget = study.scale.healing_budget
    whose = "that stage" if lost == 1 else f"these {lost} stages"
    return (
        f"This happens after {study.scale.points[-1]} steps; it is rebuilt, and then either healed by "
        f"{_updates(study, lost)} updates of {whose} alone on logged microbatches, or the whole model is trained for "
        f"{budget} steps, which is as much work on stages (embedding, head and the optimizer's steps of other stages "
        "are not counted, to the disadvantage of healing). Validation loss above that before the failure, nats; a gain "
        "above 0 speaks for healing. Training also moves the other stages on and uses new text, healing does not."
    )


def _updates(study: Study, lost: int) -> int:
    return study.scale.healing_budget * STAGES * MICROBATCHES // lost


def _table(study: Study, found: Sequence[Mapping[str, States]]) -> str:
    budget = study.scale.healing_budget
    columns = ["start", "at once", "healed", f"+{budget} steps", f"healed, +{budget} steps", f"+{2 * budget} steps"]
    columns += ["gain of healing over as much training", f"the same {budget} steps later"]
    rows = []
    for way in found[0]:
        own = [seed[way] for seed in found]
        first = [o["trained"] - o["healed"] for o in own]
        cells = [mean_and_half([o[name] for o in own]) for name in _STATES]
        rows.append([way, *cells, *(mean_and_half(values, signed=True) for values in (first, _later(own)))])
    return table(columns, rows)


def _gains(found: Sequence[Mapping[str, States]]) -> list[Effect]:
    return [Effect(way, _later([seed[way] for seed in found]), LEAST_JUMP) for way in found[0]]


def _later(own: Sequence[States]) -> list[float]:
    return [o["trained twice"] - o["healed, trained"] for o in own]


def _measured(
    study: Study, name: str, ways: Mapping[str, Method], lost: Sequence[int]
) -> list[Mapping[str, Mapping[str, float]]]:
    """One per seed: by way and state."""
    updates = _updates(study, len(lost))

    def measure(world: World) -> dict[str, dict[str, float]]:
        base = study.base(world)
        return {way: _heal_and_train(world, base, method, lost, updates) for way, method in ways.items()}

    return [study.of(world, name, lambda: measure(world)) for world in study.worlds]  # noqa: B023


def _heal_and_train(
    world: World, base: StageSimulation, method: Method, lost: Sequence[int], updates: int
) -> dict[str, float]:
    before, budget = base.validate(world.validation), world.scale.healing_budget

    def loss(simulation: StageSimulation, steps: int = 0) -> float:
        for _ in range(steps):
            simulation.train_step()
        return simulation.validate(world.validation) - before

    plain, healed = base.fork(method), base.fork(replace(method, healing=HealingPlan(updates)))
    for simulation in (plain, healed):
        simulation.fail(lost)
    values = (loss(plain), loss(healed), loss(plain, budget), loss(healed, budget), loss(plain, budget))
    return dict(zip(_STATES, values, strict=True))
