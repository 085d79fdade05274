"""One LoRA through all tasks: what each task leaves behind is where the next one starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from holdfast.adapters.low_rank import LowRank
from holdfast.adapters.method import Site, Tensors
from holdfast.adapters.registry import register

__all__ = ["SequentialLoRA"]


@register("lora")
@dataclass(frozen=True, kw_only=True)
class SequentialLoRA(LowRank):
    """The constant-size baseline. Earlier tasks are overwritten and cannot be replayed. Source: arXiv 2106.09685."""

    keeps_tasks = False

    def begin(self, site: Site, sealed: Tensors, generator: torch.Generator) -> Tensors:
        if not sealed:
            return super().begin(site, sealed, generator)
        return {"down": sealed["down"].clone(), "up": sealed["up"] / self.scale}
