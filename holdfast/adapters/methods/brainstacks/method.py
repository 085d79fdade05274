"""Brainstacks: every task is a stack, a small mixture of LoRA experts in every layer, added to the frozen ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.adapters.low_rank import LowRank, fresh_rows
from holdfast.adapters.method import Site, Tensors
from holdfast.adapters.methods.brainstacks.mixture import Gates, balance, gate, noisy
from holdfast.adapters.methods.brainstacks.projection import outside
from holdfast.adapters.registry import register

__all__ = ["PROJECTIONS", "Brainstacks"]

PROJECTIONS = ("off", "train_only", "output", "input")
_GATE_STD = 0.02


@register("brainstacks")
@dataclass(frozen=True, kw_only=True)
class Brainstacks(LowRank):
    """y = W x + Σ_j Δ_j(x) over the stacks in use, Δ_j(x) = s Σ_e g_e(x) B_e A_e x, s = ``scale`` √rank.

    ``down`` and ``up`` hold an expert's ``rank`` rows behind the other's; ``gate`` [E, D] the router, whose ``top_k``
    largest logits, noisy in training only, become g by their softmax. A frozen stack has no noise, and its ``up`` (or
    ``down``) lies outside the protected directions: what was validated, what is frozen and what was trained are one
    function. All experts are computed, as dense products, and unselected ones weigh zero.

    The authors' code differs in what it computes: it cuts the gradient below a frozen stack, projects in training only,
    takes the projectors from the new domain's data, balances with a loss that has no gradient, and leaves the noise of
    frozen routers on. None of that is kept, except ``projection="train_only"``, to measure it.

    Source: arXiv 2604.01152; rank-stabilised scale: arXiv 2312.03732.
    """

    trains = frozenset({"down", "up", "gate", "noise"})
    acts_apart = True
    merge_refusal = "its experts answer as the input asks them"

    rank: int = 16
    """Rows per expert."""
    experts: int = 4
    """E."""
    top_k: int = 2
    """Experts that answer a token. With 1 the weight is constant, and only the balance trains the router."""
    balance: float = 0.01
    """Weight of the load balance, for each layer, in :func:`holdfast.adapters.penalty`."""
    is_noisy: bool = True
    """Noise of a learned size on the logits in training."""
    projection: str = "output"
    """The side on which protected directions are left alone: "output", "input"; "train_only" is the output side, but
    neither in evaluation nor in what is frozen; "off". Nothing is protected before
    :func:`~holdfast.adapters.methods.brainstacks.protect` is called."""

    def check(self) -> list[str]:
        found = super().check()
        if self.experts < 1:
            found.append(f"experts={self.experts} must be at least 1")
        if not 1 <= self.top_k <= max(1, self.experts):
            found.append(f"top_k={self.top_k} must be from 1 to experts={self.experts}")
        if not (math.isfinite(self.balance) and self.balance >= 0):
            found.append(f"balance={self.balance} must be finite and not negative")
        if self.projection not in PROJECTIONS:
            found.append(f"projection={self.projection!r} must be one of {', '.join(PROJECTIONS)}")
        return found

    @property
    def factor(self) -> float:
        """s; 4 for α = rank = 16."""
        return self.scale * math.sqrt(self.rank)

    def begin(self, site: Site, sealed: Tensors, generator: torch.Generator) -> Tensors:
        width = site.in_features if self.projection == "input" else site.out_features
        return {
            **fresh_rows(site, self.experts * self.rank, generator),
            "gate": torch.empty(self.experts, site.in_features).normal_(0, _GATE_STD, generator=generator),
            "basis": torch.zeros(0, width),
            **({"noise": torch.zeros(self.experts, site.in_features)} if self.is_noisy else {}),
        }

    def fold(self, current: Tensors) -> Tensors:
        folded = {**current, "up": current["up"] * self.factor}
        side = {"input": "down", "output": "up"}.get(self.projection)
        if side is not None:
            folded[side] = outside(folded[side], current["basis"])
        return folded

    def seal(self, site: Site, current: Tensors, sealed: Tensors) -> Tensors:
        folded = self.fold(current)
        return {name: folded[name] for name in ("down", "up", "gate")}

    def delta(self, x_PD: Tensor, bank: Tensors, *, is_training: bool) -> Tensor:
        return self.answer(x_PD, bank, is_training=is_training)[0]

    def answer(self, x_PD: Tensor, bank: Tensors, *, is_training: bool) -> tuple[Tensor, Tensor | None]:
        gates = self.gates(x_PD, bank, is_training=is_training)
        z_PR = F.linear(F.dropout(x_PD, self.dropout, is_training), bank["down"])
        weights_PR = gates.weights.repeat_interleave(self.rank, -1).to(z_PR.dtype)
        delta_PO = (z_PR * weights_PR) @ bank["up"]
        if is_training and self.projection == "train_only" and "basis" in bank:
            delta_PO = outside(delta_PO, bank["basis"])
        return delta_PO, self.balance * balance(gates) if is_training and self.balance else None

    def gates(self, x_PD: Tensor, bank: Tensors, *, is_training: bool) -> Gates:
        """Which experts of this stack answer these tokens. ``is_training``: with noise where the stack has any."""
        logits_PE = F.linear(x_PD, bank["gate"])
        if is_training and "noise" in bank:
            logits_PE = noisy(logits_PE, F.linear(x_PD, bank["noise"]))
        return gate(logits_PE, self.top_k)

    def active(self, bank: Tensors) -> int:
        experts = bank["down"].numel() + bank["up"].numel()
        return bank["gate"].numel() + experts * self.top_k // self.experts
