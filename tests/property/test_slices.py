"""For any shapes and ranks: each element has one holder, and each quantisation block one rank and one parameter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.errors import InvariantViolation
from holdfast.parallel.slices import Flat, Piece, cut, pieces_of_partition, state_slices
from holdfast.types import Quantization, StateSlice

shapes = st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple), min_size=1, max_size=6)
worlds = st.integers(1, 9)
blocks = st.sampled_from([2, 8, 64])

Shapes = list[tuple[int, ...]]
Sizes = list[tuple[str, tuple[int, ...]]]
Layout = Callable[[Sizes, int, int], Iterator[Flat]]


@dataclass(frozen=True)
class _State:
    key: str
    tensor: Tensor
    quantization: Quantization | None = None


def _named(drawn: Shapes) -> Sizes:
    return [(f"p{number}", shape) for number, shape in enumerate(drawn)]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _flat_group(sizes: Sizes, world: int, block: int) -> Iterator[Flat]:
    """Stages 1 and 2: every parameter filled up to whole blocks, the whole cut into equal shares of whole blocks."""
    filled: Sizes = []
    for name, shape in sizes:
        filled += [(name, shape), ("", (-math.prod(shape) % block,))]
    share = _up(sum(math.prod(shape) for _, shape in filled), block * world) // world
    for rank in range(world):
        pieces = pieces_of_partition(filled, rank * share, (rank + 1) * share)
        yield Flat(0, torch.arange(float(share)) + rank * share, tuple(piece for piece in pieces if piece.name))


def _partitioned(sizes: Sizes, world: int, block: int) -> Iterator[Flat]:
    """Stage 3: every parameter cut into equal shares of whole blocks."""
    for rank in range(world):
        pieces, at = list[Piece](), 0
        for name, shape in sizes:
            part = _up(math.prod(shape), block * world) // world
            piece = cut(name, shape, part, rank, at)
            pieces += [] if piece is None else [piece]
            at += part
        yield Flat(0, torch.arange(float(at)), tuple(pieces))


layouts = st.sampled_from([_flat_group, _partitioned])


def _slices(flat: Flat, block: int) -> list[StateSlice]:
    size = flat.master.numel()
    return list(
        state_slices(
            flat,
            [
                _State("codes", torch.arange(size).to(torch.uint8), Quantization(block, "dynamic-signed", "absmax")),
                _State("absmax", torch.arange(float(-(-size // block)))),
            ],
        )
    )


@given(shapes, worlds, blocks, layouts)
def test_every_element_has_one_holder(drawn: Shapes, world: int, block: int, layout: Layout) -> None:
    sizes = _named(drawn)
    held: dict[str, Counter[int]] = {}
    for flat in layout(sizes, world, block):
        for piece in _slices(flat, block):
            spec = piece.spec
            assert 0 <= spec.start < spec.stop <= math.prod(spec.shape)
            assert piece.tensor.numel() == spec.stop - spec.start and piece.tensor.is_contiguous()
            held.setdefault(spec.name, Counter()).update(range(spec.start, spec.stop))
    for name, shape in sizes:
        total = math.prod(shape)
        assert held[f"{name}/master"] == held[f"{name}/codes"] == Counter(range(total))
        assert held[f"{name}/absmax"] == Counter(range(-(-total // block)))
    assert len(held) == 3 * len(sizes)


@given(shapes, worlds, blocks, layouts)
def test_no_block_of_memory_belongs_to_two_parameters_and_none_of_a_parameter_to_two_ranks(
    drawn: Shapes, world: int, block: int, layout: Layout
) -> None:
    owners: Counter[tuple[str, int]] = Counter()
    for flat in layout(_named(drawn), world, block):
        in_memory: Counter[int] = Counter()
        for piece in flat.pieces:
            in_memory.update(range(piece.at // block, -(-(piece.at + piece.stop - piece.start) // block)))
            owners.update((piece.name, number) for number in range(piece.start // block, -(-piece.stop // block)))
        assert set(in_memory.values()) <= {1}
    assert set(owners.values()) == {1}


@given(shapes, worlds, blocks, layouts)
def test_scales_lie_where_their_codes_lie(drawn: Shapes, world: int, block: int, layout: Layout) -> None:
    for flat in layout(_named(drawn), world, block):
        by_name = {piece.spec.name: piece for piece in _slices(flat, block)}
        for piece in flat.pieces:
            scales = by_name[f"{piece.name}/absmax"]
            assert scales.spec.start == piece.start // block
            assert scales.tensor[0] == piece.at // block


@given(shapes, st.integers(2, 9), blocks)
def test_shares_that_ignore_the_blocks_are_refused(drawn: Shapes, world: int, block: int) -> None:
    """DeepSpeed's own rule, a multiple of two elements per rank, breaks the grid wherever it does not meet it."""
    sizes = _named(drawn)
    share = _up(sum(math.prod(shape) for _, shape in sizes), 2 * world) // world
    for rank in range(world):
        flat = Flat(0, torch.zeros(share), pieces_of_partition(sizes, rank * share, (rank + 1) * share))
        whole = all(
            p.start % block == 0 and p.at % block == 0 and (p.stop % block == 0 or p.stop == math.prod(p.shape))
            for p in flat.pieces
        )
        if whole:
            _slices(flat, block)
        else:
            with pytest.raises(InvariantViolation):
                _slices(flat, block)


@given(shapes, st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_a_partition_is_the_sum_of_its_parts(drawn: Shapes, low: int, middle: int, high: int) -> None:
    assume(low <= middle <= high)
    sizes = _named(drawn)

    def elements(start: int, stop: int) -> list[tuple[str, int]]:
        return [(p.name, number) for p in pieces_of_partition(sizes, start, stop) for number in range(p.start, p.stop)]

    assert elements(low, middle) + elements(middle, high) == elements(low, high)
    everything = [(name, number) for name, shape in sizes for number in range(math.prod(shape))]
    assert elements(low, high) == everything[low:high]
