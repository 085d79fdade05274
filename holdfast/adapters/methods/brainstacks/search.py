"""Which domains' stacks would have served an input best: found by trying, never by its label.

A loss takes a weight for every domain that acts, ``{}`` being the base. It should be computed as the router's choice
will be used: the same weights, the same stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from holdfast.adapters.methods.brainstacks.stacks import Stack, domains_of, routed
from holdfast.adapters.tasks import using_tasks
from holdfast.errors import ConfigurationError

__all__ = ["Found", "Loss", "exhaustive", "greedy", "oracle", "outcome_loss", "regret", "targets"]

Loss = Callable[[Mapping[str, float]], float]

_MOST_DOMAINS = 16


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice that a search has seen."""

    domains: tuple[str, ...]
    """Empty: the base alone."""
    loss: float
    losses: Mapping[tuple[str, ...], float]
    """Of every choice that was tried."""


def greedy(loss: Loss, domains: Sequence[str], *, least_gain: float = 0.01) -> Found:
    """The best single domain if it beats the base, then whichever domain lowers the loss most, while that is by more
    than ``least_gain`` nats. At most 1 + T (T + 1) / 2 losses. Source: arXiv 2604.01152.
    """
    best: tuple[str, ...] = ()
    losses = {best: loss({})}
    while True:
        tried = [tuple(d for d in domains if d in best or d == new) for new in domains if new not in best]
        losses |= {choice: loss(dict.fromkeys(choice, 1.0)) for choice in tried}
        next_best = min(tried, key=losses.__getitem__, default=best)
        if not losses[next_best] < losses[best] - (least_gain if best else 0):
            return Found(best, losses[best], losses)
        best = next_best


def exhaustive(loss: Loss, domains: Sequence[str]) -> Found:
    """The best of all 2^T choices; of equal ones the smallest. Raises: ConfigurationError for more than 16 domains."""
    if len(domains) > _MOST_DOMAINS:
        raise ConfigurationError(
            f"{len(domains)} domains have 2^{len(domains)} choices; search them greedily, or at most {_MOST_DOMAINS}"
        )
    choices = [choice for size in range(len(domains) + 1) for choice in combinations(domains, size)]
    losses = {choice: loss(dict.fromkeys(choice, 1.0)) for choice in choices}
    best = min(choices, key=losses.__getitem__)
    return Found(best, losses[best], losses)


def oracle(stacks: Sequence[Stack], loss: Loss) -> dict[str, float]:
    """The mode that somebody would choose who knew the outcome of every choice of domains."""
    found = exhaustive(loss, domains_of(stacks))
    return routed(stacks, dict.fromkeys(found.domains, 1.0))


def regret(loss: Loss, weights: Mapping[str, float], domains: Sequence[str]) -> float:
    """``loss(weights)`` minus that of the best of all 2^T choices, nats; below zero only if weights other than 1 are
    better than any choice."""
    return loss(weights) - exhaustive(loss, domains).loss


def targets(found: Found, domains: Sequence[str], *, label: str | None = None, label_share: float = 0.0) -> Tensor:
    """[T] in [0, 1]: 1 where a domain was found useful, mixed with the input's label by ``label_share``.

    The authors mix in 0.2, and raise two of their domains by hand; neither is an outcome.
    """
    if not 0 <= label_share <= 1:
        raise ConfigurationError(f"label_share={label_share} must be from 0 to 1")
    outcome = torch.tensor([float(domain in found.domains) for domain in domains])
    labelled = torch.tensor([float(domain == label) for domain in domains])
    return (1 - label_share) * outcome + label_share * labelled


def outcome_loss(model: nn.Module, stacks: Sequence[Stack], call: Callable[[], Tensor | float]) -> Loss:
    """The loss of ``call()``, which runs the model on one input and its answer, in the mode the model is in."""

    @torch.no_grad()
    def loss(weights: Mapping[str, float]) -> float:
        with using_tasks(model, weights=routed(stacks, weights)):
            return float(call())

    return loss
