"""Second moments of what the adapted layers see, for methods that choose their directions by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import adapters_of

__all__ = ["collect_inputs"]


@contextmanager
def collect_inputs(model: nn.Module) -> Iterator[None]:
    """While the block runs the model, each adapted layer sums x xᵀ of its inputs; at the end it has the mean over all
    tokens, [D, D] in fp64, until the next task starts or ends."""
    layers = list(adapters_of(model).layers.values())
    sums: dict[str, tuple[Tensor, int]] = {}
    handles = [layer.register_forward_pre_hook(partial(_add, sums, layer.name)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if layer.name in sums:
            total_DD, count = sums[layer.name]
            layer.inputs = total_DD / max(count, 1)


@torch.no_grad()
def _add(sums: dict[str, tuple[Tensor, int]], name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    x_PD = args[0].detach().flatten(0, -2).double()
    total_DD, count = sums.get(name, (0, 0))
    sums[name] = (total_DD + x_PD.T @ x_PD, count + len(x_PD))
