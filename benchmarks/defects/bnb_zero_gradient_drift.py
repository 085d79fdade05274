"""bitsandbytes on a CPU moves parameters whose gradient has always been 0, since a stored 0 comes back as not quite 0.

Every other parameter of 16,384 gets gradients; the rest gets 0 and no weight decay, so that it has no reason to move.
"""

from __future__ import annotations

import torch
from steps import after
from verdict import Finding, Kind, conclude, ours

STEPS, LR = 1000, 1e-3


def finding(kind: Kind) -> Finding:
    generator = torch.Generator().manual_seed(0)
    grads = (torch.randn(8192, 2, generator=generator) for _ in range(STEPS))
    param, _ = after(kind, torch.zeros(8192, 2), (g * torch.tensor([1, 0]) for g in grads), lr=LR, weight_decay=0)
    idle = param[:, 1]
    moved, drift = int(idle.ne(0).sum()), float(idle.mean()) / LR / STEPS
    return Finding(
        f"after {STEPS} steps {moved} of {idle.numel()} idle parameters moved, mean {drift:+.2g} lr a step", moved > 0
    )


def theirs() -> Finding:
    from bitsandbytes.optim import AdamW8bit

    return finding(AdamW8bit)


def own() -> Finding:
    return finding(ours("AdamW8bit"))


if __name__ == "__main__":
    conclude(theirs, own)
