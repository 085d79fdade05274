"""What a continual adapter method has to say; everything else is the same for all of them.

Suffixes of tensor names::

    P tokens (any leading dimensions)    D input features    O output features    R rows of a bank    K selected rows

A task's tensors have their rows first, whatever a row means to the method, so that the finished tasks of a layer are
one tensor per name, and a prefix of the tasks is a view of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError

__all__ = ["Method", "Site", "Tensors"]

Tensors = Mapping[str, Tensor]
"""By name, each with its rows in dimension 0."""


@dataclass(frozen=True, slots=True)
class Site:
    """The linear layer that a method adapts."""

    name: str
    in_features: int
    out_features: int
    device: torch.device
    dtype: torch.dtype
    inputs: Tensor | None = None
    """Mean of x xᵀ [D, D] over the collected inputs, fp64; for methods with ``needs_inputs``."""


class Method(ABC):
    """One continual adapter method: a frozen dataclass whose fields are its options, as JSON values.

    A layer asks ``begin`` for a new task's tensors, passes what ``fold`` makes of them behind the rows of the finished
    tasks to ``delta``, and keeps what ``seal`` returns, without gradient, when the task ends.
    """

    name: ClassVar[str]
    trains: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    """Which of a new task's tensors get a gradient."""
    zero_at_start: ClassVar[str] = "up"
    """The tensor that is zero as long as a new task has not been trained."""
    keeps_tasks: ClassVar[bool] = True
    """False: a task's tensors take the place of the last task's, so earlier tasks cannot be replayed."""
    needs_task: ClassVar[bool] = False
    """True: one task's tensors act at a time, and the caller has to say which."""
    needs_inputs: ClassVar[bool] = False
    """True: the inputs of the layer are collected before a task begins and again before it ends."""
    acts_apart: ClassVar[bool] = False
    """True: every task's ``delta`` is computed by itself and added, oldest first, so that any choice of tasks can act,
    each with a weight. False: the tasks in use are one bank."""
    merge_refusal: ClassVar[str] = ""
    """Why the update cannot be added to the base weight; empty if it can."""

    def __post_init__(self) -> None:
        if problems := self.check():
            raise ConfigurationError([f"{self.name}: {problem}" for problem in problems])

    def check(self) -> Sequence[str]:
        """One sentence for every rule that the options break."""
        return ()

    @abstractmethod
    def begin(self, site: Site, sealed: Tensors, generator: torch.Generator) -> Tensors:
        """The tensors of a new task, on the CPU or on the site's device; random ones drawn from a CPU ``generator``.

        ``sealed``: all rows of the finished tasks, empty before the first.
        """

    def fold(self, current: Tensors) -> Tensors:
        """The current task's tensors as they act in the bank: constant factors multiplied in. Differentiable."""
        return current

    @abstractmethod
    def delta(self, x_PD: Tensor, bank: Tensors, *, is_training: bool) -> Tensor:
        """What is added to the base layer's output, [..., O]. ``bank``: the rows in use, at least one."""

    def answer(self, x_PD: Tensor, bank: Tensors, *, is_training: bool) -> tuple[Tensor, Tensor | None]:
        """``delta``, and a scalar that is added to the loss of these tokens while the task trains, or None."""
        return self.delta(x_PD, bank, is_training=is_training), None

    def seal(self, site: Site, current: Tensors, sealed: Tensors) -> Tensors:
        """What stays of a task; what has been folded stays bit by bit, so that the finished task is the trained one."""
        return self.fold(current)

    def merged(self, bank: Tensors) -> Tensor:
        """The update [O, D] of the base weight. Only where ``merge_refusal`` is empty."""
        raise NotImplementedError(self.merge_refusal)

    def active(self, bank: Tensors) -> int:
        """Elements of the bank that one token's forward pass reads."""
        return sum(tensor.numel() for tensor in bank.values())

    def penalty(self, current: Tensors, sealed: Tensors) -> Tensor | None:
        """A scalar to add to the loss while this task trains, or None."""
        return None
