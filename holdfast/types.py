"""The nouns that every part of Holdfast shares. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:  # a type in a signature, never a run-time dependency of the root modules
    from torch import Tensor

__all__ = [
    "CopyReport",
    "Epoch",
    "NodeId",
    "Phase",
    "Precision",
    "Quantization",
    "Rank",
    "RankState",
    "SliceSpec",
    "StateSlice",
    "Step",
    "StepReport",
    "Version",
    "WorkerId",
]

Rank = NewType("Rank", int)
"""Position in the process group of one membership epoch, 0 .. world-1."""
Step = NewType("Step", int)
"""Number of optimizer steps finished."""
Version = NewType("Version", int)
"""A snapshot's number: the step whose finished state it holds; 0 is the initial state."""
Epoch = NewType("Epoch", int)
"""Membership epoch: grows by one whenever the set of worker processes changes."""
NodeId = NewType("NodeId", int)
"""A (virtual) node: one keeper and its workers."""
WorkerId = NewType("WorkerId", int)
"""A worker process, never reused: a replacement gets a new one."""


class Precision(Enum):
    """Arithmetic of forward and backward; master weights and moments stay as the optimizer keeps them."""

    FP32 = "fp32"
    BF16 = "bf16"


class Phase(IntEnum):
    """What a rank is doing; shown when it falls silent."""

    IDLE = 0
    JOIN = 1
    BUILD = 2
    RESTORE = 3
    FORWARD_BACKWARD = 4
    FENCE = 5
    VOTE = 6
    UPDATE = 7
    CAPTURE = 8
    EVALUATE = 9
    EXPORT = 10
    PARKED = 11


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the bytes of a quantised slice become numbers."""

    block_size: int
    """Elements that share one absmax."""
    codebook: str
    """Name of the 256-entry table, e.g. ``dynamic-signed``."""
    absmax: str
    """Name of the slice that holds the fp32 absmax of these blocks."""


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """Which part of which global tensor a piece of memory holds; free of world size and address."""

    name: str
    """Global name, for example ``blocks.0.attention.wq.weight/master``."""
    shape: tuple[int, ...]
    """Shape of the whole (global) tensor."""
    start: int
    """First element held, in the row-major flat index of the whole tensor."""
    stop: int
    """One past the last element held."""
    dtype: str
    """torch dtype without its prefix: ``float32``, ``uint8`` …"""
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class StateSlice:
    """A named slice of the live training state. ``tensor`` is a contiguous 1-D view whose address
    does not change between steps; writing into it changes the state."""

    spec: SliceSpec
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class RankState:
    """Everything one rank must not lose: tensors by reference, scalars by value."""

    slices: Sequence[StateSlice]
    scalars: Mapping[str, object] = field(default_factory=dict)
    """JSON values: step, tokens, data position, optimizer step counts."""


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What became of the version that was offered last."""

    version: int = -1
    """-1: none was offered since the last report."""
    is_complete: bool = False
    waited_s: float = 0.0
    """Seconds the training thread waited for it."""
    copy_s: float = 0.0
    """Seconds from the first byte to the last; most of them while the next step was computed."""
    why_not: str = ""
    """Why it is not complete."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished optimizer step, equal on every rank but for the seconds and bytes."""

    step: int
    """Steps finished, this one included."""
    epoch: int
    loss: float
    """Mean negative log-likelihood of the global batch, nats per token."""
    bits_per_byte: float
    learning_rate: float
    grad_norm: float
    """Global norm before clipping."""
    tokens: int
    """Tokens trained on since the first step."""
    step_s: float
    stall_s: float
    """Seconds the step waited for the snapshotter."""
    copy_bytes: int
    """Bytes this rank copied into its keeper's arena."""
    committed: int
    """Newest version known to be held by every rank."""
    copy_s: float = 0.0
    """Seconds that copying the version before took, beside this step's forward and backward."""
    memory_bytes: int = 0
    """Most that tensors have taken of this rank's GPU, or the process of the RAM; 0 if unknown."""
