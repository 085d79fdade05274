"""The same bits on a GPU as on a CPU."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import holdfast.optim
from holdfast.optim import AdamW8bit, dequantize_blockwise, quantize_blockwise
from holdfast.optim.coefficients import Coefficients
from holdfast.optim.ops import engine_for
from holdfast.optim.rows import Engine, Row, Settings
from holdfast.optim.rules import RULES, Rule
from holdfast.optim.torch_engine import TorchEngine
from tests.support.engine_rows import SHAPES, Shape, at_thresholds, copied, differences, make_row, norms_of, spoil

pytestmark = pytest.mark.gpu

_rules = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
_BLOCK_SIZES = [64, 128, 256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_those_of_the_cpu(signed: bool) -> None:
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    values = values if signed else values.square()
    codes, absmax = quantize_blockwise(values, signed, 256)
    gpu_codes, gpu_absmax = quantize_blockwise(values.cuda(), signed, 256)
    assert torch.equal(codes, gpu_codes.cpu())
    assert torch.equal(absmax, gpu_absmax.cpu())
    back = dequantize_blockwise(gpu_codes, gpu_absmax, signed, 256)
    assert torch.equal(dequantize_blockwise(codes, absmax, signed, 256), back.cpu())


def test_ten_updates_give_the_weights_and_codes_of_the_cpu() -> None:
    start = torch.randn(300, 257, generator=torch.Generator().manual_seed(2))
    cpu, gpu = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.cuda())
    optimizers = AdamW8bit([cpu], lr=1e-2), AdamW8bit([gpu], lr=1e-2)
    for step in range(10):
        cpu.grad = torch.randn(300, 257, generator=torch.Generator().manual_seed(100 + step))
        gpu.grad = cpu.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(cpu, gpu.cpu())
    ours, theirs = optimizers[0].state[cpu], optimizers[1].state[gpu]
    assert all(torch.equal(ours[key], theirs[key].cpu()) for key in ours if key != "step")


@pytest.mark.parametrize("name", ["LAMB8bit", "LARS8bit", "AdEMAMix8bit", "Lion", "AdamW"])
def test_optimizers_with_clipping_and_stochastic_rounding_agree_with_the_cpu(name: str) -> None:
    shapes = [(64, 65), (4096,), (7,)]
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16() for shape in shapes]
    sides = {
        device: [torch.nn.Parameter(start.to(device, copy=True)) for start in starts] for device in ("cpu", "cuda")
    }
    kind = getattr(holdfast.optim, name)
    optimizers = {
        device: kind(params, percentile_clipping=50, stochastic_rounding=True) for device, params in sides.items()
    }
    for step in range(5):
        random = torch.Generator().manual_seed(200 + step)
        for cpu, gpu in zip(*sides.values(), strict=True):
            cpu.grad = torch.randn(cpu.shape, generator=random).bfloat16()
            gpu.grad = cpu.grad.cuda()
        for optimizer in optimizers.values():
            optimizer.step()
    assert all(torch.equal(cpu, gpu.cpu()) for cpu, gpu in zip(*sides.values(), strict=True))


@pytest.fixture
def triton_engine() -> Engine:
    pytest.importorskip("triton")
    from holdfast.optim.triton_engine import TritonEngine

    return TritonEngine()


def test_triton_is_the_engine_of_a_gpu(triton_engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(engine_for(torch.device("cuda:0")), type(triton_engine)), caplog.text


def _compare(engine: Engine, rule: Rule, rows: list[Row], settings: Settings) -> None:
    """Three updates, because a second one reads what the first wrote."""
    ours, theirs = copied(rows, "cuda"), copied(rows)
    for _ in range(3):
        engine.update(rule, ours, settings)
        TorchEngine().update(rule, theirs, settings)
        assert differences(ours, theirs) == []
    assert norms_of(engine, rule, ours, settings) == norms_of(TorchEngine(), rule, theirs, settings)


@pytest.mark.timeout(300)
@_rules
@pytest.mark.parametrize("stochastic", [False, True])
def test_rows_of_every_kind_in_one_call(triton_engine: Engine, rule: Rule, stochastic: bool) -> None:
    for block_size in (64, 256):
        rows = [make_row(rule, shape, block_size, seed) for seed, shape in enumerate(SHAPES)]
        _compare(
            triton_engine,
            rule,
            rows,
            Settings(block_size, nonzero_second_moment=stochastic, stochastic_rounding=stochastic),
        )


@pytest.mark.timeout(300)
@_rules
def test_gradients_that_cannot_be_used(triton_engine: Engine, rule: Rule) -> None:
    rows = [spoil(make_row(rule, shape, 64, seed), 64) for seed, shape in enumerate(SHAPES, 1)]
    _compare(triton_engine, rule, rows, Settings(64, stochastic_rounding=True))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block_size", _BLOCK_SIZES)
def test_every_block_size(triton_engine: Engine, block_size: int) -> None:
    rows = [make_row(RULES["lamb"], Shape(n), block_size, n) for n in (5, 8192, 12_289, 1_000_003)]
    _compare(triton_engine, RULES["lamb"], rows, Settings(block_size))


def test_hundreds_of_rows(triton_engine: Engine) -> None:
    rows = [make_row(RULES["adam"], Shape(1 + 37 * n), 256, n) for n in range(300)]
    _compare(triton_engine, RULES["adam"], rows, Settings(256))


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_moments_at_every_border_between_two_codes(triton_engine: Engine, name: str) -> None:
    rule, grad = RULES[name], at_thresholds(signed=name == "sgd")
    row = make_row(rule, Shape(len(grad)), 64, 0)
    row.grad, row.by = grad, Coefficients(step_size=0.1, eps=1e-3)  # the new moment is the gradient, or its square
    for nonzero in (True, False):
        _compare(triton_engine, rule, [row], Settings(64, nonzero))


def test_tensors_that_start_between_two_words(triton_engine: Engine) -> None:
    rule, settings = RULES["adam"], Settings(64)
    row = make_row(rule, replace(SHAPES[0], elements=5760), 64, 1)
    ours, theirs = copied([row], "cuda"), copied([row])
    ours[0].param = torch.cat([torch.zeros(1, device="cuda"), ours[0].param])[1:]
    triton_engine.update(rule, ours, settings)
    TorchEngine().update(rule, theirs, settings)
    assert differences(ours, theirs) == []


def test_a_step_waits_for_nothing(triton_engine: Engine) -> None:
    rows = copied([make_row(RULES["adam"], Shape(100_000), 256, n) for n in range(3)], "cuda")
    triton_engine.update(RULES["adam"], rows, Settings(256))
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_engine.update(RULES["adam"], rows, Settings(256))
    finally:
        torch.cuda.set_sync_debug_mode("default")
