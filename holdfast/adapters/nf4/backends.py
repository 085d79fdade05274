"""Who turns codes into weights: plain torch, or the kernel of bitsandbytes, of which this is the only door."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["BACKENDS", "Kernel", "kernel_for"]

BACKENDS = ("auto", "torch")

Kernel = Callable[[Tensor, Tensor, tuple[int, ...], torch.dtype, int], Tensor]
"""Codes [⌈N / 2⌉], absmax fp32 [B], the weights' shape and dtype, block size -> the weights."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_for(device: torch.device, dtype: torch.dtype, backend: str) -> Kernel | None:
    """bitsandbytes' where it is installed and ``backend`` is "auto", for CUDA and the dtypes that it writes; None for
    plain torch, which "torch" asks for everywhere."""
    if backend == "torch" or device.type != "cuda" or dtype not in _DTYPES:
        return None
    return _bitsandbytes()


@cache
def _bitsandbytes() -> Kernel | None:
    """Its layout is ours: high half first, blocks in row-major order. It gets the absmax that we have dequantised."""
    try:
        from bitsandbytes.functional import dequantize_4bit
    except ImportError:
        return None

    def kernel(codes: Tensor, absmax_B: Tensor, shape: tuple[int, ...], dtype: torch.dtype, block_size: int) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        dequantize_4bit(codes.view(-1, 1), absmax=absmax_B, out=out, blocksize=block_size, quant_type="nf4")
        return out

    return kernel
