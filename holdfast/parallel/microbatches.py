"""A step's work for engines that take one microbatch after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

__all__ = ["Microbatch", "OneByOne", "sums_of"]

Microbatch = tuple[Tensor, Tensor, int]
"""Tokens [B, T] int64, targets [B, T] int64, number of targets that are bytes."""


class OneByOne(ABC):
    """``loss`` and ``backward`` of single microbatches make whole steps. All methods are collective."""

    @abstractmethod
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per target."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """No gradients, evaluation mode."""

    def forward_backward(self, batch: Sequence[Microbatch]) -> list[float]:
        """Gradients of a whole step. Sums over this rank's microbatches: nats, targets, targets that are bytes."""
        losses = dict[int, float]()
        for number, (tokens, targets, _) in enumerate(batch):
            loss = self.loss(tokens, targets)
            self.backward(loss)
            losses[number] = float(loss.detach())
        return sums_of(losses, batch)

    def measure(self, batches: Iterable[Microbatch]) -> list[float]:
        """The same sums without gradients."""
        losses, seen = dict[int, float](), list[Microbatch]()
        with self.evaluating():
            for tokens, targets, byte_targets in batches:
                losses[len(seen)] = float(self.loss(tokens, targets))
                seen.append((tokens, targets, byte_targets))
        return sums_of(losses, seen)


def sums_of(losses: Mapping[int, float], batch: Sequence[Microbatch]) -> list[float]:
    """Nats, targets, and targets that are bytes, of the microbatches whose mean losses are known, by number."""
    sums = [0.0, 0.0, 0.0]
    for number in sorted(losses):
        _, targets, byte_targets = batch[number]
        sums[0] += losses[number] * targets.numel()
        sums[1] += targets.numel()
        sums[2] += byte_targets
    return sums
