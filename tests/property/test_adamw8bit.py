"""Laws of the 8-bit update."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.optim import AdamW8bit, describe_state, native, torch_engine

_BLOCK = 64
_law = settings(deadline=None, max_examples=50)  # a busy machine is no counter-example
_SEEDS = st.integers(0, 2**32)


def _gradients(seed: int, steps: int, n: int) -> torch.Tensor:
    """Gradients over many orders of magnitude, with some exact zeros."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.exp(2.0 * torch.randn(steps, n, generator=draw))
    grads = torch.randn(steps, n, generator=draw) * size
    return grads * (torch.rand(steps, n, generator=draw) > 0.1)


def _trained(start: torch.Tensor, grads: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """The parameter and its state after one step per row of ``grads``."""
    param = torch.nn.Parameter(start.clone())
    optimizer = AdamW8bit([param], block_size=_BLOCK, min_8bit_size=0, **{"lr": 1e-2, **options})
    for grad in grads:
        param.grad = grad.clone().view(start.shape)
        optimizer.step()
    return [param.detach(), *(entry.tensor for entry in describe_state(optimizer, param))]


def _same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@_law
@given(seed=_SEEDS, n=st.integers(1, 700), cut=st.integers(0, 11))
def test_a_tensor_cut_on_a_block_boundary_trains_to_the_same_bits(seed: int, n: int, cut: int) -> None:
    start, grads, at = torch.linspace(-1, 1, n), _gradients(seed, 3, n), min(cut * _BLOCK, n)
    whole = _trained(start, grads)
    left, right = _trained(start[:at], grads[:, :at]), _trained(start[at:], grads[:, at:])
    assert _same(whole, [torch.cat(parts) for parts in zip(left, right, strict=True)])


@_law
@given(seed=_SEEDS, n=st.integers(1, 500), chunk=st.integers(1, 4))
def test_the_chunks_of_an_update_change_no_bit(seed: int, n: int, chunk: int) -> None:
    start, grads, usual = torch.linspace(-1, 1, n), _gradients(seed, 3, n), torch_engine._CPU_CHUNK
    whole = _trained(start, grads)
    try:
        torch_engine._CPU_CHUNK = chunk * _BLOCK
        with native.using(None):
            assert _same(_trained(start, grads), whole)
    finally:
        torch_engine._CPU_CHUNK = usual


@_law
@given(seed=_SEEDS, n=st.integers(1, 300), exponent=st.integers(-20, 20))
def test_gradients_scaled_by_a_power_of_two_take_the_same_steps(seed: int, n: int, exponent: int) -> None:
    start, grads = torch.linspace(-1, 1, n), _gradients(seed, 3, n)
    plain = _trained(start, grads, eps=1e-30)
    scaled = _trained(start, grads * 2.0**exponent, eps=1e-30)
    param, first, first_absmax, second, second_absmax = plain
    assert _same(scaled, [param, first, first_absmax * 2.0**exponent, second, second_absmax * 4.0**exponent])


@_law
@given(seed=_SEEDS, n=st.integers(1, 300), padding=st.integers(1, 200))
def test_zero_padding_stays_zero_and_changes_nothing_before_it(seed: int, n: int, padding: int) -> None:
    start, grads = torch.linspace(-1, 1, n), _gradients(seed, 3, n)
    padded = _trained(
        torch.cat([start, torch.zeros(padding)]), torch.nn.functional.pad(grads, (0, padding)), weight_decay=0.1
    )
    plain = _trained(start, grads, weight_decay=0.1)
    assert _same([t[: len(short)] for t, short in zip(padded, plain, strict=True)], plain)
    assert (padded[0][n:] == 0).all()


@_law
@given(seed=_SEEDS, bad=st.sets(st.integers(0, 299), max_size=300), value=st.sampled_from([torch.nan, torch.inf, 1e25]))
def test_unusable_gradients_leave_everything_finite_and_their_parameters_alone(
    seed: int, bad: set[int], value: float
) -> None:
    start, grads = torch.linspace(-1, 1, 300), _gradients(seed, 3, 300)
    grads[:, sorted(bad)] = value
    trained = _trained(start, grads)
    assert all(torch.isfinite(t).all() for t in trained)
    assert torch.equal(trained[0][sorted(bad)], start[sorted(bad)])


@_law
@given(seed=_SEEDS, rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_strides_change_no_bit(seed: int, rows: int, columns: int) -> None:
    start, grads = torch.linspace(-1, 1, rows * columns).view(rows, columns), _gradients(seed, 3, rows * columns)
    strided = start.t().contiguous().t()
    assert _same(_trained(strided, grads), _trained(start, grads))
