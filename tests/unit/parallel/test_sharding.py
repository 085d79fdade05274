"""Parameters that fill up the last block of others."""

from __future__ import annotations

import torch
from torch import nn

from holdfast.parallel.sharding import pad_to_blocks


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
