"""The same bits on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch

from holdfast.optim import AdamW8bit, dequantize_blockwise, quantize_blockwise

pytestmark = pytest.mark.gpu


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
