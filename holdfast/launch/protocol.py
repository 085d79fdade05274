"""What the driver and its processes say to each other, besides the names of methods."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.errors import ConfigurationError

__all__ = ["CONTROL_METHODS", "STORAGE_METHODS", "EpochPlan", "describe_error"]

CONTROL_METHODS = frozenset(
    {"abort", "stop", "drain", "inject", "kill", "pulse", "fence", "admit", "inventory", "forget_above", "begin"}
    | {"quarantine", "arm", "strike"}
)
"""Calls that must not wait behind a long one: an epoch that runs, a checkpoint that is written."""
STORAGE_METHODS = frozenset({"persist"})
"""Calls that take as long as the storage does; they wait for each other, and nothing else waits for them."""


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
    checkpoints: str = ""
    """Storage from which to read the durable checkpoint of ``version``; empty when memory holds it."""
    held: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Where ranks of another roster have left ``version``: fields of a ``HeldPart`` by rank; empty when the rank's own
    arena holds it."""
    repairs: Sequence[Mapping[str, object]] = ()
    """Fields of the ``StageRepair`` of every rank that makes its state from ``held``; the others read their own."""
    token: str = ""
    """By which the keepers that are asked for anything know who may ask."""
    keepers: Mapping[str, str] = field(default_factory=dict)
    """Address of the keeper of each node that may hold pieces of frozen files; none for a run without them."""


def describe_error(error: BaseException) -> str:
    """One line naming the error, then the traceback, unless the message alone says what to do."""
    head = f"{type(error).__name__}: {error}"
    if isinstance(error, ConfigurationError):
        return head
    return head + "\n" + "".join(traceback.format_exception(error))
