"""A positive second moment that rounds to 0 makes the next updates too large.

A block's first gradient has one element of 1, all other gradients are normal with a deviation of 1e-4. Given is how
many of the small elements' second moments are stored as 0 after that step, and the root mean square of their updates in
later ones, over that of torch's AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from verdict import Finding, Kind, conclude, ours

from holdfast.optim import dequantize_blockwise

LR, LOOKED_AT = 1e-3, (2, 30, 1000)


def trained(kind: Kind) -> tuple[int, list[float]]:
    """Second moments of 0 after the first step, and the size of an update in the steps looked at."""
    generator, param = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.zeros(16, 256))
    optimizer, zeros, sizes = kind([param], lr=LR, weight_decay=0), 0, []
    for number in range(1, LOOKED_AT[-1] + 1):
        before = param.detach().clone()
        param.grad = torch.randn(16, 256, generator=generator) * 1e-4
        if number == 1:
            param.grad[:, 0] = 1
        optimizer.step()
        if number == 1:
            zeros = int((second_moment(optimizer.state[param])[:, 1:] == 0).sum())
        if number in LOOKED_AT:
            sizes.append(float((param.detach() - before)[:, 1:].square().mean().sqrt()))
    return zeros, sizes


def second_moment(state: dict[str, Any]) -> Any:  # Any: a tensor, from libraries that are not typed
    """As it is stored, in any of the libraries."""
    if "qmap2" in state:
        return (state["qmap2"][state["state2"].int()] * state["absmax2"].view(-1, 1)).detach()
    if "exp_avg_sq_codes" in state:
        return dequantize_blockwise(state["exp_avg_sq_codes"], state["exp_avg_sq_absmax"], signed=False, block_size=256)
    moment = state["exp_avg_sq"]
    return moment.dequantize() if hasattr(moment, "codes") else moment


def finding(kinds: dict[str, Kind]) -> Finding:
    _, exact = trained(torch.optim.AdamW)
    texts, most = [], 0
    for name, kind in kinds.items():
        zeros, sizes = trained(kind)
        relative = [f"{size / true:.3g}" for size, true in zip(sizes, exact, strict=True)]
        texts.append(
            f"{name} stores {zeros} of 4080 as 0; updates in steps {LOOKED_AT} are {', '.join(relative)} of exact ones"
        )
        most = max(most, zeros)
    return Finding("; ".join(texts), most > 0)


def theirs() -> Finding:
    import bitsandbytes.optim
    import torchao.optim

    return finding({"torchao": torchao.optim.AdamW8bit, "bitsandbytes": bitsandbytes.optim.AdamW8bit})


def own() -> Finding:
    return finding({"AdamW8bit": ours("AdamW8bit")})


if __name__ == "__main__":
    conclude(theirs, own)
