"""What the tensors of this process occupy."""

from __future__ import annotations

import gc

import torch

__all__ = ["tensor_bytes"]


def tensor_bytes() -> int:
    """Of all storages that a tensor in this process uses. torch's profiler would see activations too, but misses
    what gloo's threads free, so that its account differs from one build to the next."""
    gc.collect()
    storages = dict[int, int]()
    for tensor in [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]:
        for held in (tensor, tensor.grad if tensor.is_leaf else None):
            if held is not None:
                storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(storages.values())
