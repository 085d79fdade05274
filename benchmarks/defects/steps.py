"""Steps of an optimizer on given gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from verdict import Kind

__all__ = ["after", "state_bytes"]


def after(kind: Kind, start: Tensor, grads: Iterable[Tensor], **options: Any) -> tuple[Tensor, torch.optim.Optimizer]:
    """The parameter that started as ``start``, and its optimizer, after one step for each gradient."""
    param = torch.nn.Parameter(start.clone())
    optimizer = kind([param], **options)
    for grad in grads:
        param.grad = grad.to(param.dtype).clone()  # bitsandbytes adds weight decay into it
        optimizer.step()
    return param.detach(), optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the state's tensors. What several share, such as a codebook, counts once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts = [part for tensor in tensors for part in _plain_tensors(tensor)]
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]
