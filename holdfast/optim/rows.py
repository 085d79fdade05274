"""What an engine updates: rows of flat tensors. Knows no optimizer, no sharding and no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from holdfast.optim.coefficients import Coefficients
from holdfast.optim.rules import Norms, Rule

__all__ = ["Engine", "Row", "Settings"]


@dataclass(slots=True)
class Row:
    """One tensor, or a part of one that starts on a quantisation block. All tensors flat and contiguous."""

    param: Tensor
    """fp32, bf16 or fp16 [n]."""
    grad: Tensor
    """fp32, bf16 or fp16 [n]."""
    moments: Sequence[Tensor]
    """In the order of the rule: uint8 codes [n], or fp32 [n] where ``absmax`` is empty."""
    absmax: Sequence[Tensor]
    """fp32 [blocks] per moment; empty for 32-bit moments."""
    by: Coefficients
    first: int = 0
    """Index of the first element in the whole tensor, for stochastic rounding."""
    key: int = 0
    """64 bits that name seed, step and tensor, for stochastic rounding."""

    def part(self, start: int, stop: int, block_size: int) -> Row:
        """Elements ``start .. stop``, both on blocks but for the row's own end. Views."""
        blocks = slice(start // block_size, -(-stop // block_size))
        return replace(
            self,
            param=self.param[start:stop],
            grad=self.grad[start:stop],
            moments=[moment[start:stop] for moment in self.moments],
            absmax=[absmax[blocks] for absmax in self.absmax],
            first=self.first + start,
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """What all rows of a call share."""

    block_size: int
    nonzero_second_moment: bool = True
    """Keep positive second moments from rounding to 0."""
    stochastic_rounding: bool = False
    """Of bf16 parameters; others round to the nearest."""


class Engine(Protocol):
    """Carries updates out. Every engine gives the same bits, for any number of threads."""

    def update(self, rule: Rule, rows: Sequence[Row], settings: Settings) -> None:
        """One update of every row, in place.

        An element whose effective gradient is NaN, infinite or above 2^63 is left out: its parameter keeps its bits and
        so do its 32-bit moments; in an 8-bit block that has usable elements too, its moments are encoded again with
        the block's new absmax. A block without any keeps every bit.
        """
        ...

    def norms(self, kind: Norms, rows: Sequence[Row], settings: Settings) -> list[tuple[float, float]]:
        """Two sums of squares per row, changing nothing: of the scaled gradient and 0; of the parameter and the scaled
        gradient; or of the parameter and the LAMB direction. Gradients and directions count where they are usable.

        Sums are in double precision: within a block and over blocks by halving, padded with zeros to powers of two.
        """
        ...
