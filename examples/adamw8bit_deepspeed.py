"""8-bit AdamW under plain DeepSpeed ZeRO, with nothing else of Holdfast.

    torchrun --nproc-per-node 2 examples/adamw8bit_deepspeed.py --stage 2

``holdfast train`` does more: its shards end on quantisation blocks, so that the state does not depend on the number of
ranks.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

import deepspeed
from torch import Tensor, nn

from holdfast.optim import AdamW8bit, OptimConfig, parameter_groups


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1))


def make_optimizer(model: nn.Module) -> AdamW8bit:
    # ZeRO makes one flat tensor of each group, so what is kept in 32 bits has to be a group of its own. This makes
    # them: small tensors apart from large ones, and norms and biases, which do not decay, apart from matrices.
    groups = parameter_groups(model.named_parameters(), OptimConfig(weight_decay=0.01))
    return AdamW8bit(groups, lr=1e-3)


def settings(stage: int, batch: int) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }


def batch_of(rank: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 64, generator=torch.Generator().manual_seed(1000 * step + rank))
    return x, torch.sin(x.sum(1, keepdim=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    deepspeed.init_distributed(timeout=timedelta(seconds=120))
    model = make_model()
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(model), config=settings(arguments.stage, 64)
    )
    rank, losses = torch.distributed.get_rank(), []
    for step in range(arguments.steps):
        x, y = (t.to(engine.device) for t in batch_of(rank, step, 64))
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    state = [t for s in optimizer.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    total = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters())
    if rank == 0:
        print(f"ZeRO {arguments.stage}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        print(f"state on this rank: {sum(t.nbytes for t in state) / total:.2f} bytes per parameter of the model")
    engine.destroy()
    torch.distributed.barrier()  # a process group that ends while a peer still talks to it ends the process
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
