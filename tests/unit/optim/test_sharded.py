"""Where a shard lies in the whole parameter, without any rank."""

from __future__ import annotations

import pytest
import torch

from holdfast.errors import ConfigurationError
from holdfast.optim import AdamW8bit
from holdfast.optim.quantize import decode_elements, dequantize_blockwise, encode_elements, quantize_blockwise
from holdfast.optim.sharded import Piece, block_grid, is_sharded


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((12, 512), (12, 2)),
        ((12, 100), (5,)),
        ((64, 100), (25,)),
        ((6, 64, 2, 2), (6, 1)),
        ((3, 5, 256), (3, 5, 1)),
        ((4096,), (16,)),
        ((700,), (3,)),
        ((), (1,)),
        ((0, 256), (0, 1)),
        ((5, 0), (0,)),
    ],
)
def test_a_grid_has_one_entry_per_block_and_follows_the_leading_dims(
    shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    assert block_grid(shape, 256) == grid


@pytest.mark.parametrize(
    ("shape", "start", "size"),
    [
        ((5, 6), (2, 0), (2, 6)),
        ((5, 6), (0, 2), (5, 3)),
        ((4, 5, 6), (1, 2, 0), (2, 2, 6)),
        ((4, 5, 6), (1, 2, 3), (1, 1, 3)),
        ((4, 5, 6), (0, 0, 0), (4, 5, 6)),
        ((7,), (3,), (2,)),
        ((5, 6), (5, 0), (0, 6)),
        ((5, 6), (0, 6), (5, 0)),
    ],
)
def test_runs_and_index_say_where_elements_lie(
    shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]
) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    want = whole[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))].flatten()
    piece = Piece(shape, start, size, (), False, True)
    assert torch.equal(piece.index(), want) and piece.elements == want.numel()
    runs = [torch.arange(first, first + stop - begin) for begin, stop, first in piece.runs()]
    assert torch.equal(torch.cat([want[:0], *runs]), want)
    assert [begin for begin, _, _ in piece.runs()] == [sum(map(len, runs[:number])) for number in range(len(runs))]
    assert piece.is_contiguous == (len(runs) <= 1)


def test_a_part_that_is_no_box_has_no_known_place() -> None:
    piece = Piece((6, 5), (0, 0), (3, 5), (), True, False)
    with pytest.raises(ConfigurationError, match="use bits=32 without stochastic rounding"):
        piece.index()


@pytest.mark.parametrize("signed", [True, False])
def test_elements_are_encoded_as_their_blocks_are(signed: bool) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x = (x if signed else x.square()) * 1e-3
    x[130:260] = 0.0
    codes, absmax = quantize_blockwise(x, signed, 64, nonzero=not signed)
    per_element = absmax.repeat_interleave(64)[:1000]
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    again = encode_elements(x[order], per_element[order], signed, nonzero=not signed)
    assert torch.equal(again, codes[order])
    assert torch.equal(
        decode_elements(again, per_element[order], signed), dequantize_blockwise(codes, absmax, signed, 64)[order]
    )


def test_plain_tensors_are_not_sharded_and_keep_flat_absmax_of_earlier_versions() -> None:
    param = torch.nn.Parameter(torch.ones(16, 512))
    optimizer = AdamW8bit([param])
    param.grad = torch.ones(16, 512)
    optimizer.step()
    assert not is_sharded(param) and optimizer.state[param]["exp_avg_absmax"].shape == (16, 2)
    saved = optimizer.state_dict()
    flat = {k: v.flatten() if k.endswith("absmax") else v for k, v in saved["state"][0].items()}
    optimizer.load_state_dict({**saved, "state": {0: flat}})
    assert optimizer.state[param]["exp_avg_absmax"].shape == (16, 2)
    optimizer.step()
