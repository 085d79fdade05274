"""With uneven FSDP2 shards and a compiler cache that an earlier run has filled, torchao's first step fails.

Two gloo ranks step on a matrix of 129 × 256, in two runs that share a cache, as a restarted job does.
"""

from __future__ import annotations

from collections.abc import Callable

from fsdp2 import layer_after_backward
from ranks import first_error, on_two_ranks, refusal
from verdict import CannotTell, Finding, Kind, conclude, known, ours


def step_of(kind: Kind) -> str:
    optimizer = kind(layer_after_backward((129, 256)).parameters())
    return refusal(optimizer.step)


def their_rank() -> str:
    from torchao.optim import AdamW8bit

    return step_of(AdamW8bit)


def our_rank() -> str:
    return step_of(ours("AdamW8bit"))


def two_runs(rank: Callable[[], str]) -> tuple[str, str]:
    return first_error(on_two_ranks(rank)), first_error(on_two_ranks(rank))


def theirs() -> Finding:
    cold, warm = two_runs(their_rank)
    if cold:
        raise CannotTell(f"the first run fails already: {cold}")
    found = known(warm, "expected size", "steps")
    return Finding(f"first run: steps; second run: {found.text}", found.shows_it)


def own() -> Finding:
    cold, warm = two_runs(our_rank)
    return Finding(f"first run: {cold or 'steps'}; second run: {warm or 'steps'}", bool(cold or warm))


if __name__ == "__main__":
    conclude(theirs, own)
