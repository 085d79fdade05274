"""What the driver tells a worker about one membership epoch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EpochPlan"]


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """What a worker needs to know about one membership epoch."""

    epoch: int
    rank: int
    world: int
    version: int
    """Version to start from; -1 is the fresh model."""
    rendezvous: str
    """Path of a file that no earlier epoch has used, on storage all ranks share."""
