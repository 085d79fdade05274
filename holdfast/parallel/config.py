"""Options of the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from holdfast.types import Precision

__all__ = ["ParallelConfig", "ScheduleKind"]


class ScheduleKind(Enum):
    """Order of forward and backward passes in a pipeline."""

    ONE_F_ONE_B = "1f1b"
    GPIPE = "gpipe"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the training state is spread over ranks."""

    zero_stage: int = 2
    """ZeRO stage: 0 replicates everything, 1 shards optimizer state, 2 gradients too, 3 weights too."""
    pipeline: int = 1
    """Processes that a microbatch passes through, each with some of the layers; 1: every rank has all layers. Ranks
    that have the same layers are replicas; they shard the optimizer state as ZeRO stage 1 does, or with zero_stage=0
    each has all of it."""
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B
    """Of a pipeline: ONE_F_ONE_B keeps few activations in memory, GPIPE those of every microbatch."""
    chunks: int = 1
    """Of a pipeline: stages per process; more than one interleaves them, which shortens the bubble."""
    blocks: list[int] = field(default_factory=list)
    """Of a pipeline: number of blocks of each stage along the model; empty balances the work."""
    swapped: bool = False
    """Of a pipeline: half of the microbatches pass both pairs of end stages in the other order (CheckFree+), so that
    neighbours learn to replace each other."""
    precision: Precision = Precision.FP32
    """Arithmetic of forward and backward (FP32, BF16); master weights are always fp32."""
    collective_timeout_s: float = 300.0
    """Deadline of every collective, seconds. Faults are normally noticed long before."""
    bucket_elements: int = 5_000_000
    """Elements per gradient reduction bucket."""
