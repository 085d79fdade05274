"""AdamW with 8-bit state on a model that FSDP2 shards, with a distributed checkpoint in the middle.

    torchrun --nproc-per-node 2 examples/adamw8bit_fsdp2.py

Runs on CUDA devices where each process has one, else on the CPU. Any number of processes may load the checkpoint: codes
and scales are those of one process, whatever the number.
"""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from holdfast.optim import AdamW8bit


def build(device: str) -> tuple[nn.Module, AdamW8bit]:
    torch.manual_seed(0)  # the same weights on every process
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, AdamW8bit(model.parameters(), lr=3e-3)  # nothing about sharding to say


def train(model: nn.Module, optimizer: AdamW8bit, batches: range, device: str) -> Tensor:
    for number in batches:
        draw = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        x = torch.randn(32, 64, generator=draw).to(device)
        loss = nn.functional.mse_loss(model(x), x.flip(1).tanh())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.all_reduce(loss := loss.detach())
    return loss / dist.get_world_size()


def main() -> None:
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))

    model, optimizer = build(device)
    first = train(model, optimizer, range(1), device)
    at_save = train(model, optimizer, range(1, 30), device)
    directory = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(directory)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=directory[0])
    expected = train(model, optimizer, range(30, 40), device)

    model, optimizer = build(device)  # a new run
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=directory[0])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    resumed = train(model, optimizer, range(30, 40), device)

    if dist.get_rank() == 0:
        held = sum(t.to_local().nbytes for s in optimizer.state.values() for t in s.values() if hasattr(t, "to_local"))
        print(f"{dist.get_world_size()} processes on {device}; loss {first:.4f} at first, {at_save:.4f} when saved")
        print(f"state on this process: {held} bytes; checkpoint in {directory[0]}")
        print(f"ten steps later: {expected:.6f}; after loading, the same ten steps: {resumed:.6f}")
    assert expected == resumed, "a resumed run goes on with the same bits"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
