"""What a model knows of every domain after each task, and what is read from that: forgetting, and its price."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from holdfast.errors import ConfigurationError

__all__ = ["LossMatrix", "bits_per_byte", "evaluating", "mean_loss"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def mean_loss(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], torch.Tensor | float]
) -> float:
    """The mean over batches, which should be of one size. Raises: ConfigurationError without any."""
    with evaluating(model):
        losses = [float(loss(model, batch)) for batch in batches]
    if not losses:
        raise ConfigurationError("there are no batches to evaluate the model with")
    return math.fsum(losses) / len(losses)


def bits_per_byte(nats_per_token: float, tokens: int, size_bytes: int) -> float:
    """Of a text of ``size_bytes`` that is so many tokens: comparable across tokenizers."""
    return nats_per_token * tokens / size_bytes / math.log(2)


@dataclass(frozen=True)
class LossMatrix:
    """Losses of the T domains, in the order in which they were learned, before the first task and after each one.

    Lower is better, as in bits per byte; every number here is in the same unit.
    """

    domains: Sequence[str]
    rows: Sequence[Sequence[float]]
    """1 + T rows of T losses: row 0 is the base's, row t (counted from 1) that of all domains after t tasks."""
    elsewhere: Sequence[float] = ()
    """1 + T losses of text that belongs to no task, where the base's own knowledge is seen to drift."""

    def __post_init__(self) -> None:
        size = len(self.domains)
        if size < 1 or [len(row) for row in self.rows] != [size] * (size + 1):
            raise ConfigurationError(
                f"{size} domains need {size + 1} rows of {size} losses, the base's first; "
                f"these are rows of {[len(row) for row in self.rows]}"
            )
        if self.elsewhere and len(self.elsewhere) != size + 1:
            raise ConfigurationError(f"elsewhere needs {size + 1} losses, the base's first, not {len(self.elsewhere)}")

    @classmethod
    def of(cls, order: Sequence[str], rows: Sequence[Mapping[str, float]], elsewhere: str = "") -> LossMatrix:
        """From losses by domain; the one called ``elsewhere`` is no task's."""
        return cls(
            order, [[row[name] for name in order] for row in rows], [row[elsewhere] for row in rows if elsewhere]
        )

    @classmethod
    def so_far(cls, rows: Sequence[Mapping[str, float]], base: Mapping[str, float] | None = None) -> LossMatrix:
        """From what was measured after each task: losses of the domains learned until then, in their order. All other
        losses are NaN, and so is what depends on them."""
        order = list(rows[-1]) if rows else []
        whole = [{**dict.fromkeys(order, math.nan), **row} for row in (base or {}, *rows)]
        return cls.of(order, whole)

    @property
    def learned(self) -> list[float]:
        """L[d][d]: each domain's loss right after its own task."""
        return [self.rows[number + 1][number] for number in range(len(self.domains))]

    @property
    def last(self) -> Sequence[float]:
        """L[T]: each domain's loss in the end."""
        return self.rows[-1]

    @property
    def changes(self) -> list[float]:
        """L[T][d] - L[d][d] for every domain but the last, which nothing came after."""
        return [end - own for end, own in zip(self.last[:-1], self.learned[:-1], strict=True)]

    @property
    def forgetting(self) -> float:
        """Mean of the changes, which may be negative; 0 for a single domain."""
        return _mean(self.changes)

    @property
    def clipped_forgetting(self) -> float:
        """Each change clipped at zero, and the sum divided by T, the last task included: what the released evaluation
        of arXiv 2506.21035 computes. Gains do not offset losses, and the value is at most (T - 1) / T of theirs."""
        return math.fsum(max(0.0, change) for change in self.changes) / len(self.domains)

    @property
    def final(self) -> float:
        """Mean of L[T] over all domains."""
        return _mean(self.last)

    @property
    def diagonal(self) -> float:
        """Mean of L[d][d]: how well tasks are learned, before anything is forgotten."""
        return _mean(self.learned)

    @property
    def base(self) -> float:
        """Mean of L[0]."""
        return _mean(self.rows[0])

    @property
    def drift(self) -> float:
        """Loss elsewhere in the end minus the base's; NaN if that was not measured."""
        return self.elsewhere[-1] - self.elsewhere[0] if self.elsewhere else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
