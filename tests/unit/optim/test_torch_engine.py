"""The update in plain torch operations: which elements it changes, and that its bits depend on its input alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.optim import coefficients
from holdfast.optim.coefficients import Coefficients
from holdfast.optim.quantize import quantize_blockwise, zero_code
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import RULES, Norms
from holdfast.optim.torch_engine import TorchEngine, decoded, update_elements
from tests.support.optim_reference import adamw64

_GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
_BLOCK = 64
_ADAM = RULES["adam"]


def _randn(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def _row(grad: Tensor, by: Coefficients, moments: int = 2) -> Row:
    """Parameter and moments in 32 bits, all positive, so that they fit every rule."""
    n = grad.numel()
    return Row(_randn(n, 99), grad, [_randn(n, seed).abs() for seed in range(moments)], (), by)


def test_32_bit_moments_follow_the_paper_in_double_precision_as_closely_as_torch_does() -> None:
    n, steps = 1000, 100
    param, moments = _randn(n, 99), [torch.zeros(n), torch.zeros(n)]
    reference = torch.nn.Parameter(param.clone())
    optimizer, start = torch.optim.AdamW([reference], **_GROUP), param.double().numpy()
    for t in range(1, steps + 1):
        reference.grad = _randn(n, t)
        optimizer.step()
        row = Row(param, _randn(n, t), moments, (), coefficients.adamw(_GROUP, t))
        assert update_elements(_ADAM, param, row, moments) is None
    rates = {key: value for key, value in _GROUP.items() if key != "maximize"}
    truth = torch.from_numpy(adamw64(start, lambda t: _randn(n, t).double().numpy(), steps, **rates))
    error, error_of_torch = ((p.detach() - truth).abs().max() for p in (param, reference))
    assert error < 1e-5 and error < 1.2 * error_of_torch


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_elements_without_a_usable_gradient_are_named_and_no_other_is_disturbed(rule: Any, bad: float) -> None:
    by = Coefficients(step_size=0.1, beta1=0.9, blend1=0.1, beta2=0.9, blend2=0.1, eps=1e-3, l2=0.01, grad_scale=0.5)
    grad = _randn(300, 5)
    clean, poisoned = (_row(g, by, len(rule.moments)) for g in (grad, grad.clone()))
    before = [t.clone() for t in (clean.param, *clean.moments)]
    poisoned.grad[[0, 70, 299]] = bad
    assert update_elements(rule, clean.param, clean, clean.moments) is None
    used = update_elements(rule, poisoned.param, poisoned, poisoned.moments)
    assert used is not None and (~used).nonzero().flatten().tolist() == [0, 70, 299]
    changed = zip((poisoned.param, *poisoned.moments), before, (clean.param, *clean.moments), strict=True)
    assert all(torch.equal(now, torch.where(used, want, old)) for now, old, want in changed)


def test_a_gradient_that_becomes_usable_by_its_scale_is_used() -> None:
    param, grad = torch.zeros(2), torch.tensor([2.0**64, 2.0**63])
    row = Row(param, grad, [torch.zeros(2)], (), Coefficients(step_size=1.0, grad_scale=0.5))
    assert update_elements(RULES["sgd"], param, row, row.moments) is None
    row.by = Coefficients(step_size=1.0, grad_scale=1.0)
    used = update_elements(RULES["sgd"], param, row, row.moments)
    assert used is not None and used.tolist() == [False, True]


def test_32_bit_moments_are_decoded_to_themselves_and_codes_to_copies() -> None:
    moments = [_randn(100, 1), _randn(100, 2).abs()]
    row = Row(_randn(100, 3), _randn(100, 4), moments, (), Coefficients())
    assert all(have is moment for have, moment in zip(decoded(_ADAM, row, _BLOCK), moments, strict=True))
    codes, absmax = zip(
        *(quantize_blockwise(m, s, _BLOCK) for m, s in zip(moments, (True, False), strict=True)), strict=True
    )
    row = Row(row.param, row.grad, codes, absmax, row.by)
    before = [code.clone() for code in codes]
    for have, moment in zip(decoded(_ADAM, row, _BLOCK), moments, strict=True):
        assert (have - moment).abs().max() < 0.03 * moment.abs().max()
        have.zero_()
    assert all(torch.equal(now, old) for now, old in zip(codes, before, strict=True))


def test_norms_change_nothing_and_are_those_of_double_precision() -> None:
    codes = [torch.full((1000,), zero_code(signed), dtype=torch.uint8) for signed in (True, False)]
    by = coefficients.lamb(_GROUP, 1)
    row = Row(_randn(1000, 1), _randn(1000, 2), codes, [torch.zeros(16), torch.zeros(16)], by)
    before = [t.clone() for t in (row.param, row.grad, *row.moments, *row.absmax)]
    engine, settings = TorchEngine(), Settings(_BLOCK)
    ((gradient, nothing),) = engine.norms(Norms.GRADIENT, [row], settings)
    ((param, same),) = engine.norms(Norms.PARAM_AND_GRADIENT, [row], settings)
    ((param_again, direction),) = engine.norms(Norms.PARAM_AND_LAMB_DIRECTION, [row], settings)
    assert all(torch.equal(a, b) for a, b in zip((row.param, row.grad, *row.moments, *row.absmax), before, strict=True))
    assert gradient == pytest.approx(float(row.grad.double().square().sum()), rel=1e-14)
    assert param == param_again == pytest.approx(float(row.param.double().square().sum()), rel=1e-14)
    assert (nothing, same) == (0.0, gradient)
    u = row.grad.double() / (row.grad.double().abs() + 1e-8) + 0.1 * row.param.double()  # the first step is a sign
    assert direction == pytest.approx(float(u.square().sum()), rel=1e-5)


_DIGEST = """
import hashlib, json, torch
from holdfast import optim
from holdfast.optim import native

def digest(name):
    x = (torch.arange(7001, dtype=torch.float64) * 0.618).frac().float() - 0.5
    params = [torch.nn.Parameter(p) for p in (x.clone(), x[:1001].clone(), x[:5003].bfloat16())]
    o = getattr(optim, name)(params, lr=1e-2, weight_decay=0.1, stochastic_rounding=True, percentile_clipping=60)
    for t in range(1, 6):
        grad = (x.double() * t * 3.7).frac().float()
        grad[t::97] = torch.nan
        for p in params:
            p.grad = grad[: p.numel()].to(p.dtype)
        o.step()
    state = [v for s in o.state.values() for k, v in s.items() if k != "step"]
    tensors = (t.detach().view(torch.uint8).numpy() for t in (*params, *state))
    return hashlib.sha256(b"".join(t.tobytes() for t in tensors))

def all_of_them(isa):
    with native.using(isa):
        return [digest(name).hexdigest() for name in ("AdamW8bit", "LAMB8bit", "AdEMAMix8bit", "RMSprop8bit", "AdamW")]

print(json.dumps({str(isa): all_of_them(isa) for isa in (None, *native.isas())}))
"""


def _digests(env: dict[str, str]) -> dict[str, list[str]]:
    """By instruction set of the kernels; "None" is plain torch."""
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", _DIGEST],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def digest_with_the_best_kernels_of_torch() -> list[str]:
    return _digests({})["None"]


@pytest.mark.parametrize("capability", [None, "default", "avx2"])
def test_codes_and_weights_do_not_depend_on_the_instruction_set(
    capability: str | None, digest_with_the_best_kernels_of_torch: list[str]
) -> None:
    """Neither on that of torch nor on that of the compiled kernels."""
    found = _digests({} if capability is None else {"ATEN_CPU_CAPABILITY": capability})
    assert found == dict.fromkeys(found, digest_with_the_best_kernels_of_torch)
