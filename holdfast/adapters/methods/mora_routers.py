"""MoRA with someone else to say who answers: what its self-activation is compared with.

Content, bank, normalised scores, top-k, temperature and threshold are MoRA's; only the responses that are scored come
from elsewhere. So a difference is one of routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.adapters.low_rank import fresh_rows
from holdfast.adapters.method import Site, Tensors
from holdfast.adapters.methods.mora import MoRA
from holdfast.adapters.registry import register
from holdfast.adapters.routing import Routing

__all__ = ["LearnedRouterMoRA", "RandomKeysMoRA", "UniformMoRA"]


@register("mora_uniform")
@dataclass(frozen=True, kw_only=True)
class UniformMoRA(MoRA):
    """Nobody is selected: each of E experts weighs 1 / E, in inference too. ``top_k``, ``temperature`` and
    ``threshold`` change nothing."""

    merge_refusal = "the weights of its atoms change with their number"

    def route(self, responses_PE: Tensor) -> Routing:
        experts = responses_PE.shape[-1]
        wide = torch.promote_types(responses_PE.dtype, torch.float32)
        index_PE = torch.arange(experts, device=responses_PE.device).expand_as(responses_PE)
        return Routing(
            index_PE,
            torch.zeros_like(responses_PE, dtype=wide),
            torch.full_like(responses_PE, 1 / experts, dtype=wide),
        )

    def answers(self, routing: Routing, experts: int) -> Tensor:
        return torch.ones_like(routing.scores, dtype=torch.bool)

    def active(self, bank: Tensors) -> int:
        return bank["down"].numel() + bank["up"].numel()


@dataclass(frozen=True, kw_only=True)
class _Keyed(MoRA):
    """With a key of its own for every expert, ``router`` [E, D], beside the one that its content is read with."""

    def begin(self, site: Site, sealed: Tensors, generator: torch.Generator) -> Tensors:
        router_ED = fresh_rows(site, self.rank // self.group, generator)["down"]
        return {**super().begin(site, sealed, generator), "router": router_ED}

    def responses(self, x_PD: Tensor, z_PR: Tensor, bank: Tensors) -> Tensor:
        return F.linear(x_PD, bank["router"])

    def active(self, bank: Tensors) -> int:
        return super().active(bank) + bank["router"].numel()


@register("mora_random")
@dataclass(frozen=True, kw_only=True)
class RandomKeysMoRA(_Keyed):
    """Random keys that are never trained: routing by where the input lies, whatever an atom has to say there."""


@register("mora_learned")
@dataclass(frozen=True, kw_only=True)
class LearnedRouterMoRA(_Keyed):
    """A linear router whose rows are trained with the task that they belong to, and frozen with it."""

    trains = frozenset({"down", "up", "router"})
