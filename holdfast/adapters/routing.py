"""Which atoms of a bank answer a token, and how much: pure functions of the bank's responses.

Suffixes as in ``holdfast.adapters.method``: z_PR are the responses of R atoms to P tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Routing", "effective_atoms", "route", "scores"]

_TINY = 1e-12
"""Least norm: a token without any response gets scores of zero, and gradients of zero, instead of NaN."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The selected atoms of each token, strongest score first: three tensors [P, K]."""

    index: Tensor
    scores: Tensor
    weights: Tensor
    """Softmax over the selected; each token's sum is 1."""


def scores(z_PR: Tensor) -> Tensor:
    """s = z / ‖z‖ over the whole bank, signed; fp32 at least."""
    return F.normalize(z_PR.to(torch.promote_types(z_PR.dtype, torch.float32)), dim=-1, eps=_TINY)


def route(z_PR: Tensor, *, top_k: int, temperature: float) -> Routing:
    """The ``top_k`` largest signed scores, or all where the bank is smaller, and the softmax of them / temperature.

    Differentiable through the scores, and so through the norm that all atoms share; the selection itself is hard.
    """
    s_PR = scores(z_PR)
    s_PK, index_PK = s_PR.topk(min(top_k, s_PR.shape[-1]), dim=-1)
    return Routing(index_PK, s_PK, (s_PK / temperature).softmax(-1))


def effective_atoms(weights_PK: Tensor) -> Tensor:
    """1 / Σ w² of each token: 1 if one atom takes all, K if all K answer alike."""
    return weights_PK.square().sum(-1).reciprocal()
