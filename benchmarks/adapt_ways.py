"""The methods that `adapt_study.py` compares, and the systems that are made of them: a method and a way to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from adapt_modes import domain_views, stack_views
from adapt_runs import Learner, Run, Scale, Study, Way, bits

from holdfast.adapters import LossMatrix, adapters_of, boundary_jump, measure_routing
from holdfast.adapters.forgetting import evaluating

__all__ = ["SYSTEMS", "Found", "System", "find", "mora_extras", "runs_of", "ways"]

_SCALE = 2.0
"""Of every update: alpha is twice the rank, as in the released code of arXiv 2506.21035."""
_EXPERTS = 4
_THRESHOLDS = {
    "none": {"threshold": -1.0},
    "0": {"threshold": 0.0},
    "0.1": {"threshold": 0.1},
    "its own × √(r / R)": {"scales_with_bank": "threshold"},
}
"""Of MoRA's inference, besides its own."""


def ways(scale: Scale) -> dict[str, Way]:
    """By method; all but full fine-tuning and the larger LoRA store ``scale.rank`` rows for each task in each layer,
    Brainstacks its gates besides."""
    rank, per_expert = scale.rank, max(1, scale.rank // _EXPERTS)
    low = {"rank": rank, "scale": _SCALE}
    stack = {
        "rank": per_expert,
        "experts": rank // per_expert,
        "top_k": min(2, rank // per_expert),
        "scale": _SCALE / per_expert**0.5,
        "projection": "off",
    }
    mora = {**low, "top_k": 2 * rank, "temperature": 0.2, "threshold": 0.2}
    equal = {**mora, "top_k": rank * scale.tasks, "temperature": 1000.0, "scale": 2 * _SCALE, "threshold": -1.0}
    made = [
        Way(name="LoRA r", method="lora", options=low, below=2),
        Way(name="LoRA r·T", method="lora", options={**low, "rank": rank * scale.tasks}, below=2),
        Way(name="LoRA r, averaged", method="lora", options=low, is_averaged=True, ladder=2.0),
        Way(name="freeze and add", method="freeze_and_add", options=low, below=2),
        Way(name="O-LoRA", method="olora", options=low, below=1),
        Way(name="InfLoRA", method="inflora", options=low, ladder=2.0),
        Way(name="MoRA", method="mora", options=mora, below=1),
        Way(name="MoRA, equal weights", method="mora", options=equal, below=1),
        Way(name="Brainstacks", method="brainstacks", options=stack, above=2),
        Way(name="LoRA per domain", method="oracle", options=low, above=2),
        Way(name="full fine-tuning", ladder=0.25, below=2),
    ]
    return {way.name: way for way in made}


@dataclass(frozen=True)
class System:
    """What somebody would deploy."""

    name: str
    way: str
    view: str = "plain"
    knows: str = ""
    """What it is told that the others are not."""


SYSTEMS = (
    System("LoRA r", "LoRA r"),
    System("LoRA r·T", "LoRA r·T"),
    System("freeze and add", "freeze and add"),
    System("O-LoRA", "O-LoRA"),
    System("InfLoRA", "InfLoRA"),
    System("MoRA", "MoRA"),
    System("MoRA, equal weights", "MoRA, equal weights"),
    System("Brainstacks, ungated", "Brainstacks", "ungated"),
    System("Brainstacks, routed", "Brainstacks", "routed"),
    System("Brainstacks, routed by label", "Brainstacks", "routed by label"),
    System("full fine-tuning", "full fine-tuning"),
    System("ours: LoRA r, averaged", "LoRA r, averaged"),
    System("ours: Brainstacks, prefix by likelihood", "Brainstacks", "likelihood"),
    System("ours: LoRA per domain, by likelihood", "LoRA per domain", "likelihood"),
    System("Brainstacks, own-only", "Brainstacks", "own-only", "the domain"),
    System("Brainstacks, prefix", "Brainstacks", "prefix", "the domain"),
    System("Brainstacks, oracle subset", "Brainstacks", "oracle subset", "the losses"),
    System("LoRA per domain", "LoRA per domain", "own", "the domain"),
)


def threshold_views(learner: Learner) -> dict[str, dict[str, float]]:
    """Of MoRA, as it is and with other thresholds."""
    layers = list(adapters_of(learner.model).layers.values())
    usual, found = layers[0].method, {"plain": learner.world.losses(learner.model)}
    for name, options in _THRESHOLDS.items():
        for layer in layers:
            layer.method = replace(usual, **options)  # type: ignore[arg-type]  # MoRA has them
        found[name] = learner.world.losses(learner.model)
    for layer in layers:
        layer.method = usual
    return found


def mora_extras(learner: Learner) -> dict[str, Any]:
    """After a task: what a new task's untrained atoms do to each domain learned so far, bits per byte; and how atoms
    share the work on its text."""
    jumps, atoms, mass = {}, {}, {}
    for domain in learner.learned:
        batches = learner.world.validation[domain]
        jumps[domain] = boundary_jump(learner.model, lambda: bits(learner.model, batches))  # noqa: B023
        with evaluating(learner.model), measure_routing(learner.model) as stats:
            for tokens, _ in batches:
                learner.model(tokens)
        number, layers = learner.learned.index(domain), list(stats.values())
        atoms[domain] = sum(layer.effective_atoms for layer in layers) / len(layers)
        mass[domain] = sum(layer.mass_by_task[number] for layer in layers) / len(layers)
    return {"jumps": jumps, "atoms": atoms, "mass": mass}


_MEASURED: Mapping[str, Mapping[str, Any]] = {
    "oracle": {"views": domain_views},
    "brainstacks": {"views": stack_views},
    "mora": {"views": threshold_views, "extras": mora_extras},
    "mora_random": {"extras": mora_extras},
    "mora_learned": {"extras": mora_extras},
}
"""By method, besides what every run measures."""


def runs_of(study: Study, way: Way, rate: float) -> list[Run]:
    """One per seed."""
    return study.runs(way, rate, **_MEASURED.get(way.method, {}))


@dataclass(frozen=True)
class Found:
    """One system over its learning rates."""

    system: System
    matrices: Mapping[float, Sequence[LossMatrix]]
    """By rate, lowest first, and seed."""
    stored: int
    active: int

    @property
    def tuned(self) -> float:
        """The rate with the lowest mean final loss."""
        return min(self.matrices, key=lambda rate: mean(m.final for m in self.matrices[rate]))

    @property
    def is_at_edge(self) -> bool:
        """Whether the tuned rate is the lowest or the highest that was tried."""
        return self.tuned in (min(self.matrices), max(self.matrices))

    @property
    def best(self) -> Sequence[LossMatrix]:
        """At the tuned rate."""
        return self.matrices[self.tuned]


def find(study: Study) -> dict[str, Found]:
    """Every system at every rate; what was trained once is used by all systems that are made of it."""
    found, known = {}, ways(study.scale)
    for system in SYSTEMS:
        way = known[system.way]
        runs = {rate: runs_of(study, way, rate) for rate in study.rates(way)}
        matrices = {rate: [run.matrix(system.view) for run in of_rate] for rate, of_rate in runs.items()}
        last = next(iter(runs.values()))[0]
        found[system.name] = Found(system, matrices, last.stored, last.active)
    return found
