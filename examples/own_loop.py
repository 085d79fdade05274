"""Your own torch loop, kept by ten lines of Holdfast: kill it with any signal, start it again, and it goes on.

    python examples/own_loop.py CHECKPOINTS [STEPS]

It needs torch, and neither Ray nor DeepSpeed. The last line is a digest of the weights: it is the same, however often
the loop was killed on its way.
"""

import hashlib
import sys

import torch
from torch import nn

import holdfast


def main(where: str, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    snapshots = holdfast.Snapshotter(where, model=model, optimizer=optimizer, scheduler=scheduler, save_every_steps=20)
    step = snapshots.restore()  # 0 where nothing is stored
    print(f"begins after step {step}, from {snapshots.source}; keeper {snapshots.keeper_pid}", flush=True)
    while step < steps:
        x = torch.randn(32, 16)
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # waits for what is left of the copy
        scheduler.step()
        step += 1
        snapshots.take(step)  # begins to copy, beside the next step
        print(f"step {step} loss {loss.item():.17g}", flush=True)
    snapshots.close()

    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    print(f"weights {hashlib.sha256(weights).hexdigest()}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200)
