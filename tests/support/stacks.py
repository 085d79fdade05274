"""A small model with Brainstacks, and domains that it can learn in a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adapters import inject
from holdfast.adapters.methods.brainstacks import BoostPlan, Brainstacks, Domain

__all__ = ["PLAN", "centre", "domain", "inputs", "layered", "stacked"]

PLAN = BoostPlan(rounds=2, steps=40, evaluate_every=10, lr=2e-2, warmup=5, spike=0.5, patience=6)

_NAMES = ("sums", "turns", "bends")


def layered() -> nn.Sequential:
    """6 features to 8, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))


def stacked(**options: Any) -> nn.Sequential:
    """:func:`layered` with the method in both layers, without a task."""
    model = layered()
    inject(model, Brainstacks(**{"rank": 2, **options}))
    return model


def centre(name: str) -> float:
    """Where a domain's inputs lie."""
    return {"sums": 2.0, "turns": -2.0, "bends": 0.0}[name]


def inputs(name: str, count: int, seed: int) -> Tensor:
    """[count, 6] of a domain."""
    draw = torch.Generator().manual_seed(10 * seed + _NAMES.index(name))
    return torch.randn(count, 6, generator=draw) + centre(name)


def domain(name: str, *, batches: Iterable[Any] | None = None) -> Domain:
    """Regression on 64 inputs, the same in every step, and 32 others to validate."""
    train = _pairs(name, inputs(name, 64, 0))

    def of_round(_: int) -> Iterator[Any]:
        return iter(batches) if batches is not None else repeat(train)

    return Domain(name=name, batches=of_round, loss=_loss, validation=[_pairs(name, inputs(name, 32, 1))])


def _pairs(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x[:, :3].sum(1) / 3, x[:, 3:].sum(1) / 3
    answers = {"sums": (first + second, first), "turns": (second - first, -second), "bends": (first * second, first**2)}
    mixed = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.stack(answers[name], 1) @ mixed


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)
