"""torchao's state cannot be gathered into a full state dict when FSDP2's shards are uneven.

Two gloo ranks, a matrix of 129 × 256 (65 and 64 rows), ``get_optimizer_state_dict(full_state_dict=True)``.
"""

from __future__ import annotations

import torch
from fsdp2 import layer_after_backward
from ranks import first_error, on_two_ranks, refusal
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from verdict import Finding, Kind, conclude, known, ours

SHAPE = (129, 256)


def gather(kind: Kind) -> str:
    """The error it ends in, or that what rank 0 has is not all."""
    layer = layer_after_backward(SHAPE)
    optimizer = kind(layer.parameters())
    optimizer.step()
    whole: list[torch.Size] = []

    def full() -> None:
        found = get_optimizer_state_dict(layer, optimizer, options=StateDictOptions(full_state_dict=True))
        state = found["state"].get("weight", {})
        whole.append(state.get("exp_avg_codes", state.get("exp_avg")).shape)

    error = refusal(full)
    return error or ("" if tuple(whole[0]) == SHAPE else f"the full state dict has a moment of {list(whole[0])}")


def their_rank() -> str:
    from torchao.optim import AdamW8bit

    return gather(AdamW8bit)


def our_rank() -> str:
    return gather(ours("AdamW8bit"))


def theirs() -> Finding:
    return known(first_error(on_two_ranks(their_rank)), "constant_pad_nd", "gathers all of it")


def own() -> Finding:
    error = first_error(on_two_ranks(our_rank))
    return Finding(error or "gathers all of it", bool(error))


if __name__ == "__main__":
    conclude(theirs, own)
