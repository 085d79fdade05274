"""Which experts of a stack answer a token, and how evenly they are used: pure functions.

Suffixes as in ``holdfast.adapters.method``; E experts, of which each token gets K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Gates", "balance", "gate", "noisy", "use_of_experts"]


@dataclass(frozen=True, slots=True)
class Gates:
    """Three tensors [P, E], fp32 at least."""

    weights: Tensor
    """Softmax over the selected experts, zero for the others; each token's sum is 1."""
    probabilities: Tensor
    """Softmax over all experts."""
    chosen: Tensor
    """1 for the selected experts, 0 for the others: no gradient."""


def gate(logits_PE: Tensor, top_k: int) -> Gates:
    """The ``top_k`` largest logits, which is hard, and the softmax of them, which is differentiable."""
    logits_PE = logits_PE.to(torch.promote_types(logits_PE.dtype, torch.float32))
    best_PK, index_PK = logits_PE.topk(top_k, dim=-1)
    weights_PE = torch.zeros_like(logits_PE).scatter(-1, index_PK, best_PK.softmax(-1))
    return Gates(weights_PE, logits_PE.softmax(-1), torch.zeros_like(logits_PE).scatter(-1, index_PK, 1.0))


def noisy(logits_PE: Tensor, spread_PE: Tensor) -> Tensor:
    """Logits plus softplus(spread) ε with ε ~ N(0, 1) of torch's generator: ln 2 is the deviation at spread 0.

    Source: arXiv 1701.06538, section 2.1.
    """
    return logits_PE + F.softplus(spread_PE) * torch.randn_like(logits_PE)


def balance(gates: Gates) -> Tensor:
    """E Σ_e P_e f_e, a scalar: P is the mean probability, f the share of tokens that an expert answers. K where either
    is uniform. Its gradient goes through P, since f is a count. Without tokens it is zero.

    Source: arXiv 2604.01152; arXiv 2101.03961, section 2.2.
    """
    experts = gates.probabilities.shape[-1]
    probability_E = gates.probabilities.reshape(-1, experts).sum(0) / _tokens(gates)
    return experts * (probability_E * use_of_experts(gates)).sum()


def use_of_experts(gates: Gates) -> Tensor:
    """f [E]: the share of the tokens that each expert answers; K in all, or zero without tokens."""
    return gates.chosen.reshape(-1, gates.chosen.shape[-1]).sum(0) / _tokens(gates)


def _tokens(gates: Gates) -> int:
    return max(1, gates.chosen[..., 0].numel())
