"""O-LoRA: a new LoRA for each task, kept out of the input subspaces of the earlier ones by a penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.adapters.low_rank import LowRank
from holdfast.adapters.method import Tensors
from holdfast.adapters.registry import register

__all__ = ["OLoRA"]


@register("olora")
@dataclass(frozen=True, kw_only=True)
class OLoRA(LowRank):
    """Freeze-and-add with λ₁ Σ_i L_orth(A_i, A_t) added to the loss of task t: non-negative, zero where every new row
    is orthogonal to every old one.

    Paper and code differ twice. The paper's L_orth is Σ_jk ‖(A_iᵀ A_t)_jk‖², of the factor on the output side; the
    authors' code sums |A_t A_iᵀ| over the factor on the input side, ``down`` here, and adds λ₂ times the norms of the
    new factors. The input side is what keeps earlier inputs out of new updates, so it is used in both forms, and λ₂
    is left to the optimizer's weight decay.

    Source: arXiv 2310.14152, section 3, equations 7 and 8.
    """

    orthogonality: float = 0.5
    """λ₁."""
    is_squared: bool = False
    """Sum of squares, as in equation 8, instead of the absolute values of the code."""

    def check(self) -> list[str]:
        wrong = self.orthogonality < 0
        return super().check() + [f"orthogonality={self.orthogonality} must not be negative"] * wrong

    def penalty(self, current: Tensors, sealed: Tensors) -> Tensor | None:
        if not sealed:
            return None
        overlap_RR = current["down"] @ sealed["down"].T
        return self.orthogonality * (overlap_RR.square() if self.is_squared else torch.abs(overlap_RR)).sum()
