"""A 4-bit base on a GPU: the same codes and weights as on a CPU, whoever dequantises them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.adapters.nf4 import NF4Linear, dequantise, quantise

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(64, 128), (1000, 333), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_codes_and_weights_are_those_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = quantise(weight), quantise(weight.cuda())
    assert torch.equal(on_cpu.codes, on_gpu.codes.cpu()) and torch.equal(on_cpu.absmax, on_gpu.absmax.cpu())
    want = dequantise(on_cpu, shape, dtype)
    assert torch.equal(dequantise(on_gpu, shape, dtype, backend=backend).cpu(), want)


def test_a_layer_moves_to_the_gpu_and_learns_through_it() -> None:
    layer = NF4Linear.of(nn.Linear(128, 64)).to("cuda", torch.bfloat16)
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.testing.assert_close(layer(x), layer.dense()(x))
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0].float(), layer.dense_weight(torch.float32).sum(0), rtol=0, atol=0.1)
