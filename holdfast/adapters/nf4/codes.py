"""Weights as 4-bit NormalFloat codes and back: pure functions on tensors.

Suffixes: N weights, in row-major order; B blocks of them; G groups of 256 blocks. The last of each may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.adapters.nf4.backends import kernel_for
from holdfast.errors import ConfigurationError

__all__ = ["BLOCK_SIZES", "CODEBOOK", "GROUP", "Quantised", "dequantise", "quantise"]

CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution over the largest one: eight from the lowest to zero, nine from zero to the
highest, and zero only once. As published, in fp32. Source: arXiv 2305.14314, section 3 and appendix E."""
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 256
"""Blocks whose absmax share one scale."""

_ZERO = CODEBOOK.index(0.0)
_MIDPOINTS = [(below + above) / 2 for below, above in pairwise(CODEBOOK)]
_LEVELS = 127


@dataclass(frozen=True, slots=True)
class Quantised:
    """N weights: 4 + 8 / block size bits for each, 4.125 in blocks of 64, and two floats for every 256 blocks."""

    codes: Tensor
    """uint8 [⌈N / 2⌉]: indices into the codebook, the earlier weight's in the high half of a byte."""
    absmax: Tensor
    """int8 [B]: the largest magnitude of each block, in steps of its group's scale / 127 from the mean."""
    scale: Tensor
    """fp32 [G]: the largest distance of a group's absmax from the mean."""
    mean: Tensor
    """fp32, a scalar: of every absmax."""


def quantise(weight: Tensor, *, block_size: int = 64) -> Quantised:
    """The nearest codes of any shape's elements. What is zero stays zero.

    A weight is off by at most half the widest gap of the codebook (0.152) times its block's absmax, plus what that is
    off by, at most scale / 254. The paper keeps the absmax as 8-bit floats around their mean; even steps were
    measured to have a third of the error of E4M3 floats on normal weights, and two thirds of that of the dynamic map in
    the authors' code.

    Raises: ConfigurationError for what is no float or not finite, and for another block size than ``BLOCK_SIZES``.
    """
    if problems := [*_problems(weight, block_size)]:
        raise ConfigurationError(problems)
    blocks_BN = _rows(weight.detach().float().flatten(), block_size)
    absmax_B = blocks_BN.abs().amax(1)
    absmax, scale, mean = _quantise_absmax(absmax_B)
    # A block whose absmax is kept as zero is all zeros, so that codes of what was quantised are these codes again.
    answers_B = (absmax_B > 0) & (_absmax(absmax, scale, mean) > 0)
    shares_BN = blocks_BN / torch.where(answers_B, absmax_B, torch.inf)[:, None]
    codes_N = torch.bucketize(shares_BN, shares_BN.new_tensor(_MIDPOINTS), out_int32=True).to(torch.uint8)
    return Quantised(_packed(codes_N.flatten()[: weight.numel()]), absmax, scale, mean)


def dequantise(
    quantised: Quantised, shape: tuple[int, ...], dtype: torch.dtype, *, block_size: int = 64, backend: str = "auto"
) -> Tensor:
    """The weights [*shape] on the codes' device, computed in fp32 and rounded to ``dtype`` once.

    ``backend``: see :func:`holdfast.adapters.nf4.backends.kernel_for`.
    """
    absmax_B = _absmax(quantised.absmax, quantised.scale, quantised.mean)
    kernel = kernel_for(quantised.codes.device, dtype, backend)
    if kernel is not None:
        return kernel(quantised.codes, absmax_B, shape, dtype, block_size)
    count = torch.Size(shape).numel()
    values_N = _pairs(quantised.codes.device).index_select(0, quantised.codes.int()).flatten()[:count]
    weights_BN = _rows(values_N, block_size) * absmax_B[:, None]
    return weights_BN.flatten()[:count].view(shape).to(dtype)


def _problems(weight: Tensor, block_size: int) -> list[str]:
    found = []
    if block_size not in BLOCK_SIZES:
        found.append(f"block_size={block_size} must be one of {', '.join(map(str, BLOCK_SIZES))}")
    if not weight.is_floating_point():
        found.append(
            f"weights of {weight.dtype} cannot be quantised: only floats can, which these may have been before"
        )
    elif not weight.float().isfinite().all():
        found.append(
            "weights that are not finite in fp32 cannot be quantised: a block has the scale of its largest one"
        )
    return found


def _quantise_absmax(absmax_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation. Source: arXiv 2305.14314, section 3."""
    mean = absmax_B.double().mean().nan_to_num(0.0).float()  # no block has no mean
    distances_GB = _rows(absmax_B - mean, GROUP)
    scale_G = distances_GB.abs().amax(1)
    steps_GB = (distances_GB / scale_G.clamp_min(torch.finfo(torch.float32).tiny)[:, None] * _LEVELS).round()
    return steps_GB.to(torch.int8).flatten()[: len(absmax_B)], scale_G, mean


def _absmax(absmax: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """fp32 [B]; none is negative, which rounding might make the smallest of very different ones."""
    distances_GB = _rows(absmax, GROUP).float() * (scale / _LEVELS)[:, None]
    return (distances_GB.flatten()[: len(absmax)] + mean).clamp(0, torch.finfo(torch.float32).max)


def _rows(flat: Tensor, width: int) -> Tensor:
    """[..., width], the last one filled up with zeros."""
    missing = -len(flat) % width
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, width)


def _packed(codes_N: Tensor) -> Tensor:
    pairs = F.pad(codes_N, (0, len(codes_N) % 2), value=_ZERO).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


@cache
def _pairs(device: torch.device) -> Tensor:
    """fp32 [256, 2]: what the two codes of every byte stand for."""
    with torch.inference_mode(False):
        return torch.tensor([(high, low) for high in CODEBOOK for low in CODEBOOK], device=device)
