"""Parameters that fill up the last block of others."""

from __future__ import annotations

import torch
from torch import nn

from holdfast.parallel.sharding import _clear_padding, pad_to_blocks
from holdfast.parallel.slices import Piece


def test_every_parameter_that_ends_inside_a_block_is_followed_by_zeros_up_to_its_end() -> None:
    model = nn.Module()
    sizes = {"a": 64, "b": 65, "c": 1, "d": 130}
    for name, size in sizes.items():
        model.register_parameter(name, nn.Parameter(torch.ones(size, dtype=torch.bfloat16)))
    first, second = model.a, model.b
    groups = [{"params": [first, second], "weight_decay": 0.1}, {"params": [model.c, model.d], "weight_decay": 0.0}]
    padded = pad_to_blocks(model, groups, 64)
    assert [[p.numel() for p in group["params"]] for group in padded] == [[64, 65, 63], [1, 63, 130, 62]]
    assert [group["weight_decay"] for group in padded] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [2, 2], "the caller's groups have changed"
    fillers = [p for name, p in model.named_parameters() if name not in sizes]
    assert [p.numel() for p in fillers] == [63, 63, 62]
    assert all(p.dtype == torch.bfloat16 and not p.any() for p in fillers)


def test_blocks_of_one_element_need_nothing() -> None:
    model = nn.Linear(3, 5)
    groups = [{"params": list(model.parameters())}]
    assert pad_to_blocks(model, groups, 1) == groups
    assert len(list(model.parameters())) == 2


def test_what_fills_up_a_share_is_zero_and_no_parameter_is_touched() -> None:
    master = torch.full((20,), torch.nan)
    pieces = (Piece("a", (5,), 0, 5, 0), Piece("b", (9,), 2, 6, 8))
    for piece in pieces:
        master[piece.at : piece.at + piece.stop - piece.start] = 1.0
    _clear_padding(master, pieces)
    assert master.tolist() == [1.0] * 5 + [0.0] * 3 + [1.0] * 4 + [0.0] * 8
    _clear_padding(master, ())
    assert not master.any()
