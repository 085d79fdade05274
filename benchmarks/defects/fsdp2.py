"""A model sharded by torch's FSDP2 over the ranks of the process group, on CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

__all__ = ["layer_after_backward"]


def layer_after_backward(shape: tuple[int, int]) -> torch.nn.Linear:
    """Collective. One linear layer without bias whose weight has ``shape``, the same on every rank, with gradients."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=generator))
    fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    layer(torch.randn(8, shape[1], generator=generator)).square().mean().backward()
    return layer
