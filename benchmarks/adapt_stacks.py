"""Experiments of `adapt_study.py` on Brainstacks: which stacks act, boosting, and the null space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import mean
from typing import Any

from adapt_frontier import LEAST
from adapt_modes import MODES
from adapt_runs import Learner, Run, Study, Way, World, bits
from adapt_ways import find, runs_of, ways
from record import table
from study import Claim, Effect, Section, mean_and_half
from torch import nn

from holdfast.adapters import adapters_of, using_tasks
from holdfast.adapters.methods.brainstacks import protect, protected_directions

__all__ = ["boosting", "modes", "null_space"]

_PAPER = "Brainstacks, arXiv 2604.01152"
_SAMPLES = 8
"""Batches of an earlier domain from which its directions are found."""


# -- which stacks act -------------------------------------------------------------------------------------------------


def modes(study: Study) -> Section:
    """All at the rate of the best prefix, the loss that training itself sees."""
    found = find(study)
    rate = found["Brainstacks, prefix"].tuned
    runs = runs_of(study, ways(study.scale)["Brainstacks"], rate)
    oracle = found["LoRA per domain"].best
    by_mode = {mode: [run.matrix(mode) for run in runs] for mode in MODES}
    rows = [
        [
            mode,
            *(mean_and_half([getattr(m, what) for m in of_mode]) for what in ("diagonal", "forgetting", "final")),
            mean_and_half([_worst(m.last, m.rows[0]) for m in of_mode], 1, signed=True),
            mean_and_half([m.drift for m in of_mode], signed=True),
        ]
        for mode, of_mode in by_mode.items()
    ]
    columns = ["mode", "mean diagonal", "forgetting", "final", "worst domain, % over the base", "drift"]
    replayed = all(change == 0 for matrix in by_mode["prefix"] for change in matrix.changes)
    text = (
        f"At rate {rate:g}. Known are the domain (own-only, prefix) or all losses (oracle subset: the best of 2^T for "
        "each kind of text); the router and the likelihood choose for each window by its first half, the router among "
        "all subsets, the likelihood among base and prefixes. Text of no task gets the base where the domain is known."
        f" The replay of every prefix is {'' if replayed else 'NOT '}bit-identical. "
        f"A LoRA for each known domain ends at {mean_and_half([m.final for m in oracle])}, the base at "
        f"{mean_and_half([m.base for m in oracle])}.\n\n{table(columns, rows)}\n\nBy rate, in means over seeds: "
        f"{_recovered_by_rate(study)}."
    )
    finals = {mode: [matrix.final for matrix in of_mode] for mode, of_mode in by_mode.items()}
    worst = [0.01 - _worst(m.last, m.rows[0]) / 100 for m in by_mode["routed"]]
    claims = [
        Claim(
            "All stacks at once are worse than the best subset",
            _PAPER,
            [_minus(finals, "ungated", "oracle subset")],
        ),
        Claim("Routed stacks end better than all at once", _PAPER, [_minus(finals, "ungated", "routed")]),
        Claim(
            "Routing recovers 80 % of what ungated stacks lose",
            "bar",
            [Effect("recovered share − 0.8", [share - 0.8 for share in _recovered(by_mode)], 0.0)],
        ),
        Claim("Routed is never worse than the base by more than 1 %", "bar", [Effect("0.01 − excess", worst, 0.0)]),
        Claim(
            "A router by outcome ends better than one by label",
            _PAPER,
            [_minus(finals, "routed by label", "routed")],
        ),
        Claim(
            "Prefixes chosen by likelihood, without a router, end better than routed",
            "ours",
            [_minus(finals, "routed", "likelihood")],
        ),
    ]
    return Section("Which stacks act", text, claims)


def _minus(finals: Mapping[str, Sequence[float]], one: str, other: str) -> Effect:
    values = [a - b for a, b in zip(finals[one], finals[other], strict=True)]
    return Effect(f"{one} − {other}, final", values, LEAST)


def _worst(last: Sequence[float], base: Sequence[float]) -> float:
    """Percent over the base of the domain that fares worst."""
    return max(100 * (end / start - 1) for end, start in zip(last, base, strict=True))


def _recovered(by_mode: Mapping[str, Sequence[Any]]) -> list[float]:
    """(ungated − routed) / (ungated − oracle subset), of final losses, one per seed."""
    trios = zip(by_mode["ungated"], by_mode["routed"], by_mode["oracle subset"], strict=True)
    return [_share(all_on.final - routed.final, all_on.final - best.final) for all_on, routed, best in trios]


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _recovered_by_rate(study: Study) -> str:
    way, told = ways(study.scale)["Brainstacks"], []
    for rate in study.rates(way):
        runs = runs_of(study, way, rate)
        lost = mean(run.matrix("ungated").final - run.matrix("oracle subset").final for run in runs)
        found = mean(run.matrix("ungated").final - run.matrix("routed").final for run in runs)
        told.append(f"at {rate:g} ungated loses {lost:.3f} and routing recovers {found:.3f} of it")
    return "; ".join(told)


# -- boosting ---------------------------------------------------------------------------------------------------------

_BOOSTED, _SHORT = "boosted", "(c) one stack, S steps"
_RIVALS = ("(a) one stack of R × rank", "(a) one LoRA of R × rank", "(b) one stack, R warm restarts", "one stack")


def boosting(study: Study) -> Section:
    """On each seed's first domain; all but the short control see the same batches."""
    scale, found = study.scale, dict[str, list[float]]()
    for world in study.worlds:
        tried = [study.of(world, f"boosting at {r:g}", partial(boosted, world, r)) for r in scale.boost_rates]
        for name in tried[0]:
            found.setdefault(name, []).append(min(of_rate[name] for of_rate in tried))
    rows = [[name, mean_and_half(values)] for name, values in found.items()]
    text = (
        f"R = {scale.rounds} rounds of S = {scale.boost_steps} steps against R·S steps, by the best of the rates "
        f"{', '.join(f'{rate:g}' for rate in scale.boost_rates)}. Every round is a new stack on the frozen ones; "
        "nothing is dropped or stopped early. Bits per byte of the seed's first domain.\n\n"
        f"{table(['trained', 'loss'], rows)}"
    )
    claims = [_boost_claim(found, f"Boosting beats {rival}", rival) for rival in (_SHORT, *_RIVALS)]
    return Section("Boosting against honest controls", text, claims)


def _boost_claim(found: Mapping[str, Sequence[float]], statement: str, rival: str) -> Claim:
    values = [other - own for other, own in zip(found[rival], found[_BOOSTED], strict=True)]
    return Claim(statement, _PAPER, [Effect(f"{rival} − boosted", values, LEAST)])


def boosted(world: World, rate: float) -> dict[str, float]:
    """Losses of one domain, by how it was trained."""
    scale, domain = world.scale, world.order[0]
    steps, length = scale.boost_steps, scale.boost_steps * scale.rounds
    stack, low = ways(scale)["Brainstacks"], ways(scale)["LoRA r"]

    def wide(way: Way) -> Way:
        return replace(way, options={**way.options, "rank": way.options["rank"] * scale.rounds})

    learner, losses = Learner(world, stack, rate), list[float]()
    for number in range(scale.rounds):
        learner.train(domain, f"{domain}/{number + 1}", world.plan(rate, steps), after=number * steps)
        losses.append(bits(learner.model, world.validation[domain]))
    found = {"base": bits(world.base, world.validation[domain]), _SHORT: losses[0], _BOOSTED: losses[-1]}
    for name, way, restarts in zip(
        _RIVALS, (wide(stack), wide(low), stack, stack), (1, 1, scale.rounds, 1), strict=True
    ):
        other = Learner(world, way, rate)
        other.train(domain, domain, world.plan(rate, length, restarts))
        found[name] = bits(other.model, world.validation[domain])
    return found


# -- the null space ---------------------------------------------------------------------------------------------------

_SIDES = {"train_only": "output", "output": "output", "input": "input"}


def null_space(study: Study) -> Section:
    rate = find(study)["Brainstacks, prefix"].tuned
    usual = ways(study.scale)["Brainstacks"]
    found = {"off": runs_of(study, usual, rate)}
    for projection in _SIDES:
        way = replace(usual, name=f"Brainstacks, {projection}", options={**usual.options, "projection": projection})
        found[projection] = study.runs(way, rate, views=_two_views, extras=leak, prepare=protection)
    rows = [
        [
            name,
            *(mean_and_half([getattr(r.matrix("ungated"), what) for r in runs]) for what in ("forgetting", "final")),
            mean_and_half([run.matrix("prefix").diagonal for run in runs]),
            f"{max(run.extras[-1] for run in runs):.1e}" if name in _SIDES else "–",
        ]
        for name, runs in found.items()
    ]
    columns = ["projection", "forgetting, ungated", "final, ungated", "mean diagonal", "largest share inside"]
    text = (
        f"At rate {rate:g}, {study.scale.directions} directions for each earlier domain. Share inside: of the energy "
        f"of the last stack's frozen up (input: down) matrices that lies in them.\n\n{table(columns, rows)}"
    )
    claims = [_null_claim(found, name) for name in _SIDES]
    return Section("Null space", text, claims)


def _null_claim(found: Mapping[str, Sequence[Run]], name: str) -> Claim:
    pairs = zip(found["off"], found[name], strict=True)
    less = [off.matrix("ungated").forgetting - on.matrix("ungated").forgetting for off, on in pairs]
    source = _PAPER if name != "input" else "arXiv 2404.00228, for stacks"
    return Claim(
        f"Null space, {name}: ungated stacks forget less", source, [Effect("off − on, forgetting", less, LEAST)]
    )


def _two_views(learner: Learner) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"ungated": learner.world.losses(learner.model), "prefix": {}}
    for kind, batches in learner.world.validation.items():
        count = learner.learned.index(kind) + 1 if kind in learner.learned else 0
        with using_tasks(learner.model, first=count):
            found["prefix"][kind] = bits(learner.model, batches)
    return found


def protection(learner: Learner, _: str) -> Callable[[nn.Module], None]:
    """Keeps the task that begins out of the directions of all earlier domains."""
    method, world = adapters_of(learner.model).method, learner.world
    side = _SIDES[method.projection]  # type: ignore[attr-defined]  # Brainstacks has one

    def run(domain: str) -> None:
        for tokens, _ in islice(world.domain(domain), _SAMPLES):
            learner.model(tokens)

    def prepare(model: nn.Module) -> None:
        if learner.learned:
            samples = {domain: partial(run, domain) for domain in learner.learned}
            learner.bases = protected_directions(model, samples, count=world.scale.directions, side=side)
            protect(model, learner.bases)

    return prepare


def leak(learner: Learner) -> float:
    """Largest share, over layers, of the energy of the last stack inside what it should have left alone."""
    adapters, shares = adapters_of(learner.model), [0.0]
    side = "down" if adapters.method.projection == "input" else "up"  # type: ignore[attr-defined]  # as above
    for name, basis in learner.bases.items():
        rows = adapters.layers[name].task_rows(len(learner.learned) - 1)[side]
        inside = (rows.double() @ basis.double().T).square().sum() / rows.double().square().sum().clamp_min(1e-30)
        shares.append(float(inside))
    return max(shares)
