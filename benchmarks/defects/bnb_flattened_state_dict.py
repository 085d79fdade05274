"""bitsandbytes' nested state dict does not survive torch's flattened optimizer state dict.

Three steps, then the state goes through ``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` with
``flatten_optimizer_state_dict=True`` (the form for pipeline stages and for checkpoints that change shape) into a second
optimizer, and both make one more step.
"""

from __future__ import annotations

import torch
from ranks import refusal
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from verdict import Finding, Kind, conclude, known, ours

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def train(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        layer(torch.randn(8, 256, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def finding(kind: Kind) -> Finding:
    layer, other = torch.nn.Linear(256, 64), torch.nn.Linear(256, 64)
    optimizer, resumed = kind(layer.parameters()), kind(other.parameters())
    train(layer, optimizer, 3)
    other.load_state_dict(layer.state_dict())

    def hand_over() -> None:
        state = get_optimizer_state_dict(layer, optimizer, options=FLAT)
        set_optimizer_state_dict(other, resumed, state, options=FLAT)

    error = refusal(hand_over)
    if error:
        return Finding(error, True)
    train(layer, optimizer, 1)
    train(other, resumed, 1)
    same = torch.equal(layer.weight, other.weight)
    return Finding("goes on with the same bits" if same else "goes on with other bits", not same)


def theirs() -> Finding:
    from bitsandbytes.optim import AdamW8bit

    found = finding(AdamW8bit)
    return known(found.text, "'dict' object has no attribute 'to'", "") if found.shows_it else found


def own() -> Finding:
    return finding(ours("AdamW8bit"))


if __name__ == "__main__":
    conclude(theirs, own)
