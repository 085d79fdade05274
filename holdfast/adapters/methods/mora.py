"""MoRA, later named MoRAM: every row of the bank is an expert of rank one that decides itself when it answers. Or every
few rows are one of a higher rank, for comparison.

Not the "MoRA" of arXiv 2405.12130, which is about updates of high rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.adapters.low_rank import LowRank
from holdfast.adapters.method import Tensors
from holdfast.adapters.registry import register
from holdfast.adapters.routing import Routing, route

__all__ = ["MoRA"]

_SCALED = (False, True, "temperature", "threshold")
_GATHER_FROM = {False: 8, True: 32}
"""Rows of the bank per selected one from which gathering is cheaper on a CPU, without gradients and with them."""


@register("mora")
@dataclass(frozen=True, kw_only=True)
class MoRA(LowRank):
    """y = W x + c Σ_i w_i z_i b_i over the selected atoms, where z_i = a_i · x are raw responses (keys a are ``down``,
    values b are ``up``) and w = softmax(top-k(z / ‖z‖) / τ) only routes.

    The norm runs over the whole bank, so r new keys change the weights of old atoms: frozen atoms are no frozen
    function. Weights below δ in score are dropped in inference and not made up for; where none is left, the output is
    the base layer's, bit by bit. Training has no threshold.

    Cost of P tokens with R rows, K of them selected: all responses are one product, 2 P R D operations, as for a LoRA
    of rank R. The values are a dense product with the weights scattered over R columns, 2 P R O operations that run
    at the speed of matrix products, or a gather of K rows per token, 2 P K O operations at the speed of memory. The
    second costs the same however large the bank is. Measured on one CPU core it is the faster one from R = 4 K to
    8 K on, but with gradients only from 16 K to 32 K, since its backward pass adds row by row. Accelerators, whose
    matrix products are cheap, use the first.

    The authors' code reads sealed values without c, evaluates untrained atoms and keeps the optimizer's moments across
    tasks; here c is multiplied in when a task ends, untrained atoms stay out, and a task has parameters of its own.

    Source: arXiv 2506.21035.
    """

    merge_refusal = "the weights of its atoms depend on the input"

    top_k: int = 16
    """Experts that answer a token. With 1 the weight is constant, and routing gets no gradient."""
    temperature: float = 0.2
    """τ: the smaller, the closer to the single best atom. Published: 0.01 and 0.03."""
    threshold: float = 0.2
    """δ: scores below it do not answer in inference. At most 1/δ² atoms can; -1 keeps all."""
    scales_with_bank: bool | str = False
    """Multiply τ and δ by √(rank / rows): scores shrink like that as the bank grows. "temperature" or "threshold": only
    that one."""
    group: int = 1
    """Atoms of an expert, which answer with one weight: a divisor of ``rank``, so that each belongs to one task. A
    group's score is the norm of its responses over the bank's; it has no sign, while that of a single atom has."""

    def check(self) -> list[str]:
        found = super().check()
        if self.top_k < 1:
            found.append(f"top_k={self.top_k} must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            found.append(f"temperature={self.temperature} must be finite and above 0")
        if not -1 <= self.threshold <= 1:
            found.append(f"threshold={self.threshold} must be between -1, which keeps every atom, and 1")
        if self.group < 1 or self.rank % self.group:
            found.append(f"group={self.group} must be at least 1 and divide rank={self.rank}")
        if self.scales_with_bank not in _SCALED:
            found.append(f"scales_with_bank={self.scales_with_bank!r} must be one of {_SCALED}")
        return found

    def delta(self, x_PD: Tensor, bank: Tensors, *, is_training: bool) -> Tensor:
        x_PD = F.dropout(x_PD, self.dropout, is_training)
        z_PR = F.linear(x_PD, bank["down"])
        responses_PE = self.responses(x_PD, z_PR, bank)
        routing = self.route(responses_PE)
        weights_PK, index_PK = self._of_atoms(routing.weights), self._atoms(routing.index)
        amounts_PK = weights_PK * z_PR.gather(-1, index_PK)
        if is_training:
            return _mix(amounts_PK, index_PK, bank["up"])
        answers_PK = self.answers(routing, responses_PE.shape[-1])
        y_PO = _mix(amounts_PK * self._of_atoms(answers_PK), index_PK, bank["up"])
        # Minus zero: adding it changes no number, where zero would turn the base's own minus zero around.
        return torch.where(answers_PK.any(-1, keepdim=True), y_PO, -0.0)

    def responses(self, x_PD: Tensor, z_PR: Tensor, bank: Tensors) -> Tensor:
        """What decides who answers, [..., E] for E experts: the atoms' own responses ``z_PR``, or the norms of groups
        of them."""
        if self.group == 1:
            return z_PR
        *tokens, rows = z_PR.shape
        wide = torch.promote_types(z_PR.dtype, torch.float32)
        norms_PE: Tensor = torch.linalg.vector_norm(
            z_PR.view(*tokens, rows // self.group, self.group), dim=-1, dtype=wide
        )
        return norms_PE

    def route(self, responses_PE: Tensor) -> Routing:
        """Which experts answer, before the threshold."""
        temperature = self.temperature * self._shrink(responses_PE.shape[-1], "temperature")
        return route(responses_PE, top_k=self.top_k, temperature=temperature)

    def answers(self, routing: Routing, experts: int) -> Tensor:
        """Which of those that were selected from ``experts`` pass the threshold of inference."""
        if self.threshold == -1:  # a score may be rounded to less, and -1 must not shrink with the bank
            return torch.ones_like(routing.scores, dtype=torch.bool)
        return routing.scores >= self.threshold * self._shrink(experts, "threshold")

    def active(self, bank: Tensors) -> int:
        rows, out_features = bank["up"].shape
        return bank["down"].numel() + min(self.top_k * self.group, rows) * out_features

    def _shrink(self, experts: int, what: str) -> float:
        is_scaled = self.scales_with_bank is True or self.scales_with_bank == what
        return math.sqrt(self.rank / (experts * self.group)) if is_scaled else 1.0

    def _of_atoms(self, of_experts_PK: Tensor) -> Tensor:
        return of_experts_PK if self.group == 1 else of_experts_PK.repeat_interleave(self.group, -1)

    def _atoms(self, index_PK: Tensor) -> Tensor:
        """Rows of the bank, of the experts at these places."""
        if self.group == 1:
            return index_PK
        within = torch.arange(self.group, device=index_PK.device)
        return (index_PK[..., None] * self.group + within).flatten(-2)


def _mix(amounts_PK: Tensor, index_PK: Tensor, up_RO: Tensor) -> Tensor:
    """Σ_k amounts · up[index], by whichever way is cheaper for this bank."""
    amounts_PK = amounts_PK.to(up_RO.dtype)
    rows, selected = len(up_RO), index_PK.shape[-1]
    has_gradient = amounts_PK.requires_grad or up_RO.requires_grad
    if up_RO.device.type != "cpu" or rows < _GATHER_FROM[has_gradient] * selected:
        spread_PR = amounts_PK.new_zeros(*amounts_PK.shape[:-1], rows).scatter(-1, index_PK, amounts_PK)
        return spread_PR @ up_RO
    index, amounts = (part.reshape(-1, selected) for part in (index_PK, amounts_PK))
    y_PO = F.embedding_bag(index, up_RO, per_sample_weights=amounts, mode="sum")
    return y_PO.view(*amounts_PK.shape[:-1], -1)
