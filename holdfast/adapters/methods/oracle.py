"""A LoRA per domain, and somebody who knows the domain of every input."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.adapters.low_rank import LowRank
from holdfast.adapters.registry import register

__all__ = ["Oracle"]


@register("oracle")
@dataclass(frozen=True, kw_only=True)
class Oracle(LowRank):
    """The bound that methods without a task identity are measured against. Every task trains on the bare base, so
    nothing is forgotten; outside training, ``use_tasks(model, only=...)`` names the domain."""

    needs_task = True
