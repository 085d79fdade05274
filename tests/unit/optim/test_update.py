"""The update rule: against the paper in double precision, against torch, and on elements it must leave alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.optim.quantize import dequantize_blockwise, quantize_blockwise, zero_code
from holdfast.optim.update import BlockwiseMoments, adamw8bit_update, adamw_update, coefficients
from tests.support.optim_reference import adamw64

_GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
_BLOCK = 64


def _randn(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def _zero_moments(n: int, nonzero: bool = True) -> BlockwiseMoments:
    blocks = -(-n // _BLOCK)
    first, second = (torch.full((n,), zero_code(signed), dtype=torch.uint8) for signed in (True, False))
    return BlockwiseMoments(first, torch.zeros(blocks), second, torch.zeros(blocks), _BLOCK, nonzero)


def _tensors(moments: BlockwiseMoments) -> list[Tensor]:
    return [moments.exp_avg_codes, moments.exp_avg_absmax, moments.exp_avg_sq_codes, moments.exp_avg_sq_absmax]


def _after(steps: int, n: int, group: dict[str, Any] = _GROUP) -> tuple[Tensor, BlockwiseMoments]:
    param, moments = _randn(n, 99), _zero_moments(n)
    for t in range(1, steps + 1):
        adamw8bit_update(param, _randn(n, t), moments, coefficients(group, t))
    return param, moments


def test_32_bit_moments_follow_the_paper_in_double_precision_as_closely_as_torch_does() -> None:
    n, steps = 1000, 100
    param, exp_avg, exp_avg_sq = _randn(n, 99), torch.zeros(n), torch.zeros(n)
    reference = torch.nn.Parameter(param.clone())
    optimizer, start = torch.optim.AdamW([reference], **_GROUP), param.double().numpy()
    for t in range(1, steps + 1):
        reference.grad = _randn(n, t)
        optimizer.step()
        adamw_update(param, _randn(n, t), exp_avg, exp_avg_sq, coefficients(_GROUP, t))
    truth = torch.from_numpy(adamw64(start, lambda t: _randn(n, t).double().numpy(), steps, **_GROUP))
    error, error_of_torch = ((p.detach() - truth).abs().max() for p in (param, reference))
    assert error < 1e-5 and error < 1.2 * error_of_torch


def test_eps_is_added_to_the_root_of_the_corrected_second_moment() -> None:
    param, grad = torch.zeros(1), torch.full((1,), 1e-3)
    group = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 1e-3, "weight_decay": 0.0}
    adamw_update(param, grad, torch.zeros(1), torch.zeros(1), coefficients(group, 1))
    assert param.item() == pytest.approx(-0.5)  # m_hat / (sqrt(v_hat) + eps) = 1e-3 / 2e-3


def test_weight_decays_before_the_update_and_without_a_gradient() -> None:
    param = torch.full((1,), 2.0)
    group = {"lr": 0.5, "betas": (0.5, 0.5), "eps": 1e-8, "weight_decay": 0.5}
    adamw_update(param, torch.zeros(1), torch.zeros(1), torch.zeros(1), coefficients(group, 1))
    assert param.item() == 1.5
    adamw_update(param, torch.ones(1), torch.zeros(1), torch.zeros(1), coefficients(group, 1))
    assert param.item() == pytest.approx(1.5 * 0.75 - 0.5)  # decayed after the update it would be 0.75


def test_the_first_8_bit_step_is_the_exact_one_because_the_step_uses_unquantised_moments() -> None:
    param, exact, grad = _randn(1000, 1), _randn(1000, 1), _randn(1000, 2)
    moments, exp_avg, exp_avg_sq = _zero_moments(1000), torch.zeros(1000), torch.zeros(1000)
    adamw8bit_update(param, grad, moments, coefficients(_GROUP, 1))
    adamw_update(exact, grad, exp_avg, exp_avg_sq, coefficients(_GROUP, 1))
    assert torch.equal(param, exact)
    stored = [*quantize_blockwise(exp_avg, True, _BLOCK), *quantize_blockwise(exp_avg_sq, False, _BLOCK, nonzero=True)]
    assert all(torch.equal(have, want) for have, want in zip(_tensors(moments), stored, strict=True))


def test_later_8_bit_steps_start_from_the_stored_moments() -> None:
    param, moments = _after(3, 500)
    exact = param.clone()
    exp_avg = dequantize_blockwise(moments.exp_avg_codes, moments.exp_avg_absmax, True, _BLOCK)
    exp_avg_sq = dequantize_blockwise(moments.exp_avg_sq_codes, moments.exp_avg_sq_absmax, False, _BLOCK)
    adamw_update(exact, _randn(500, 4), exp_avg, exp_avg_sq, coefficients(_GROUP, 4))
    adamw8bit_update(param, _randn(500, 4), moments, coefficients(_GROUP, 4))
    assert torch.equal(param, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_an_unusable_gradient_element_is_skipped_and_disturbs_no_other(bad: float) -> None:
    grad = _randn(300, 5)
    param, exp_avg, exp_avg_sq = _randn(300, 99), _randn(300, 6), _randn(300, 7).abs()
    before, clean = [t.clone() for t in (param, exp_avg, exp_avg_sq)], [t.clone() for t in (param, exp_avg, exp_avg_sq)]
    adamw_update(clean[0], grad, clean[1], clean[2], coefficients(_GROUP, 3))
    poisoned = grad.clone()
    poisoned[[0, 70, 299]] = bad
    used = adamw_update(param, poisoned, exp_avg, exp_avg_sq, coefficients(_GROUP, 3))
    assert used is not None and (~used).nonzero().flatten().tolist() == [0, 70, 299]
    for now, old, want in zip((param, exp_avg, exp_avg_sq), before, clean, strict=True):
        assert torch.equal(now, torch.where(used, want, old))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_an_unusable_gradient_element_never_poisons_its_8_bit_block(bad: float) -> None:
    (param, moments), (clean_param, clean_moments) = _after(3, 300), _after(3, 300)
    grad = _randn(300, 5)
    adamw8bit_update(clean_param, grad, clean_moments, coefficients(_GROUP, 4))
    before = param[70].item(), dequantize_blockwise(*_tensors(moments)[:2], True, _BLOCK)[70].item()
    adamw8bit_update(param, grad.index_fill(0, torch.tensor([70]), bad), moments, coefficients(_GROUP, 4))
    others = torch.arange(300) != 70
    assert param[70].item() == before[0] and torch.equal(param[others], clean_param[others])
    largest = moments.exp_avg_absmax[1].item()
    moment = dequantize_blockwise(*_tensors(moments)[:2], True, _BLOCK)[70].item()
    assert moment == pytest.approx(before[1], abs=largest * 0.5 * 0.0141)  # half of the widest gap of the codebook


def test_a_block_without_any_usable_gradient_keeps_every_bit() -> None:
    param, moments = _after(3, 300)
    before = [t.clone() for t in (param, *_tensors(moments))]
    grad = _randn(300, 5)
    grad[64:128] = torch.nan
    adamw8bit_update(param, grad, moments, coefficients(_GROUP, 4))
    for now, old, block in zip(
        (param, *_tensors(moments)), before, [slice(64, 128), slice(64, 128), 1, slice(64, 128), 1], strict=True
    ):
        assert torch.equal(now[block], old[block]) and not torch.equal(now, old)


def test_a_parameter_without_gradient_and_state_does_not_move_in_a_thousand_steps() -> None:
    param, moments = _randn(200, 1), _zero_moments(200)
    param[3] = -0.0
    before, active = param.clone(), torch.zeros(200)
    group = {**_GROUP, "weight_decay": 0.0}
    for t in range(1, 1001):
        active[::7] = _randn(29, t)  # neighbours in the same blocks do get gradients
        adamw8bit_update(param, active, moments, coefficients(group, t))
    idle = torch.arange(200) % 7 != 0
    assert param[idle].numpy().tobytes() == before[idle].numpy().tobytes()
    assert not torch.isclose(param[~idle], before[~idle]).any()


@pytest.mark.parametrize(("nonzero", "is_bounded"), [(True, True), (False, False)])
def test_a_second_moment_that_rounds_to_zero_would_make_the_next_step_explode(nonzero: bool, is_bounded: bool) -> None:
    param, moments = torch.zeros(2), _zero_moments(2, nonzero)
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for t, gradient in enumerate(([1.0, 1e-4], [1.0, 0.0]), start=1):
        adamw8bit_update(param, torch.tensor(gradient), moments, coefficients(group, t))
    assert bool(param.abs().max() < 5e-3) is is_bounded


_DIGEST = """
import hashlib, torch
from holdfast.optim import AdamW8bit
torch.manual_seed(0)
x = (torch.arange(7001, dtype=torch.float64) * 0.618).frac().float() - 0.5
p = torch.nn.Parameter(x.clone()); q = torch.nn.Parameter(x[:1001].clone())
o = AdamW8bit([p, q], lr=1e-2)
for t in range(1, 6):
    p.grad = (x.double() * t * 3.7).frac().float(); q.grad = p.grad[:1001].clone(); o.step()
state = [v for s in o.state.values() for k, v in s.items() if k != "step"]
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (p, q, *state))).hexdigest())
"""


@pytest.fixture(scope="module")
def digest_with_the_best_kernels() -> str:
    return _digest({})


def _digest(env: dict[str, str]) -> str:
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", _DIGEST],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_codes_and_weights_do_not_depend_on_the_instruction_set(
    capability: str, digest_with_the_best_kernels: str
) -> None:
    assert _digest({"ATEN_CPU_CAPABILITY": capability}) == digest_with_the_best_kernels
