"""What the low-rank methods share: a pair of banks, ``down`` [R, D] and ``up`` [R, O], with a row per direction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.adapters.method import Method, Site, Tensors

__all__ = ["LowRank", "fresh_rows", "rank_problems"]


def fresh_rows(site: Site, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``down`` is U(±1/√D), which is Kaiming-uniform with a = √5; ``up`` is zero, so the product is zero too.

    Drawn in fp32 on the CPU, so that the numbers do not depend on the device. Source: arXiv 2106.09685, section 4.1,
    with the initialisation of the authors' code.
    """
    bound = 1 / math.sqrt(site.in_features)
    down_RD = torch.empty(rank, site.in_features).uniform_(-bound, bound, generator=generator)
    return {"down": down_RD, "up": torch.zeros(rank, site.out_features)}


def rank_problems(rank: int, scale: float, dropout: float) -> Iterator[str]:
    """Rules for the options that all low-rank methods have."""
    if rank < 1:
        yield f"rank={rank} must be at least 1"
    if not (math.isfinite(scale) and scale != 0):
        yield f"scale={scale} must be finite and not 0"
    if not 0 <= dropout < 1:
        yield f"dropout={dropout} must be at least 0 and below 1"


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """y = W x + c Σ up_i (down_i · x) over all rows i in use: the sum over tasks is one product of a higher rank."""

    rank: int = 8
    """Rows per task."""
    scale: float = 1.0
    """The factor c, in LoRA's words α / r. Multiplied into ``up`` when a task ends."""
    dropout: float = 0.0
    """Share of the inputs' features that training drops. Activation checkpointing must then restore the generator."""

    def check(self) -> list[str]:
        return list(rank_problems(self.rank, self.scale, self.dropout))

    def begin(self, site: Site, sealed: Tensors, generator: torch.Generator) -> Tensors:
        return fresh_rows(site, self.rank, generator)

    def fold(self, current: Tensors) -> Tensors:
        return {**current, "up": current["up"] * self.scale}

    def delta(self, x_PD: Tensor, bank: Tensors, *, is_training: bool) -> Tensor:
        z_PR = F.linear(F.dropout(x_PD, self.dropout, is_training), bank["down"])
        return z_PR @ bank["up"]

    def merged(self, bank: Tensors) -> Tensor:
        return bank["up"].T @ bank["down"]
