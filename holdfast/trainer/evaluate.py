"""Bits per byte on held-out text, and a sample of what the model writes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from holdfast import failpoints
from holdfast.parallel.microbatches import Microbatch
from holdfast.trainer.step import Communicator

__all__ = ["EvaluationEngine", "evaluate"]


class EvaluationEngine(Protocol):
    """Collective. Sums without gradients: nats, targets, targets that are bytes."""

    def measure(self, batches: Iterable[Microbatch]) -> list[float]: ...


def evaluate(engine: EvaluationEngine, comm: Communicator, batches: Iterable[Microbatch], step: int) -> float:
    """Collective. Bits per byte over all ranks' batches; every rank must bring equally many."""
    failpoints.hit("evaluate.begin", step)
    nats, _, byte_targets = engine.measure(batches)
    nats, byte_targets = comm.all_reduce_sum([nats, byte_targets])
    return nats / math.log(2) / byte_targets if byte_targets else float("nan")
