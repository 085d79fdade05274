"""Bits per byte on held-out text, and a sample of what the model writes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from holdfast import failpoints
from holdfast.trainer.step import Communicator, Microbatch

__all__ = ["EvaluationEngine", "evaluate"]


class EvaluationEngine(Protocol):
    """``evaluating`` switches gradients and training mode off; ``loss`` is collective under ZeRO-3."""

    def evaluating(self) -> AbstractContextManager[None]: ...

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor: ...


def evaluate(engine: EvaluationEngine, comm: Communicator, batches: Iterable[Microbatch], step: int) -> float:
    """Collective. Bits per byte over all ranks' batches; every rank must bring equally many."""
    failpoints.hit("evaluate.begin", step)
    nats = byte_targets = 0.0
    with engine.evaluating():
        for tokens, targets, bytes_here in batches:
            nats += float(engine.loss(tokens, targets)) * targets.numel()
            byte_targets += bytes_here
    nats, byte_targets = comm.all_reduce_sum([nats, byte_targets])
    return nats / math.log(2) / byte_targets if byte_targets else float("nan")
