"""What an engine must be able to ask of an optimizer, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from holdfast.parallel.slices import StateTensor

__all__ = ["OptimizerStates"]


class OptimizerStates(Protocol):
    """Knows what an optimizer keeps per parameter. ``holdfast.optim`` is one."""

    def ensure_state(self, optimizer: torch.optim.Optimizer, /) -> None: ...

    def describe_state(self, optimizer: torch.optim.Optimizer, param: Tensor, /) -> Sequence[StateTensor]: ...

    def scalars(self, optimizer: torch.optim.Optimizer, param: Tensor, /) -> Mapping[str, object]: ...

    def load_scalars(
        self, optimizer: torch.optim.Optimizer, param: Tensor, values: Mapping[str, object], /
    ) -> None: ...

    def set_segments(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[Tensor, Sequence[tuple[int, int, int]]],
        count: int,
        total: Callable[[Tensor], Tensor],
        /,
    ) -> None:
        """Say which parameters the optimizer's flat tensors hold: first element, end, and one of ``count`` numbers.

        ``total`` is collective and sums over ranks.
        """
        ...
