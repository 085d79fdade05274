"""Options of the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.types import Precision

__all__ = ["ParallelConfig"]


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the training state is spread over ranks."""

    zero_stage: int = 2
    """ZeRO stage: 0 replicates everything, 1 shards optimizer state, 2 gradients too, 3 weights too."""
    precision: Precision = Precision.FP32
    """Arithmetic of forward and backward (FP32, BF16); master weights are always fp32."""
    collective_timeout_s: float = 300.0
    """Deadline of every collective, seconds. Faults are normally noticed long before."""
    bucket_elements: int = 5_000_000
    """Elements per gradient reduction bucket."""
