"""torchao compiles at the first step, once for every shape: training stands still before it has begun.

First step of eight matrices of eight shapes against the median of later ones, compiler cache empty.
"""

from __future__ import annotations

import statistics
import time

import torch
from verdict import Finding, Kind, conclude, ours

SHAPES = [(256, 64 * n) for n in range(1, 9)]
BAR_S = 1.0
"""A longer first step is called a pause."""


def finding(kind: Kind) -> Finding:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer, seconds = kind(params), []
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(11):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    later = statistics.median(seconds[1:])
    return Finding(f"first step {seconds[0]:.2f} s, later ones {1000 * later:.1f} ms", seconds[0] > BAR_S)


def theirs() -> Finding:
    from torchao.optim import AdamW8bit

    return finding(AdamW8bit)


def own() -> Finding:
    return finding(ours("AdamW8bit"))


if __name__ == "__main__":
    conclude(theirs, own)
