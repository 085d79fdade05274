"""Rows that stay the same from one step to the next, but for gradients, coefficients and keys.

Reading 1000 tensors' addresses and wrapping them in ``Row`` costs more than updating them. A table keeps what does not
change; an engine that works from numbers takes those and never looks at a row, any other engine sees a plain sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from holdfast.optim.coefficients import Coefficients
from holdfast.optim.rows import Row

__all__ = ["RowTable"]


class RowTable(Sequence[Row]):
    """The rows of one call of an engine. Its owner answers for the addresses: they must be those it was made with."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self._is_current = False
        self.grads: Sequence[Tensor] = ()
        """This step's, contiguous, of the shapes of their parameters. Their dtypes are the same at every step."""
        self.by: Sequence[Coefficients] = ()
        self.keys: Sequence[int] = ()
        self.prepared: object = None
        """What an engine made of the rows, to use again at the next step. Its type is the engine's affair."""

    def renew(self, grads: Sequence[Tensor], by: Sequence[Coefficients], keys: Sequence[int]) -> None:
        """Go to another step: what varies, one entry per row."""
        self.grads, self.by, self.keys = grads, by, keys
        self._is_current = False

    def release(self) -> None:
        """Let go of the gradients."""
        if self._is_current:
            for row in self._rows:
                row.grad = row.param
        self.grads, self._is_current = (), False

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if not self._is_current:
            self._refresh()
        return self._rows[index]

    def _refresh(self) -> None:
        for row, grad, by, key in zip(self._rows, self.grads, self.by, self.keys, strict=True):
            row.grad, row.by, row.key = grad.detach().view(-1), by, key
        self._is_current = True
