"""Experiments of `checkfree_study.py` on what the paper has not: an old copy of the stage itself, and a fitted gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from checkfree_claims import Claim, Effect, Section, mean_and_half, with_control
from checkfree_compare import CHECKFREE, LEAST_LOSS, Failures, inside
from checkfree_damage import LEAST_JUMP, MIDDLE, WAYS
from checkfree_runs import EXACT, MICROBATCHES, STAGES, Run, Study, World
from record import table

from holdfast.fault_tolerance.stage_policy import Repair
from holdfast.trainer.stage_method import HealingPlan, Method, OwnCopy
from holdfast.trainer.stage_simulation import Failure, StageSimulation

__all__ = ["gain", "own_copy", "remedies"]

AVERAGE, ALONE = "average, ω²", "own copy alone"
SHARES = (0.25, 0.5, 0.75)
HALF = 0.5
_STATES = ("at once", "trained", "trained twice")
Found = Sequence[Mapping[str, Mapping[str, float]]]
"""By seed, way and state: validation loss above that before the failure, nats."""


def _after(world: World, base: StageSimulation, method: Method) -> dict[str, float]:
    """What is lost when stage MIDDLE fails, at once and some steps later."""
    before, budget, fork, found = base.validate(world.validation), world.scale.healing_budget, base.fork(method), {}
    fork.fail([MIDDLE])
    for state in _STATES:
        found[state] = fork.validate(world.validation) - before
        for _ in range(budget):
            fork.train_step()
    return found


def _rows(found: Found) -> list[list[str]]:
    return [[way, *(mean_and_half([own[way][state] for own in found]) for state in _STATES)] for way in found[0]]


def _columns(study: Study) -> list[str]:
    budget = study.scale.healing_budget
    return ["repair", "at once", f"+{budget} steps", f"+{2 * budget} steps"]


def _damage(found: Found, way: str) -> Effect:
    """Where this is not seen, nothing smaller would be."""
    return Effect(f"{way} − before, at once", [own[way]["at once"] for own in found], LEAST_JUMP)


def _less(found: Found, way: str, other: str) -> list[Effect]:
    """At once and after training on."""
    return [
        Effect(f"{other} − {way}, {state}", [own[other][state] - own[way][state] for own in found], LEAST_JUMP)
        for state in ("at once", "trained")
    ]


# -- 11: an old copy of the stage itself ------------------------------------------------------------------------------


def own_copy(study: Study) -> Section:
    """Of several ages: alone, and mixed into the average of the neighbours."""
    found = {str(age): list[Mapping[str, Mapping[str, float]]]() for age in study.scale.ages}
    for world in study.worlds:
        by_age = study.of(world, "own copy", lambda: _aged(world, study))  # noqa: B023
        for age, ways in by_age.items():
            found[age].append(ways)
    rows = [[age, *row] for age, own in found.items() for row in _rows(own)]
    text = (
        f"Stage {MIDDLE} is lost some steps after {study.scale.points[-1]}, when a durable copy of it was taken. All "
        "other stages stay as they are. Validation loss above that before the failure, nats.\n\n"
        + table(["age of the copy, steps", *_columns(study)], rows)
    )
    claims = [
        Claim(f"{what} {less}, {age} steps old", "not in the paper", _less(own, way, other))
        for age, own in found.items()
        for what, way, less, other in (
            ("An own copy alone does less damage than", ALONE, "the average of the neighbours", AVERAGE),
            ("Half an own copy in the average does less damage than", _mixed(HALF), "the average alone", AVERAGE),
            ("Half an own copy in the average does less damage than", _mixed(HALF), "the copy alone", ALONE),
        )
    ]
    return with_control(
        Section("An old copy of the stage itself", text, claims), _damage(found[str(study.scale.ages[-1])], AVERAGE)
    )


def _mixed(share: float) -> str:
    return f"{share:g} own copy in the average"


def _aged(world: World, study: Study) -> dict[str, Mapping[str, Mapping[str, float]]]:
    base, every = study.base(world), 2 * study.scale.points[-1]  # so that there is one copy, of now
    ways = {AVERAGE: WAYS["ω²"]}
    shares = {**{_mixed(share): share for share in SHARES}, ALONE: 1.0}
    ways |= {name: replace(WAYS["ω²"], own_copy=OwnCopy(every, share)) for name, share in shares.items()}
    base, found = base.fork(replace(EXACT, own_copy=OwnCopy(every))), {}
    for age in study.scale.ages:
        while base.step < study.scale.points[-1] + age:
            base.train_step()
        found[str(age)] = {way: _after(world, base, method) for way, method in ways.items()}
    return found


# -- 12: a gain -------------------------------------------------------------------------------------------------------

_GAIN = HealingPlan(0, has_gain=True)


def gain(study: Study) -> Section:
    """Alone, and before healing."""
    starts = {"random": "fresh weights", "copy previous": "a copy", "ω²": "the average"}
    updates = study.scale.healing_budget * STAGES * MICROBATCHES
    plans = {"": HealingPlan(0), ", gain": _GAIN, ", healed": HealingPlan(updates)}
    plans[", gain, healed"] = HealingPlan(updates, has_gain=True)
    ways = {start + end: replace(WAYS[start], healing=plan) for start in starts for end, plan in plans.items()}

    def measure(world: World) -> Mapping[str, Mapping[str, float]]:
        base = study.base(world)
        return {way: _after(world, base, method) for way, method in ways.items()}

    found: Found = [study.of(world, "gain", lambda: measure(world)) for world in study.worlds]  # noqa: B023
    text = (
        f"Stage {MIDDLE} is lost after {study.scale.points[-1]} steps and rebuilt. Gain: what it adds to the residual "
        "stream is multiplied by the one number that fits logged microbatches best, kept where those held out agree; "
        f"a forward pass, no update. Healed: by {updates} updates. Validation loss above that before the failure, "
        "nats.\n\n" + table(_columns(study), _rows(found))
    )
    claims = [
        Claim(f"A gain does less damage than none, from {what}", "not in the paper", _less(found, f"{way}, gain", way))
        for way, what in starts.items()
    ]
    claims.append(
        Claim(
            "A gain before healing does less damage than healing alone, from the average",
            "not in the paper",
            _less(found, "ω², gain, healed", "ω², healed"),
        )
    )
    return with_control(Section("A gain fitted to the boundary logs", text, claims), _damage(found, "random"))


# -- 13: failures in a training ---------------------------------------------------------------------------------------


def remedies(study: Study) -> Section:
    """Everything that the paper lacks beside what it has: ends immune, the highest rate, stages that have learned."""
    failures, every = inside(study.scale.gaps[-1]), study.scale.copy_every
    updates = study.scale.healing_budget * STAGES * MICROBATCHES
    methods = {
        "exact": EXACT,
        "random": replace(CHECKFREE, repair=Repair.RANDOM),
        AVERAGE: CHECKFREE,
        "gain": replace(CHECKFREE, healing=_GAIN),
        "healed": replace(CHECKFREE, healing=HealingPlan(updates)),
        "gain, healed": replace(CHECKFREE, healing=HealingPlan(updates, has_gain=True)),
        "half an own copy": replace(CHECKFREE, own_copy=OwnCopy(every, HALF)),
        ALONE: replace(CHECKFREE, own_copy=OwnCopy(every, share=1.0)),
        "rollback of all stages": Method(Repair.RANDOM, rollback_every=every),
    }
    found = {name: _went_on(study, name, method, failures) for name, method in methods.items()}
    plain = found["exact"]
    extra = {name: [_mean_extra(*both) for both in zip(runs, plain, strict=True)] for name, runs in found.items()}
    rows = [
        [name, mean_and_half(extra[name], signed=True), mean_and_half([run.losses[-1] for run in runs])]
        for name, runs in found.items()
    ]
    number = sum(len(run.failures) for run in found["random"]) / len(study.worlds)
    text = (
        f"{study.scale.steps} steps more after {study.scale.points[-1]} undisturbed ones, with {number:.1f} failures "
        f"on average. Copies are taken at the start and after every {every} steps made. Healing takes {updates} "
        f"updates of the stage alone at each failure, as much work as {study.scale.healing_budget} steps, which are "
        "not counted among the steps here. Extra loss: validation loss above that of the undisturbed run, mean over "
        f"all looks at it.\n\n{table(['method', 'extra loss', 'final loss'], rows)}"
    )
    curves = {name: [run.losses for run in runs] for name, runs in found.items()}
    title = "What the paper lacks, in a training with failures: ends immune, highest rate"
    control = Effect("random − no failures, extra loss", extra["random"], LEAST_LOSS)
    return with_control(Section(title, text, _remedy_claims(extra), curves), control)


def _went_on(study: Study, name: str, method: Method, failures: Failures) -> list[Run]:
    found = []
    for world in study.worlds:
        lost = failures(world) if method.repair is not Repair.EXACT else []
        made = study.of(world, f"went on, {name}", lambda: asdict(_go_on(study, world, method, lost)))  # noqa: B023
        found.append(Run(**made))
    return found


def _go_on(study: Study, world: World, method: Method, failures: Sequence[Failure]) -> Run:
    return world.go_on(study.base(world).fork(method), failures)


def _mean_extra(own: Run, plain: Run) -> float:
    """Nats; the start, which they share, left out."""
    return sum(a - b for a, b in zip(own.losses[1:], plain.losses[1:], strict=True)) / (len(own.losses) - 1)


def _remedy_claims(extra: Mapping[str, Sequence[float]]) -> list[Claim]:
    pairs = (
        ("gain", AVERAGE),
        ("healed", AVERAGE),
        ("gain, healed", "healed"),
        ("half an own copy", AVERAGE),
        (ALONE, AVERAGE),
        ("half an own copy", ALONE),
        (ALONE, "rollback of all stages"),
        ("healed", "random"),
    )
    return [_lower(extra, own, other) for own, other in pairs]


def _lower(extra: Mapping[str, Sequence[float]], own: str, other: str) -> Claim:
    values = [b - a for a, b in zip(extra[own], extra[other], strict=True)]
    effect = Effect(f"{other} − {own}, extra loss", values, LEAST_LOSS)
    return Claim(f"{own[0].upper()}{own[1:]} loses less than {other}", "not in the paper", [effect])
