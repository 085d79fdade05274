"""A new LoRA for each task, added to the frozen ones of the tasks before."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.adapters.low_rank import LowRank
from holdfast.adapters.registry import register

__all__ = ["FreezeAndAdd"]


@register("freeze_and_add")
@dataclass(frozen=True, kw_only=True)
class FreezeAndAdd(LowRank):
    """All tasks act on every token: W x + Σ_t B_t A_t x. The baseline without any protection of earlier tasks."""
