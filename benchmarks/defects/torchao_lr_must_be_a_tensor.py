"""torchao refuses to step once a training loop has written a plain number into a group's lr.

Many loops do ``group["lr"] = value`` each step; torch's own schedulers know about tensors and are fine.
"""

from __future__ import annotations

import torch
from ranks import refusal
from verdict import Finding, Kind, conclude, known, ours


def error_of(kind: Kind) -> str:
    param = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = kind([param])
    param.grad = torch.randn_like(param)
    optimizer.param_groups[0]["lr"] = 1e-4
    return refusal(optimizer.step)


def theirs() -> Finding:
    from torchao.optim import AdamW8bit

    return known(error_of(AdamW8bit), "non-Tensor", "steps")


def own() -> Finding:
    error = error_of(ours("AdamW8bit"))
    return Finding(error or "steps", bool(error))


if __name__ == "__main__":
    conclude(theirs, own)
