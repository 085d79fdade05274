"""The update of a shard that cuts quantisation blocks.

Blocks that lie in the shard go to an engine as codes. Elements of the others, at most two blocks' worth where the
shard is a run of the whole parameter, go as decoded fp32 moments; afterwards the ranks agree on the largest magnitude
of every block, and each encodes its part with that. The bits are those of one rank, because engines compute both forms
alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.optim.quantize import decode_elements, encode_elements
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import Rule
from holdfast.optim.sharded import Axes, Piece, agree
from holdfast.optim.torch_engine import usable_elements

__all__ = ["CutUpdate", "settle"]


@dataclass(slots=True)
class _Edge:
    """Elements of blocks that other ranks hold parts of."""

    row: Row
    """As codes, with the absmax of all blocks."""
    blocks: Tensor
    """int64 [n], the block of each element."""
    moments: list[Tensor]
    """fp32 [n], which the engine updates."""
    usable: Tensor | None = None


class CutUpdate:
    """One update. ``row`` has the shard's parameter, gradient and codes, and absmax of all blocks of the parameter."""

    def __init__(self, rule: Rule, row: Row, piece: Piece, settings: Settings) -> None:
        self._signed = list(rule.moments.values())
        self._row, self._piece, self._settings = row, piece, settings
        whole = self._whole_blocks() if piece.is_contiguous and piece.elements else slice(0, 0)
        self._whole = slice(whole.start, whole.stop)
        self._edges = [self._edge(span) for span in self._around(self._whole)]
        self._interior = self._interior_row() if whole.start < whole.stop else None
        self.rows = [row for edge in self._edges for row in self._rows_of(edge)]
        """What an engine has to update."""
        if self._interior is not None:
            self.rows.append(self._interior)

    @property
    def axes(self) -> Axes:
        return self._piece.axes

    def before_update(self) -> None:
        """Note which elements will be used. The rows have their final coefficients by now."""
        by = self.rows[0].by if self.rows else self._row.by
        for edge in self._edges:
            edge.usable = usable_elements(replace(edge.row, by=by))

    def magnitudes(self) -> Tensor:
        """After the update: of every block the largest magnitude of each moment here, and 1 where an element was used.

        Shapes: fp32 ``[moments + 1, blocks]``.
        """
        absmax = self._row.absmax
        found = torch.zeros(len(absmax) + 1, absmax[0].numel(), device=absmax[0].device)
        if self._interior is not None:
            here = self._blocks_of(self._whole)
            for number, scale in enumerate(absmax):
                found[number, here] = scale[here]
            found[-1, here] = 1.0
        for edge in self._edges:
            assert edge.usable is not None, "before_update comes first"
            for number, values in enumerate((*edge.moments, edge.usable.float())):
                found[number].scatter_reduce_(0, edge.blocks, values.abs(), "amax")
        return found

    def encode(self, magnitudes: Tensor) -> None:
        """Store the new codes and absmax, given what ranks agreed on."""
        is_touched = magnitudes[-1] > 0
        for scale, agreed in zip(self._row.absmax, magnitudes, strict=False):
            scale.copy_(torch.where(is_touched, agreed, scale))
        for edge in self._edges:
            touched = is_touched[edge.blocks]
            for number, signed in enumerate(self._signed):
                scale, codes = self._row.absmax[number][edge.blocks], edge.row.moments[number]
                nonzero = self._settings.nonzero_second_moment and not signed
                codes.copy_(
                    torch.where(touched, encode_elements(edge.moments[number], scale, signed, nonzero=nonzero), codes)
                )

    def _whole_blocks(self) -> slice:
        """Elements of the shard, a run of the whole parameter, whose blocks lie in it."""
        size, count = self._settings.block_size, self._piece.elements
        ((_, _, first),) = self._piece.runs()
        head = -first % size
        end = first + count
        tail = 0 if end == self._numel() else end % size
        return slice(head, count - tail) if head < count else slice(0, 0)

    def _around(self, whole: slice) -> Iterator[slice]:
        count = self._piece.elements
        for span in (slice(0, whole.start), slice(whole.stop, count)):
            if span.start < span.stop:
                yield span

    def _edge(self, span: slice) -> _Edge:
        row = self._part(span, list(self._row.absmax))
        blocks = self._blocks(span).to(row.param.device)
        moments = [
            decode_elements(codes, absmax[blocks], signed)
            for codes, absmax, signed in zip(row.moments, row.absmax, self._signed, strict=True)
        ]
        return _Edge(row, blocks, moments)

    def _blocks(self, span: slice) -> Tensor:
        size = self._settings.block_size
        if not self._piece.is_contiguous:
            return self._piece.index()[span] // size
        ((_, _, first),) = self._piece.runs()
        return torch.arange(first + span.start, first + span.stop, device="cpu") // size

    def _rows_of(self, edge: _Edge) -> Iterator[Row]:
        """One row, or one per run where an element's place in the whole parameter matters."""
        row = replace(edge.row, moments=edge.moments, absmax=[])
        if self._piece.is_contiguous or not self._settings.stochastic_rounding:
            yield row
            return
        for start, stop, first in self._piece.runs():
            span = slice(start, stop)
            moments = [moment[span] for moment in edge.moments]
            yield replace(row, param=row.param[span], grad=row.grad[span], moments=moments, first=first)

    def _interior_row(self) -> Row:
        here = self._blocks_of(self._whole)
        return self._part(self._whole, [absmax[here] for absmax in self._row.absmax])

    def _blocks_of(self, span: slice) -> slice:
        size = self._settings.block_size
        ((_, _, first),) = self._piece.runs()
        return slice((first + span.start) // size, -(-(first + span.stop) // size))

    def _part(self, span: slice, absmax: Sequence[Tensor]) -> Row:
        row = self._row
        first = self._piece.runs()[0][2] + span.start if self._piece.is_contiguous else 0
        moments = [codes[span] for codes in row.moments]
        return replace(row, param=row.param[span], grad=row.grad[span], moments=moments, absmax=absmax, first=first)

    def _numel(self) -> int:
        return torch.Size(self._piece.shape).numel()


def settle(updates: Sequence[CutUpdate]) -> None:
    """Collective. After the engines: agree on the scales of all blocks that shards cut, and encode with them."""
    magnitudes = [update.magnitudes() for update in updates]
    agree([(update.axes, found) for update, found in zip(updates, magnitudes, strict=True)], largest=True)
    for update, agreed in zip(updates, magnitudes, strict=True):
        update.encode(agreed)
