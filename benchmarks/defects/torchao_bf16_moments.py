"""torchao keeps the 32-bit moments of small bfloat16 parameters in bfloat16, where a second moment cannot decay.

0.999 of a bfloat16 number rounds to that number. A bias of 1024 elements gets gradients of 1 for 20 steps and of 0.01
afterwards; its second moment should have come close to 0.0001 when 8000 steps have passed.
"""

from __future__ import annotations

import torch
from verdict import Finding, Kind, conclude, ours

LARGE_STEPS, STEPS = 20, 8000


def finding(kind: Kind) -> Finding:
    param = torch.nn.Parameter(torch.zeros(1024, dtype=torch.bfloat16))
    optimizer = kind([param], weight_decay=0)
    for number in range(STEPS):
        param.grad = torch.full_like(param, 1.0 if number < LARGE_STEPS else 0.01)
        optimizer.step()
        moment = optimizer.state[param]["exp_avg_sq"]
    exact = (1 - 0.999**LARGE_STEPS) * 0.999 ** (STEPS - LARGE_STEPS) + 1e-4 * (1 - 0.999 ** (STEPS - LARGE_STEPS))
    root = (float(moment[0]) / exact) ** 0.5
    return Finding(f"kept in {str(moment.dtype)[6:]}, root of it {root:.3g} times the exact one", abs(root - 1) > 0.1)


def theirs() -> Finding:
    from torchao.optim import AdamW8bit

    return finding(AdamW8bit)


def own() -> Finding:
    return finding(ours("AdamW8bit"))


if __name__ == "__main__":
    conclude(theirs, own)
