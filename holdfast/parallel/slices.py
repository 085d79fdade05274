"""Sharded state as named slices of global tensors: which part of which parameter a piece of flat memory holds.

Pure index arithmetic on tensors that somebody else made. Elements are counted in the row-major flat index of the
whole parameter, so that a slice means the same at any world size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from holdfast.errors import InvariantViolation
from holdfast.types import Quantization, SliceSpec, StateSlice

__all__ = ["Flat", "Piece", "StateTensor", "cut", "pieces_of_partition", "state_slices"]


class StateTensor(Protocol):
    """One tensor that an optimizer keeps for a flat parameter, by reference."""

    @property
    def key(self) -> str: ...

    @property
    def tensor(self) -> Tensor: ...

    @property
    def quantization(self) -> Quantization | None:
        """How its bytes become numbers; ``absmax`` is the key of a sibling."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start .. stop`` of a parameter, held from offset ``at`` of a flat tensor on."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Flat:
    """This rank's fp32 master weights of some parameters, one behind the other."""

    group: int
    """Index of the optimizer's parameter group."""
    master: Tensor
    pieces: tuple[Piece, ...]


def pieces_of_partition(sizes: Sequence[tuple[str, tuple[int, ...]]], low: int, high: int) -> tuple[Piece, ...]:
    """What ``[low, high)`` holds of parameters of these names and shapes that lie one behind the other."""
    pieces, first = list[Piece](), 0
    for name, shape in sizes:
        last = first + _numel(shape)
        start, stop = max(first, low), min(last, high)
        if start < stop:
            pieces.append(Piece(name, shape, start - first, stop - first, start - low))
        first = last
    return tuple(pieces)


def cut(name: str, shape: tuple[int, ...], part: int, rank: int, at: int) -> Piece | None:
    """Rank ``rank``'s part, ``part`` elements long, of one parameter; None where nothing is left for it."""
    start, stop = rank * part, min((rank + 1) * part, _numel(shape))
    return Piece(name, shape, start, stop, at) if start < stop else None


def state_slices(flat: Flat, states: Sequence[StateTensor]) -> Iterator[StateSlice]:
    """Master weights and optimizer state of every piece, named ``<parameter>/master``, ``<parameter>/<key>``.

    Raises: InvariantViolation when a quantisation block would belong to two parameters or two ranks, because the
    state would then depend on the number of ranks.
    """
    blocks = {s.quantization.absmax: s.quantization.block_size for s in states if s.quantization is not None}
    for piece in flat.pieces:
        yield _elements(piece, "master", flat.master, None)
        for state in states:
            if state.key in blocks:
                yield _scales(piece, state, blocks[state.key])
            else:
                yield _elements(piece, state.key, state.tensor, state.quantization)


def _elements(piece: Piece, key: str, tensor: Tensor, blocks: Quantization | None) -> StateSlice:
    """One entry per element of the parameter."""
    held = tensor.detach().view(-1)[piece.at : piece.at + piece.stop - piece.start]
    named = None if blocks is None else replace(blocks, absmax=f"{piece.name}/{blocks.absmax}")
    spec = SliceSpec(f"{piece.name}/{key}", piece.shape, piece.start, piece.stop, _dtype(tensor), named)
    return StateSlice(spec, held)


def _scales(piece: Piece, state: StateTensor, size: int) -> StateSlice:
    """One entry per block of the parameter."""
    total = _numel(piece.shape)
    if piece.start % size or piece.at % size or (piece.stop % size and piece.stop != total):
        raise InvariantViolation(
            f"elements {piece.start}..{piece.stop} of {piece.name} at offset {piece.at} do not lie on blocks of {size}"
        )
    start, stop, at = piece.start // size, -(-piece.stop // size), piece.at // size
    held = state.tensor.detach().view(-1)[at : at + stop - start]
    spec = SliceSpec(f"{piece.name}/{state.key}", (-(-total // size),), start, stop, _dtype(state.tensor))
    return StateSlice(spec, held)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
