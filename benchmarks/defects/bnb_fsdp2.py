"""bitsandbytes cannot step on parameters that torch's FSDP2 has sharded.

Two gloo ranks, one linear layer of 128 × 256, one step.
"""

from __future__ import annotations

from fsdp2 import layer_after_backward
from ranks import first_error, on_two_ranks, refusal
from verdict import Finding, Kind, conclude, known, ours


def step_of(kind: Kind) -> str:
    optimizer = kind(layer_after_backward((128, 256)).parameters())
    return refusal(optimizer.step)


def their_rank() -> str:
    from bitsandbytes.optim import AdamW8bit

    return step_of(AdamW8bit)


def our_rank() -> str:
    return step_of(ours("AdamW8bit"))


def theirs() -> Finding:
    return known(first_error(on_two_ranks(their_rank)), "mixed torch.Tensor and DTensor", "steps")


def own() -> Finding:
    error = first_error(on_two_ranks(our_rank))
    return Finding(error or "steps", bool(error))


if __name__ == "__main__":
    conclude(theirs, own)
