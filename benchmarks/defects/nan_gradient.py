"""One NaN in one gradient costs bitsandbytes a parameter and torchao a block of 256 for good.

One element of one step's gradient is NaN (then, anew, infinite); three clean steps follow. Counted: parameters that are
no longer numbers.
"""

from __future__ import annotations

import math

import torch
from steps import after
from verdict import Finding, Kind, conclude, ours


def finding(kinds: dict[str, Kind]) -> Finding:
    texts, most = [], 0
    for name, kind in kinds.items():
        lost = [lost_parameters(kind, bad) for bad in (math.nan, math.inf)]
        texts.append(f"{name} loses {lost[0]} of 4096 parameters to a NaN, {lost[1]} to an infinity")
        most = max(most, *lost)
    return Finding("; ".join(texts), most > 0)


def lost_parameters(kind: Kind, bad: float) -> int:
    grads = [torch.randn(16, 256) for _ in range(5)]
    grads[1][3, 7] = bad
    param, _ = after(kind, torch.randn(16, 256), grads)
    return int(param.isfinite().logical_not().sum())


def theirs() -> Finding:
    import bitsandbytes.optim
    import torchao.optim

    return finding({"bitsandbytes": bitsandbytes.optim.AdamW8bit, "torchao": torchao.optim.AdamW8bit})


def own() -> Finding:
    return finding({"AdamW8bit": ours("AdamW8bit")})


if __name__ == "__main__":
    conclude(theirs, own)
