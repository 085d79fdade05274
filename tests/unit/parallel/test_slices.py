"""Which part of which parameter a piece of flat memory holds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from holdfast.errors import InvariantViolation
from holdfast.parallel.slices import Flat, Piece, cut, pieces_of_partition, state_slices
from holdfast.types import Quantization, SliceSpec

_SIZES = [("a", (3, 2)), ("b", (5,)), ("c", ())]


@dataclass(frozen=True)
class _State:
    key: str
    tensor: Tensor
    quantization: Quantization | None = None


@pytest.mark.parametrize(
    ("low", "high", "pieces"),
    [
        (0, 12, [("a", 0, 6, 0), ("b", 0, 5, 6), ("c", 0, 1, 11)]),
        (0, 4, [("a", 0, 4, 0)]),
        (4, 8, [("a", 4, 6, 0), ("b", 0, 2, 2)]),
        (6, 11, [("b", 0, 5, 0)]),
        (8, 20, [("b", 2, 5, 0), ("c", 0, 1, 3)]),
        (12, 20, []),
        (3, 3, []),
    ],
)
def test_a_partition_holds_these_pieces(low: int, high: int, pieces: list[tuple[str, int, int, int]]) -> None:
    shapes = dict(_SIZES)
    want = tuple(Piece(name, shapes[name], start, stop, at) for name, start, stop, at in pieces)
    assert pieces_of_partition(_SIZES, low, high) == want


def test_a_parameter_is_cut_into_equal_parts_of_which_the_last_may_be_short_or_missing() -> None:
    assert cut("a", (5, 2), 4, 0, 100) == Piece("a", (5, 2), 0, 4, 100)
    assert cut("a", (5, 2), 4, 2, 0) == Piece("a", (5, 2), 8, 10, 0)
    assert cut("a", (5, 2), 4, 3, 0) is None
    assert cut("a", (), 4, 0, 0) == Piece("a", (), 0, 1, 0)


def _flat(*pieces: Piece) -> Flat:
    return Flat(0, torch.arange(512.0), pieces)


def test_slices_are_named_and_are_views_of_the_live_tensors() -> None:
    flat, moment = _flat(Piece("w", (300,), 100, 260, 64)), torch.arange(512.0)
    master, first = state_slices(flat, [_State("exp_avg", moment)])
    assert master.spec == SliceSpec("w/master", (300,), 100, 260, "float32")
    assert first.spec == SliceSpec("w/exp_avg", (300,), 100, 260, "float32")
    assert master.tensor.tolist() == list(range(64, 224))
    master.tensor.fill_(-1.0)
    assert flat.master[64:224].eq(-1.0).all() and flat.master[63] == 63 and flat.master[224] == 224
    assert first.tensor.data_ptr() == moment.data_ptr() + 64 * 4


def test_codes_name_their_scales_and_scales_count_blocks_of_the_whole_parameter() -> None:
    blocks = Quantization(64, "dynamic-signed", "absmax")
    states = [_State("codes", torch.zeros(512, dtype=torch.uint8), blocks), _State("absmax", torch.arange(8.0))]
    flat = _flat(Piece("v", (64,), 0, 64, 0), Piece("w", (20, 15), 128, 300, 64))
    specs = [held.spec for held in state_slices(flat, states)]
    assert specs[:3] == [
        SliceSpec("v/master", (64,), 0, 64, "float32"),
        SliceSpec("v/codes", (64,), 0, 64, "uint8", Quantization(64, "dynamic-signed", "v/absmax")),
        SliceSpec("v/absmax", (1,), 0, 1, "float32"),
    ]
    assert specs[4:] == [
        SliceSpec("w/codes", (20, 15), 128, 300, "uint8", Quantization(64, "dynamic-signed", "w/absmax")),
        SliceSpec("w/absmax", (5,), 2, 5, "float32"),
    ]
    *_, scales = state_slices(flat, states)
    assert scales.tensor.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "piece",
    [
        Piece("w", (300,), 32, 64, 0),  # begins inside a block
        Piece("w", (300,), 0, 100, 0),  # ends inside a block, but not the parameter
        Piece("w", (300,), 0, 64, 32),  # lies across two blocks of the flat tensor
    ],
)
def test_a_block_that_would_be_shared_is_refused(piece: Piece) -> None:
    blocks = Quantization(64, "dynamic-signed", "absmax")
    states = [_State("codes", torch.zeros(512, dtype=torch.uint8), blocks), _State("absmax", torch.arange(8.0))]
    with pytest.raises(InvariantViolation, match="do not lie on blocks of 64"):
        list(state_slices(_flat(piece), states))
    assert len(list(state_slices(_flat(piece), [_State("exp_avg", torch.zeros(512))]))) == 2
