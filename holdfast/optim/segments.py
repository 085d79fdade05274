"""Norms of whole parameters where a flat tensor holds parts of many, and other ranks the rest.

ZeRO lays parameters one behind the other and cuts the result into shares. Most rules do not mind: they look at single
elements. A trust ratio needs the norms of each whole parameter, so the owner of the flat tensors says which elements
belong to which parameter, and how to add up over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.errors import InvariantViolation
from holdfast.optim.rows import Row

__all__ = ["Part", "Segments", "over_ranks", "rows_with_norms", "segments_of", "set_segments", "split"]

Part = tuple[int, int, int]
"""First element of a part of a parameter in a flat tensor, the end, and the number of the parameter."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Parts of parameters in the flat tensors of an optimizer. Not state: whoever makes the tensors says it anew."""

    parts: Mapping[Tensor, Sequence[Part]]
    """Of each flat tensor. What lies between them is padding, and always 0."""
    count: int
    """How many numbers there are. A parameter has the same one on every rank."""
    total: Callable[[Tensor], Tensor]
    """Collective. The sum over ranks of a float64 vector, the same bits on every rank."""


def set_segments(
    optimizer: torch.optim.Optimizer,
    parts: Mapping[Tensor, Sequence[Part]],
    count: int,
    total: Callable[[Tensor], Tensor],
) -> None:
    """From now on the parameters of ``optimizer`` are flat tensors that hold the ``parts``; see ``Segments``.

    Steps of LAMB and LARS then are collective: ``total`` is called once for each parameter group that has gradients, so
    these must be the same groups in the same order on every rank.
    """
    vars(optimizer)["segments"] = Segments(parts, count, total)


def segments_of(optimizer: torch.optim.Optimizer) -> Segments | None:
    """What ``set_segments`` has said; None when parameters are whole."""
    found: Segments | None = vars(optimizer).get("segments")  # an unpickled or copied optimizer has no attributes
    return found


def rows_with_norms(
    segments: Segments | None,
    rows: Sequence[tuple[Tensor, Row]],
    measure: Callable[[list[Row]], list[tuple[float, float]]],
    block_size: int,
) -> list[tuple[Row, tuple[float, float]]]:
    """Rows that hold one parameter each, and the two norms of the whole parameter.

    ``rows`` come with the tensors that they are of, ``measure`` gives two sums of squares for each row. Collective with
    ``segments``.
    """
    if segments is None:
        whole = [row for _, row in rows]
        return [(row, _roots(sums)) for row, sums in zip(whole, measure(whole), strict=True)]
    parts = [part for param, _ in rows for part in segments.parts[param]]
    cut = [part for param, row in rows for part in split(row, segments.parts[param], block_size)]
    sums_of_all = over_ranks(measure(cut), parts, segments, rows[0][0].device)
    return [(row, _roots(sums)) for row, sums in zip(cut, sums_of_all, strict=True)]


def split(row: Row, parts: Sequence[Part], block_size: int) -> list[Row]:
    """One row for each part, in their order.

    Raises: InvariantViolation when a part does not begin on a quantisation block.
    """
    return [_cut(row, start, stop, block_size) for start, stop, _ in parts]


def over_ranks(
    sums: Sequence[tuple[float, float]], parts: Sequence[Part], segments: Segments, device: torch.device
) -> list[tuple[float, float]]:
    """Collective. For each part, given two sums over its elements: the same sums over all parts of its parameter."""
    mine = [[0.0, 0.0] for _ in range(segments.count)]
    for (first, second), (_, _, number) in zip(sums, parts, strict=True):
        mine[number][0] += first
        mine[number][1] += second
    whole = segments.total(torch.tensor(mine, dtype=torch.float64, device=device).view(-1)).tolist()
    return [(whole[2 * number], whole[2 * number + 1]) for _, _, number in parts]


def _roots(sums: tuple[float, float]) -> tuple[float, float]:
    return math.sqrt(sums[0]), math.sqrt(sums[1])


def _cut(row: Row, start: int, stop: int, block_size: int) -> Row:
    if row.absmax and start % block_size:
        raise InvariantViolation(
            f"a parameter begins at element {start} of a flat tensor, inside a block of {block_size}"
        )
    return row.part(start, stop, block_size)
