"""torchao keeps a tensor in 32 bits when its size is no multiple of the block size, however large it is.

State of one parameter of 1024 × 1024 elements, and of one of 1001 × 1001.
"""

from __future__ import annotations

import torch
from steps import after, state_bytes
from verdict import Finding, Kind, conclude, ours


def finding(kind: Kind) -> Finding:
    per_element = {}
    for side in (1024, 1001):
        _, optimizer = after(kind, torch.zeros(side, side), [torch.randn(side, side)])
        per_element[side] = state_bytes(optimizer) / side**2
    text = ", ".join(f"{side} × {side}: {size:.2f} bytes an element" for side, size in per_element.items())
    return Finding(text, per_element[1001] > 2.1)


def theirs() -> Finding:
    from torchao.optim import AdamW8bit

    return finding(AdamW8bit)


def own() -> Finding:
    return finding(ours("AdamW8bit"))


if __name__ == "__main__":
    conclude(theirs, own)
