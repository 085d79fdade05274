"""Laws of block-wise quantisation that hold for every tensor."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from holdfast.optim.quantize import codebook, dequantize_blockwise, quantize_blockwise, zero_code
from tests.support.optim_reference import nearest_codes

_BLOCK = 64
_law = settings(deadline=None)  # a busy machine is no counter-example
_ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
_NORMAL = st.one_of(st.just(0.0), st.floats(2.0**-40, 2.0**40, width=32), st.floats(-(2.0**40), -(2.0**-40), width=32))
_RATIOS = st.floats(-1, 1, width=32)


def _arrays(elements: st.SearchStrategy[float], longest: int = 200) -> st.SearchStrategy[torch.Tensor]:
    return hnp.arrays(np.float32, st.integers(0, longest), elements=elements).map(torch.from_numpy)


def _proper(x: torch.Tensor, signed: bool) -> torch.Tensor:
    return x if signed else x.abs()


def _through(x: torch.Tensor, signed: bool) -> torch.Tensor:
    return dequantize_blockwise(*quantize_blockwise(x, signed, _BLOCK), signed, _BLOCK)


@_law
@given(x=st.one_of(_arrays(_RATIOS), _arrays(_ANY)), signed=st.booleans())
def test_every_code_is_the_nearest_entry(x: torch.Tensor, signed: bool) -> None:
    x = _proper(x, signed)
    codes, absmax = quantize_blockwise(x, signed, _BLOCK)
    assert codes.tolist() == nearest_codes(x.numpy(), codebook(signed).tolist(), _BLOCK)
    assert absmax.tolist() == [block.abs().max().item() for block in x.split(_BLOCK) if len(block)]


@_law
@given(x=_arrays(_ANY), signed=st.booleans())
def test_the_error_is_at_most_half_the_gap_of_the_codebook_around_the_element(x: torch.Tensor, signed: bool) -> None:
    x = _proper(x, signed)
    _, absmax = quantize_blockwise(x, signed, _BLOCK)
    scale = absmax.double().numpy().repeat(_BLOCK)[: len(x)]
    table = codebook(signed).double().numpy()
    ratio = np.divide(x.double().numpy(), scale, out=np.zeros(len(x)), where=scale > 0)
    gap = np.searchsorted(table, ratio, side="right").clip(1, 255)  # -1.0 lies outside: its cell is as wide as the next
    half = (table[gap] - table[gap - 1]) / 2
    rounding = 2.0**-23 * np.abs(x.double().numpy()) + 2.0**-149
    assert (
        np.abs(_through(x, signed).double().numpy() - x.double().numpy()) <= half * scale * (1 + 1e-6) + rounding
    ).all()


@_law
@given(
    codes=hnp.arrays(np.uint8, st.integers(1, 200)).map(torch.from_numpy),
    exponents=st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    signed=st.booleans(),
)
def test_quantising_what_was_dequantised_changes_nothing(
    codes: torch.Tensor, exponents: list[float], signed: bool
) -> None:
    codes[::_BLOCK] = 255  # the element that defines absmax; the signed codebook has no -1.0 to do so
    absmax = torch.tensor([10**e for e in exponents])[: -(-len(codes) // _BLOCK)]
    again, absmax_again = quantize_blockwise(dequantize_blockwise(codes, absmax, signed, _BLOCK), signed, _BLOCK)
    assert torch.equal(again, codes) and torch.equal(absmax_again, absmax)


@_law
@given(x=_arrays(_NORMAL), exponent=st.integers(-60, 60), signed=st.booleans())
def test_scaling_by_a_power_of_two_scales_absmax_and_keeps_codes(x: torch.Tensor, exponent: int, signed: bool) -> None:
    x = _proper(x, signed)
    codes, absmax = quantize_blockwise(x, signed, _BLOCK)
    scaled_codes, scaled_absmax = quantize_blockwise(x * 2.0**exponent, signed, _BLOCK)
    assert torch.equal(scaled_codes, codes) and torch.equal(scaled_absmax, absmax * 2.0**exponent)


@_law
@given(x=_arrays(_ANY), padding=st.integers(0, 200), signed=st.booleans())
def test_zeros_appended_change_no_code_and_stay_zero(x: torch.Tensor, padding: int, signed: bool) -> None:
    x = _proper(x, signed)
    codes, absmax = quantize_blockwise(x, signed, _BLOCK)
    long_codes, long_absmax = quantize_blockwise(torch.cat([x, torch.zeros(padding)]), signed, _BLOCK)
    assert torch.equal(long_codes[: len(x)], codes) and torch.equal(long_absmax[: len(absmax)], absmax)
    assert (long_codes[len(x) :] == zero_code(signed)).all() and (long_absmax[len(absmax) :] == 0).all()


@_law
@given(x=_arrays(_ANY, 400), cut=st.integers(0, 6), signed=st.booleans())
def test_blocks_do_not_know_each_other(x: torch.Tensor, cut: int, signed: bool) -> None:
    x = _proper(x, signed)
    whole = quantize_blockwise(x, signed, _BLOCK)
    parts = [quantize_blockwise(part, signed, _BLOCK) for part in (x[: cut * _BLOCK], x[cut * _BLOCK :])]
    assert torch.equal(whole[0], torch.cat([codes for codes, _ in parts]))
    assert torch.equal(whole[1], torch.cat([absmax for _, absmax in parts]))


@_law
@given(x=_arrays(st.one_of(_ANY, st.sampled_from([0.0, -0.0]))))
def test_the_sign_is_kept_and_zero_stays_zero(x: torch.Tensor) -> None:
    back = _through(x, signed=True)
    assert (back * x.sign() >= 0).all()
    assert (back[x == 0] == 0).all()


@_law
@given(x=_arrays(_ANY))
def test_opposite_values_get_opposite_codes(x: torch.Tensor) -> None:
    codes, _ = quantize_blockwise(x, True, _BLOCK)
    opposite, _ = quantize_blockwise(-x, True, _BLOCK)
    inner = (codes > 0) & (codes < 254)  # at the ends the codebook has 1.0 and 0.993 but only -0.993
    assert torch.equal(opposite[inner], 254 - codes[inner])


@_law
@given(x=_arrays(_ANY).map(torch.abs))
def test_nonzero_codes_mean_positive_values_and_no_other_code_changes(x: torch.Tensor) -> None:
    plain, absmax = quantize_blockwise(x, False, _BLOCK)
    lifted, absmax_lifted = quantize_blockwise(x, False, _BLOCK, nonzero=True)
    assert torch.equal(lifted > 0, x > 0)
    assert torch.equal(lifted[plain > 0], plain[plain > 0]) and (lifted <= plain.clamp_min(1)).all()
    assert torch.equal(absmax, absmax_lifted)
