"""bitsandbytes keeps the never negative sums of RMSprop and Adagrad in the signed codebook: half of the codes lie idle.

Compared with the exact second moment of the same gradients: the share of the codes in use and the relative error of
what is stored, root of the mean square over elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from steps import after
from torch import Tensor
from verdict import Finding, conclude, ours

from holdfast.optim import codebook

SHAPE = (256, 1024)
EXACT: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "RMSprop8bit": lambda grads: torch.stack([0.01 * 0.99 ** (4 - i) * g**2 for i, g in enumerate(grads)]).sum(0),
    "Adagrad8bit": lambda grads: torch.stack(grads).square().sum(0),
}
MOMENT = {"RMSprop8bit": "square_avg", "Adagrad8bit": "sum"}


def finding(read: Callable[[str], tuple[Tensor, Tensor, Tensor]]) -> Finding:
    """``read`` trains one of the two and returns codes, absmax and the codebook."""
    texts, fewest = [], 256
    for name in EXACT:
        codes, absmax, book = read(name)
        values = (book[codes.view(-1, 256).int()] * absmax.view(-1, 1)).view(SHAPE)
        exact, used = EXACT[name](gradients()), codes.unique().numel()
        error = float((values / exact - 1).square().mean().sqrt())
        texts.append(f"{name} uses {used} of 256 codes, relative error {error:.4f}")
        fewest = min(fewest, used)
    return Finding("; ".join(texts), fewest <= 129)


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(5)]


def theirs() -> Finding:
    import bitsandbytes.optim

    def read(name: str) -> tuple[Tensor, Tensor, Tensor]:
        _, optimizer = after(getattr(bitsandbytes.optim, name), torch.zeros(SHAPE), gradients())
        state = next(iter(optimizer.state.values()))
        return state["state1"], state["absmax1"], state["qmap1"]

    return finding(read)


def own() -> Finding:
    def read(name: str) -> tuple[Tensor, Tensor, Tensor]:
        _, optimizer = after(ours(name), torch.zeros(SHAPE), gradients())
        state, moment = next(iter(optimizer.state.values())), MOMENT[name]
        return state[f"{moment}_codes"], state[f"{moment}_absmax"], codebook(False)

    return finding(read)


if __name__ == "__main__":
    conclude(theirs, own)
