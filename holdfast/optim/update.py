"""The AdamW update as free functions on tensors, with 32-bit and with 8-bit moments.

Every tensor operation here is rounded once: plain products, sums, quotients and square roots. The fused ones
(``lerp_``, ``add_(alpha=)``, ``addcmul_``) round differently from one processor or device to the next, and a
rank that moves to another machine must go on with the same bits.

Source: arXiv 1711.05101, algorithm 2 (decoupled weight decay); arXiv 2110.02861, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.optim.quantize import block_absmax, dequantize_blockwise, quantize_blockwise

__all__ = ["BlockwiseMoments", "Coefficients", "adamw8bit_update", "adamw_update", "coefficients"]

_LARGEST_GRADIENT = 2.0**63
"""A larger one, squared, comes close to the end of fp32 and would make a whole block of second moments infinite."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The scalars of one update."""

    beta1: float
    beta2: float
    eps: float
    decay: float
    """Factor of the parameter before the update, 1 - lr x weight_decay."""
    step_size: float
    """lr / (1 - beta1^t)."""
    root_scale: float
    """1 / sqrt(1 - beta2^t), the bias correction of the root of the second moment."""


def coefficients(group: Mapping[str, Any], step: int) -> Coefficients:
    """The scalars of update number ``step`` (from 1) of a parameter group, in double precision."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    return Coefficients(
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        decay=1.0 - lr * group["weight_decay"],
        step_size=lr / (1.0 - beta1**step),
        root_scale=(1.0 - beta2**step) ** -0.5,
    )


@dataclass(frozen=True, slots=True)
class BlockwiseMoments:
    """Both moments of a flat parameter in 8 bits. Updating writes into these tensors."""

    exp_avg_codes: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq_codes: Tensor
    exp_avg_sq_absmax: Tensor
    block_size: int
    nonzero_second_moment: bool
    """Keep positive second moments positive."""

    def part(self, start: int, stop: int) -> BlockwiseMoments:
        """The moments of elements ``start .. stop``, both on block boundaries but for the tensor's own end."""
        blocks = slice(start // self.block_size, -(-stop // self.block_size))
        return BlockwiseMoments(
            self.exp_avg_codes[start:stop],
            self.exp_avg_absmax[blocks],
            self.exp_avg_sq_codes[start:stop],
            self.exp_avg_sq_absmax[blocks],
            self.block_size,
            self.nonzero_second_moment,
        )


def adamw_update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, by: Coefficients) -> Tensor | None:
    """Decay the parameter, update both moments, take the step; all in place.

    An element whose gradient is NaN, infinite or above 2^63 is left out: its parameter and moments keep their
    bits. Returns None when every element was used, else a mask of those that were.

    Shapes: four fp32 tensors of one shape. Reads one flag back from the device.
    """
    usable = _usable(grad)
    if usable is None:
        _apply(param, grad, exp_avg, exp_avg_sq, by)
        return None
    changing = (param, exp_avg, exp_avg_sq)
    before = [t.clone() for t in changing]
    _apply(param, torch.where(usable, grad, 0.0), exp_avg, exp_avg_sq, by)
    for now, old in zip(changing, before, strict=True):
        now.copy_(torch.where(usable, now, old))
    return usable


def adamw8bit_update(param: Tensor, grad: Tensor, moments: BlockwiseMoments, by: Coefficients) -> None:
    """The same with 8-bit moments: decode, update, step with the exact new moments, encode.

    A block without any usable gradient keeps its codes and absmax. In a block that has both, the moments of the
    elements left out are encoded again with the block's new absmax, so they may move by half a code step.

    Shapes: ``param`` and ``grad`` fp32 ``[n]``.
    """
    size = moments.block_size
    exp_avg = dequantize_blockwise(moments.exp_avg_codes, moments.exp_avg_absmax, True, size)
    exp_avg_sq = dequantize_blockwise(moments.exp_avg_sq_codes, moments.exp_avg_sq_absmax, False, size)
    usable = adamw_update(param, grad, exp_avg, exp_avg_sq, by)
    first = quantize_blockwise(exp_avg, True, size)
    second = quantize_blockwise(exp_avg_sq, False, size, nonzero=moments.nonzero_second_moment)
    _store(moments.exp_avg_codes, moments.exp_avg_absmax, *first, usable, size)
    _store(moments.exp_avg_sq_codes, moments.exp_avg_sq_absmax, *second, usable, size)


def _usable(grad: Tensor) -> Tensor | None:
    """Elements whose gradient can be used, or None for all of them. Comparisons with NaN are false."""
    low, high = grad.aminmax()
    if float(low) >= -_LARGEST_GRADIENT and float(high) <= _LARGEST_GRADIENT:
        return None
    return grad.abs() <= _LARGEST_GRADIENT


def _apply(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, by: Coefficients) -> None:
    exp_avg.mul_(by.beta1).add_(grad * (1.0 - by.beta1))
    exp_avg_sq.mul_(by.beta2).add_((grad * (1.0 - by.beta2)).mul_(grad))
    denominator = exp_avg_sq.sqrt().mul_(by.root_scale).add_(by.eps)
    param.mul_(by.decay).sub_((exp_avg * by.step_size).div_(denominator))


def _store(
    codes: Tensor, absmax: Tensor, new_codes: Tensor, new_absmax: Tensor, usable: Tensor | None, block_size: int
) -> None:
    if usable is not None:
        touched = block_absmax(usable.float(), block_size) > 0
        new_absmax = torch.where(touched, new_absmax, absmax)
        of_element = touched.repeat_interleave(block_size)[: codes.numel()]
        new_codes = torch.where(of_element, new_codes, codes)
    codes.copy_(new_codes)
    absmax.copy_(new_absmax)
