"""Ways to use adapters that act apart, each a view of one training: all of them, those of a known domain, or those that
something chooses by the first half of a window.

Without a domain of its own (text of a later task, or of none) a window gets the base, where the domain is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import combinations
from math import log

import torch
from adapt_runs import Batch, Learner, all_bits
from torch import Tensor

from holdfast.adapters import using_tasks
from holdfast.adapters.forgetting import evaluating
from holdfast.adapters.methods.brainstacks import (
    Examples,
    MetaRouter,
    RouterPlan,
    base_features,
    choose,
    greedy,
    targets,
    train_router,
)

__all__ = ["MODES", "Subset", "domain_views", "stack_views"]

Subset = tuple[str, ...]
"""Of the domains learned so far, oldest first; empty: the base."""
MODES = ("ungated", "own-only", "prefix", "oracle subset", "likelihood", "routed", "routed by label")


# -- one adapter of several -------------------------------------------------------------------------------------------


def domain_views(learner: Learner) -> dict[str, dict[str, float]]:
    """Of a LoRA for each domain: "own", the domain being known, and "likelihood", where the adapter, or the base, that
    found the first half of a window likeliest answers."""
    found: dict[str, dict[str, float]] = {"own": {}, "likelihood": {}}
    for kind, batches in learner.world.validation.items():
        tried = [_bits(learner, batches, using_tasks(learner.model, first=0))]
        tried += [_bits(learner, batches, using_tasks(learner.model, only=domain)) for domain in learner.learned]
        own = 1 + learner.learned.index(kind) if kind in learner.learned else 0
        found["own"][kind] = float(tried[own][1].mean())
        found["likelihood"][kind] = likeliest(tried)
    return found


def likeliest(tried: Sequence[Tensor]) -> float:
    """Mean bits of second halves, each by the candidate [2, windows] that was best on the first half."""
    first, second = torch.stack(list(tried)).unbind(1)
    return float(second.gather(0, first.argmin(0, keepdim=True)).mean())


def _bits(learner: Learner, batches: Sequence[Batch], shown: AbstractContextManager[None]) -> Tensor:
    """[2, windows]."""
    with shown:
        return all_bits(learner.model, batches)


# -- stacks -----------------------------------------------------------------------------------------------------------


def subset_bits(learner: Learner, batches: Sequence[Batch]) -> dict[Subset, Tensor]:
    """[2, windows] for every subset of the stacks."""
    domains = learner.learned
    subsets = [subset for size in range(len(domains) + 1) for subset in combinations(domains, size)]
    return {
        subset: _bits(learner, batches, using_tasks(learner.model, weights=dict.fromkeys(subset, 1.0)))
        for subset in subsets
    }


def stack_views(learner: Learner) -> dict[str, dict[str, float]]:
    """Of Brainstacks with one stack for each domain: all of ``MODES``."""
    routers = _routers(learner)
    found: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    for kind, batches in learner.world.validation.items():
        table = subset_bits(learner, batches)
        for mode, subset in _known(learner.learned, kind, table).items():
            found[mode][kind] = float(table[subset][1].mean())
        prefixes = [tuple(learner.learned[:count]) for count in range(len(learner.learned) + 1)]
        found["likelihood"][kind] = likeliest([table[prefix] for prefix in prefixes])
        features = _features(learner, batches)
        for mode, router in routers.items():
            found[mode][kind] = _chosen(learner.learned, choose(router, features), table)
    return found


def _known(learned: Sequence[str], kind: str, table: Mapping[Subset, Tensor]) -> dict[str, Subset]:
    """What acts by mode, on all windows of a kind alike."""
    is_learned = kind in learned
    return {
        "ungated": tuple(learned),
        "own-only": (kind,) if is_learned else (),
        "prefix": tuple(learned[: learned.index(kind) + 1]) if is_learned else (),
        "oracle subset": min(table, key=lambda subset: float(table[subset][1].mean())),
    }


def _chosen(learned: Sequence[str], weights: Sequence[Mapping[str, float]], table: Mapping[Subset, Tensor]) -> float:
    subsets = [tuple(domain for domain in learned if domain in chosen) for chosen in weights]
    return float(torch.stack([table[subset][1, number] for number, subset in enumerate(subsets)]).mean())


def _features(learner: Learner, batches: Sequence[Batch]) -> Tensor:
    """[windows, half a sequence, width] of first halves."""
    layers, model = learner.world.scale.layers, learner.model
    half = learner.world.scale.sequence // 2
    middle, last = f"blocks.{(layers - 1) // 2}", f"blocks.{layers - 1}"
    with evaluating(model):
        parts = [base_features(model, lambda: model(x[:, :half]), middle=middle, last=last) for x, _ in batches]  # noqa: B023
    return torch.cat(parts)


def _routers(learner: Learner) -> dict[str, MetaRouter]:
    """One that learned which stacks, found by greedy search, help the second half; one that learned the label."""
    world, scale = learner.world, learner.world.scale
    examples: dict[str, list[Examples]] = {"routed": [], "routed by label": []}
    for share, count in (((0.0, 0.75), scale.router_windows), ((0.8, 1.0), scale.router_windows // 4)):
        parts = [
            _searched(
                learner, domain, world.windows(world.texts[domain].train, count, f"{domain}/{share}", share=share)
            )
            for domain in learner.learned
        ]
        for number, mode in enumerate(examples):
            features, wanted = (torch.cat(part) for part in zip(*[(p[0], p[1 + number]) for p in parts], strict=True))
            examples[mode].append(Examples(features, wanted))
    return {mode: _router(learner, *of_mode) for mode, of_mode in examples.items()}


def _searched(learner: Learner, domain: str, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Features, targets by outcome, targets by label."""
    table, learned = subset_bits(learner, batches), learner.learned
    outcomes = []
    for number in range(sum(len(tokens) for tokens, _ in batches)):

        def loss(weights: Mapping[str, float]) -> float:
            subset = tuple(d for d in learned if d in weights)
            return float(table[subset][1, number]) * log(2)  # noqa: B023

        outcomes.append(targets(greedy(loss, learned), learned))
    wanted = torch.stack(outcomes)
    label = torch.tensor([[float(domain == other) for other in learned]]).expand_as(wanted)
    return _features(learner, batches), wanted, label


def _router(learner: Learner, examples: Examples, held_out: Examples) -> MetaRouter:
    scale = learner.world.scale
    with torch.random.fork_rng([]):
        torch.manual_seed(learner.world.seed)
        router = MetaRouter(examples.features.shape[-1], learner.learned, width=scale.router_width)
        train_router(router, examples, held_out, RouterPlan(epochs=scale.router_epochs), seed=learner.world.seed)
    return router
