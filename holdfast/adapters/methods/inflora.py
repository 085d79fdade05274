"""InfLoRA: a new LoRA for each task whose input side is chosen before training, outside the earlier tasks' inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.adapters.low_rank import LowRank
from holdfast.adapters.method import Site, Tensors
from holdfast.adapters.registry import register
from holdfast.errors import InvariantViolation

__all__ = ["InfLoRA"]

_NOTHING = 1e-10
"""Share of the inputs' energy below which a direction is rounding."""
_ROW_NORM = 1 / math.sqrt(3)
"""Of a Kaiming-uniform row on average, so that learning rates mean the same as for the other methods."""


@register("inflora")
@dataclass(frozen=True, kw_only=True)
class InfLoRA(LowRank):
    """``down`` holds the principal directions of the new task's inputs after those of earlier tasks are projected out,
    and is fixed; only ``up`` trains. An update then leaves the output on the remembered inputs as it was.

    The memory is an orthonormal ``basis`` that grows when a task ends, until it holds the share ``energy`` of that
    task's inputs. The paper keeps the complement instead once that is smaller (DualGPM): the same projection in less
    memory. Where fewer than ``rank`` directions are left, the other rows are zero and learn nothing.

    Source: arXiv 2404.00228, section 3; the criterion for the basis is that of gradient projection memory, arXiv
    2103.09762.
    """

    trains = frozenset({"up"})
    needs_inputs = True

    energy: float = 0.99

    def check(self) -> list[str]:
        wrong = not 0 < self.energy <= 1
        return super().check() + [f"energy={self.energy} must be above 0 and at most 1"] * wrong

    def begin(self, site: Site, sealed: Tensors, generator: torch.Generator) -> Tensors:
        energies_D, directions_DD = _remaining(_inputs(site), sealed)
        down_RD = torch.zeros(self.rank, site.in_features, dtype=torch.float64)
        rows_RD = directions_DD[: self.rank][energies_D[: self.rank] > _NOTHING]
        down_RD[: len(rows_RD)] = rows_RD * _ROW_NORM
        return {"down": down_RD, "up": torch.zeros(self.rank, site.out_features)}

    def seal(self, site: Site, current: Tensors, sealed: Tensors) -> Tensors:
        energies_D, directions_DD = _remaining(_inputs(site), sealed)
        held = 1 - energies_D.sum()  # by the basis so far
        before_D = held + energies_D.cumsum(0) - energies_D
        wanted_D = (before_D < self.energy) & (energies_D > _NOTHING)
        return {**self.fold(current), "basis": directions_DD[wanted_D]}

    def active(self, bank: Tensors) -> int:
        return bank["down"].numel() + bank["up"].numel()


def _inputs(site: Site) -> Tensor:
    if site.inputs is None:
        raise InvariantViolation(f"{site.name}: InfLoRA is asked about a layer whose inputs were not collected")
    return site.inputs.cpu()


def _remaining(inputs_DD: Tensor, sealed: Tensors) -> tuple[Tensor, Tensor]:
    """Principal directions of the inputs outside the memory, as rows, strongest first, and the share of all the inputs'
    energy that each holds."""
    basis_MD = sealed["basis"].double().cpu() if sealed else inputs_DD.new_zeros(0, len(inputs_DD))
    outside_DD = torch.eye(len(inputs_DD), dtype=torch.float64) - basis_MD.T @ basis_MD
    energies_D, vectors_DD = torch.linalg.eigh(outside_DD @ inputs_DD @ outside_DD)
    total = inputs_DD.trace().clamp_min(torch.finfo(torch.float64).tiny)
    return energies_D.flip(0).clamp_min(0) / total, vectors_DD.T.flip(0)
