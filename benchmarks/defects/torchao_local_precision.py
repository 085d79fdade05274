"""torchao decides by the local shard whether a parameter's moments get 8 bits, so the number of ranks decides it.

A matrix of 96 × 64, above the threshold of 4096 elements as a whole and below it as each of two shards.
"""

from __future__ import annotations

import torch
from fsdp2 import layer_after_backward
from ranks import first_error, on_two_ranks
from steps import after
from torch.distributed.tensor import DTensor
from verdict import CannotTell, Finding, Kind, conclude, ours

SHAPE = (96, 64)


def precision(optimizer: torch.optim.Optimizer) -> str:
    """Of the first moment, in either library's state."""
    state = next(iter(optimizer.state.values()))
    moment = state.get("exp_avg_codes", state.get("exp_avg"))
    local = moment.to_local() if isinstance(moment, DTensor) else moment
    return "8 bits" if "exp_avg_codes" in state or hasattr(local, "codes") else "32 bits"


def sharded(kind: Kind) -> str:
    optimizer = kind(layer_after_backward(SHAPE).parameters())
    optimizer.step()
    return precision(optimizer)


def their_rank() -> str:
    from torchao.optim import AdamW8bit

    return sharded(AdamW8bit)


def our_rank() -> str:
    return sharded(ours("AdamW8bit"))


def finding(kind: Kind, on_ranks: list[object]) -> Finding:
    _, optimizer = after(kind, torch.zeros(SHAPE), [torch.randn(SHAPE)])
    alone = precision(optimizer)
    if not set(on_ranks) <= {"8 bits", "32 bits"}:
        raise CannotTell(f"no precision on two ranks: {first_error(on_ranks)}")
    return Finding(f"{alone} on one rank, {on_ranks[0]} on two", any(found != alone for found in on_ranks))


def theirs() -> Finding:
    from torchao.optim import AdamW8bit

    return finding(AdamW8bit, on_two_ranks(their_rank))


def own() -> Finding:
    return finding(ours("AdamW8bit"), on_two_ranks(our_rank))


if __name__ == "__main__":
    conclude(theirs, own)
