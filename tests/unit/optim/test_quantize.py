"""The codebooks, and quantisation at its edges."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from holdfast.errors import ConfigurationError
from holdfast.optim.quantize import codebook, dequantize_blockwise, quantize_blockwise
from tests.support.optim_reference import nearest_code

_BOTH = pytest.mark.parametrize("signed", [True, False])


@pytest.mark.parametrize(("signed", "digest"), [(True, "e732639a65f497b4"), (False, "305f002cc11278fb")])
def test_codebooks_are_byte_identical_to_the_published_ones(signed: bool, digest: str) -> None:
    table = codebook(signed).numpy()
    assert table.dtype == np.dtype("<f4") and table.shape == (256,)
    assert hashlib.sha256(table.tobytes()).hexdigest().startswith(digest)


@pytest.mark.parametrize(
    ("signed", "index", "value"),
    [
        (True, 0, -0.99296874),
        (True, 126, -5.5e-7),
        (True, 127, 0.0),
        (True, 128, 5.5e-7),
        (True, 191, 0.10703126),
        (True, 255, 1.0),
        (False, 0, 0.0),
        (False, 1, 3.25e-7),
        (False, 7, 1.5625e-5),
        (False, 191, 0.55351567),
        (False, 255, 1.0),
    ],
)
def test_codebook_entries_are_the_published_ones(signed: bool, index: int, value: float) -> None:
    assert codebook(signed)[index].item() == pytest.approx(value, rel=1e-7, abs=0)


def test_a_changed_copy_of_a_codebook_does_not_change_the_quantiser() -> None:
    codebook(True).zero_()
    assert codebook(True)[255] == 1.0


def _around_every_boundary(signed: bool) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Every midpoint, exactly and one and two units in the last place to either side."""
    table = codebook(signed).numpy()
    middle = (table[1:] + table[:-1]) / np.float32(2)
    steps = [middle]
    for direction in (np.float32(np.inf), np.float32(-np.inf)):
        steps += [one := np.nextafter(middle, direction), np.nextafter(one, direction)]
    return np.concatenate(steps)


@_BOTH
def test_codes_at_every_boundary_are_nearest_and_ties_go_to_the_lower_magnitude(signed: bool) -> None:
    values = _around_every_boundary(signed)
    table = codebook(signed).tolist()
    codes, absmax = quantize_blockwise(torch.from_numpy(np.append(values, np.float32(1))), signed, 4096)
    assert absmax.tolist() == [1.0]
    assert codes.tolist() == [*(nearest_code(float(v), table) for v in values), 255]


@_BOTH
def test_codes_agree_with_a_binary_search_over_a_million_numbers(signed: bool) -> None:
    bits = np.arange(0, 0x3F800000, 997, dtype=np.uint32)
    values = bits.view(np.float32)
    table = codebook(signed).numpy()
    expected = np.searchsorted((table[1:] + table[:-1]) / np.float32(2), values, side="left")
    blocks = np.append(values, np.ones(1, np.float32))
    codes, _ = quantize_blockwise(torch.from_numpy(blocks), signed, len(blocks))
    assert np.array_equal(codes.numpy()[:-1], expected)


@pytest.mark.parametrize(
    ("signed", "largest_code", "smallest_code"), [(True, 255, 0), (False, 255, 0)], ids=["signed", "unsigned"]
)
def test_the_largest_elements_get_the_outermost_codes(signed: bool, largest_code: int, smallest_code: int) -> None:
    codes, absmax = quantize_blockwise(torch.tensor([3.0, -3.0 if signed else 0.0]), signed, 64)
    assert codes.tolist() == [largest_code, smallest_code] and absmax.tolist() == [3.0]


@_BOTH
def test_a_block_of_zeros_has_absmax_zero_and_comes_back_as_zeros(signed: bool) -> None:
    x = torch.tensor([0.0] * 64 + [1.0] + [-0.0] * 63)
    codes, absmax = quantize_blockwise(x, signed, 64)
    assert absmax.tolist() == [0.0, 1.0]
    assert torch.equal(dequantize_blockwise(codes, absmax, signed, 64), x)


def test_the_tail_is_a_block_like_any_other() -> None:
    x = torch.cat([torch.full((64,), 8.0), torch.tensor([0.5, -0.25])])
    codes, absmax = quantize_blockwise(x, True, 64)
    assert absmax.tolist() == [8.0, 0.5]
    assert codes[-2] == 255 and dequantize_blockwise(codes, absmax, True, 64)[-1] == pytest.approx(-0.25, abs=0.004)


@pytest.mark.parametrize("shape", [(0,), (), (3, 5, 7), (2, 0, 4)])
def test_codes_have_the_shape_of_the_tensor(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    codes, absmax = quantize_blockwise(x, False, 64)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    assert absmax.shape == (-(-x.numel() // 64),) and absmax.dtype == torch.float32
    assert dequantize_blockwise(codes, absmax, False, 64).shape == x.shape


def test_blocks_follow_the_row_major_order_whatever_the_strides() -> None:
    x = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    transposed = x.t()
    want = quantize_blockwise(transposed.contiguous(), True, 64)
    have = quantize_blockwise(transposed, True, 64)
    assert torch.equal(have[0], want[0]) and torch.equal(have[1], want[1])


@pytest.mark.parametrize("tiny", [1e-45, 1e-30, 1.6e-7])
def test_nonzero_lifts_every_positive_value_even_one_that_underflows(tiny: float) -> None:
    x = torch.tensor([10.0, tiny, 0.0])
    assert quantize_blockwise(x, False, 64)[0].tolist() == [255, 0, 0]
    assert quantize_blockwise(x, False, 64, nonzero=True)[0].tolist() == [255, 1, 0]


def test_blocks_of_subnormal_numbers_are_quantised() -> None:
    x = torch.tensor([1e-40, -5e-41, 0.0])
    codes, absmax = quantize_blockwise(x, True, 64)
    assert torch.allclose(dequantize_blockwise(codes, absmax, True, 64), x, rtol=0.02, atol=0)


def test_a_value_that_is_not_finite_spoils_its_block_only() -> None:
    x = torch.ones(128)
    x[3] = torch.nan
    codes, absmax = quantize_blockwise(x, True, 64)
    assert dequantize_blockwise(codes, absmax, True, 64)[64:].tolist() == [1.0] * 64


def test_misuse_is_refused_with_the_rule() -> None:
    with pytest.raises(ConfigurationError, match="block_size=0 must be at least 1"):
        quantize_blockwise(torch.ones(3), True, 0)
    with pytest.raises(ConfigurationError, match="nonzero=True needs signed=False"):
        quantize_blockwise(torch.ones(3), True, 64, nonzero=True)
    with pytest.raises(ConfigurationError, match="absmax has 1 entries; 65 codes in blocks of 64 need 2"):
        dequantize_blockwise(torch.zeros(65, dtype=torch.uint8), torch.ones(1), True, 64)
