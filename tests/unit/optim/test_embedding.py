"""StableEmbedding. Source: arXiv 2110.02861, section 2.3."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.optim import AdamW8bit, OptimConfig, StableEmbedding, build_optimizer, parameter_groups

_TOKENS = torch.tensor([[0, 3, 7], [7, 7, 63]])


def _layer(**options: Any) -> StableEmbedding:
    torch.manual_seed(0)
    layer = StableEmbedding(64, 96, **options)
    with torch.no_grad():
        layer.norm.weight.normal_(1.0, 0.1)
        layer.norm.bias.normal_(0.0, 0.1)
    return layer


def _reference(layer: StableEmbedding, tokens: Tensor) -> Tensor:
    """In double precision, from the definitions."""
    rows = layer.weight.detach().double()[tokens]
    mean, variance = rows.mean(-1, keepdim=True), rows.var(-1, unbiased=False, keepdim=True)
    scale, shift = layer.norm.weight.detach().double(), layer.norm.bias.detach().double()
    return (rows - mean) / torch.sqrt(variance + layer.norm.eps) * scale + shift


def test_weights_are_xavier_uniform_and_so_without_outliers() -> None:
    torch.manual_seed(0)
    weight = StableEmbedding(1000, 200).weight.detach()
    bound = math.sqrt(6 / (1000 + 200))
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert float(weight.mean()) == pytest.approx(0.0, abs=0.001)


def test_a_fresh_norm_changes_neither_scale_nor_place() -> None:
    layer = StableEmbedding(64, 96)
    assert (layer.norm.weight == 1).all() and (layer.norm.bias == 0).all()
    out = layer(_TOKENS)
    assert out.shape == (2, 3, 96)
    assert torch.allclose(out.mean(-1), torch.zeros(2, 3), atol=1e-6)
    assert torch.allclose(out.var(-1, unbiased=False), torch.ones(2, 3), atol=5e-3)  # eps, beside small variances


def test_the_output_is_the_layer_norm_of_the_rows() -> None:
    layer = _layer()
    assert torch.allclose(layer(_TOKENS).double(), _reference(layer, _TOKENS), rtol=0, atol=3e-6)
    wide = _layer().double()
    assert wide(_TOKENS).dtype == torch.float64
    assert torch.allclose(wide(_TOKENS), _reference(wide, _TOKENS), rtol=0, atol=1e-13)


def test_gradients_are_dense_and_right() -> None:
    layer = StableEmbedding(5, 4).double()
    tokens = torch.tensor([0, 2, 2])

    def of_weight(weight: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, {"weight": weight}, (tokens,))
        return out

    assert torch.autograd.gradcheck(of_weight, (layer.weight,))
    layer(tokens).square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.layout == torch.strided
    assert layer.weight.grad[[1, 3, 4]].abs().max() == 0


def test_the_padding_row_is_zero_and_stays_so() -> None:
    layer = _layer(padding_idx=7)
    assert (layer.weight[7] == 0).all()
    assert torch.equal(layer(torch.tensor([7]))[0], layer.norm.bias)
    optimizer = build_optimizer(OptimConfig(), parameter_groups(layer, OptimConfig()))
    for _ in range(3):
        optimizer.zero_grad()
        layer(_TOKENS).square().sum().backward()
        assert layer.weight.grad is not None
        assert (layer.weight.grad[7] == 0).all() and (layer.weight.grad[3] != 0).any()
        optimizer.step()
    assert (layer.weight[7] == 0).all()
    layer.reset_parameters()
    assert (layer.weight[7] == 0).all() and (layer.weight[8] != 0).all()


@pytest.mark.parametrize("whole", [True, False], ids=["norm in bf16", "norm in fp32"])
def test_in_bf16_the_norm_is_taken_in_fp32_and_rounded_once(whole: bool) -> None:
    layer = _layer().bfloat16() if whole else _layer(dtype=torch.bfloat16)
    assert layer.norm.weight.dtype == (torch.bfloat16 if whole else torch.float32)
    wide = _layer()
    wide.load_state_dict({key: value.float() for key, value in layer.state_dict().items()})
    out = layer(_TOKENS)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide(_TOKENS).bfloat16())


def test_autocast_changes_no_bit() -> None:
    layer = _layer()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(_TOKENS)
    assert out.dtype == torch.float32 and torch.equal(out, layer(_TOKENS))


def test_a_state_dict_travels() -> None:
    layer, other = _layer(padding_idx=7), StableEmbedding(64, 96, padding_idx=7)
    assert set(layer.state_dict()) == {"weight", "norm.weight", "norm.bias"}
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(_TOKENS), layer(_TOKENS))


def test_the_optimizer_keeps_32_bits_for_it_and_8_for_others() -> None:
    model, config = nn.ModuleDict({"embed": _layer(), "out": nn.Linear(96, 64)}), OptimConfig(min_8bit_size=1024)
    optimizer = build_optimizer(config, parameter_groups(model, config))
    assert isinstance(optimizer, AdamW8bit)
    optimizer.ensure_state()
    assert set(optimizer.state[model["embed"].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "exp_avg_codes" in optimizer.state[model["out"].weight]


def test_it_is_built_on_the_device_and_in_the_dtype_that_were_asked_for() -> None:
    layer = StableEmbedding(64, 96, device="meta", dtype=torch.bfloat16)
    assert layer.weight.device.type == layer.norm.weight.device.type == "meta"
    assert (layer.weight.dtype, layer.norm.weight.dtype) == (torch.bfloat16, torch.float32)
