"""bitsandbytes' LAMB8bit is Adam8bit and its LARS8bit is SGD8bit: neither scales an update by its layer's trust ratio.

A trust ratio makes the length of LAMB's update proportional to the parameter's norm and LARS's independent of the
gradient's, so a parameter or gradient 100 times as large tells.
"""

from __future__ import annotations

from typing import Any

import torch
from steps import after
from torch import Tensor
from verdict import Finding, Kind, conclude, ours

LR, LARGER = 1e-2, 100


def grown_by(kind: Kind, start: Tensor, grad: Tensor, times: tuple[int, int], **options: Any) -> float:
    """How much longer the update is once the parameter and the gradient are so many times as large."""
    length = [
        float((after(kind, start * p, [grad * g], lr=LR, **options)[0] - start * p).norm()) for p, g in ((1, 1), times)
    ]
    return length[1] / length[0]


def finding(lamb: Kind, lars: Kind) -> Finding:
    start, grad = torch.randn(64, 256), torch.randn(64, 256)
    by_param = grown_by(lamb, start, grad, (LARGER, 1), weight_decay=0)
    by_grad = grown_by(lars, start, grad, (1, LARGER), momentum=0.9)
    text = f"LAMB8bit: {LARGER}x the parameter, {by_param:.3g}x the update (LAMB: 100); "
    text += f"LARS8bit: {LARGER}x the gradient, {by_grad:.3g}x the update (LARS: 1)"
    return Finding(text, abs(by_param / LARGER - 1) > 0.05 or abs(by_grad - 1) > 0.05)


def same_as(kind: Kind, plain: Kind, **options: Any) -> bool:
    start, grads = torch.randn(64, 256), [torch.randn(64, 256) for _ in range(5)]
    return torch.equal(after(kind, start, grads, lr=LR, **options)[0], after(plain, start, grads, lr=LR, **options)[0])


def theirs() -> Finding:
    from bitsandbytes.optim import Adam8bit, LAMB8bit, LARS8bit, SGD8bit

    peer = finding(LAMB8bit, LARS8bit)
    lamb, lars = same_as(LAMB8bit, Adam8bit, weight_decay=0.1), same_as(LARS8bit, SGD8bit, momentum=0.9)
    text = f"{peer.text}; after 5 steps LAMB8bit equals Adam8bit: {lamb}, LARS8bit equals SGD8bit: {lars}"
    return Finding(text, peer.shows_it)


def own() -> Finding:
    return finding(ours("LAMB8bit"), ours("LARS8bit"))


if __name__ == "__main__":
    conclude(theirs, own)
