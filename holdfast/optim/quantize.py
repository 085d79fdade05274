"""Block-wise 8-bit quantisation with the dynamic (tree) codebooks.

A tensor is flattened row-major and cut into blocks of ``block_size`` elements; the last one may be short. A
block is stored as one fp32 ``absmax`` and, per element, the index of the codebook entry nearest to
``x / absmax``. Every operation here is rounded once, so the bytes do not depend on the machine, on the
number of threads, or on how a tensor is cut, as long as cuts fall on block boundaries.

Source: arXiv 2110.02861, sections 2.1 and 2.2 (block-wise quantisation, dynamic quantisation) and appendix F.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError

__all__ = [
    "SIGNED",
    "UNSIGNED",
    "block_absmax",
    "block_count",
    "codebook",
    "codebook_name",
    "decode_elements",
    "dequantize_blockwise",
    "encode_elements",
    "quantize_blockwise",
    "zero_code",
]

SIGNED = "dynamic-signed"
"""Codebook of first moments: 127 negative entries, 0, 128 positive ones. It has 1.0 but no -1.0."""
UNSIGNED = "dynamic-unsigned"
"""Codebook of second moments: 0 and 255 positive entries, a decade of every seven with twice the resolution."""

_DECADES = 7


def codebook_name(signed: bool) -> str:
    """The name under which manifests and state dicts record a codebook."""
    return SIGNED if signed else UNSIGNED


def zero_code(signed: bool) -> int:
    """The code of exactly 0."""
    return 127 if signed else 0


def block_count(elements: int, block_size: int) -> int:
    """Blocks that ``elements`` are cut into, a short last one included."""
    return -(-elements // block_size)


def block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block of a flat tensor. Shapes: ``[n]`` to ``[block_count]``."""
    return torch.cat([rows.abs().amax(1) for rows in _rows(flat, block_size)])


def codebook(signed: bool) -> Tensor:
    """The 256 entries in ascending order, byte-identical to the published tables.

    Shapes: fp32 ``[256]`` on CPU, a fresh copy.
    """
    return _tables(signed, torch.device("cpu")).values.clone()


def quantize_blockwise(x: Tensor, signed: bool, block_size: int, *, nonzero: bool = False) -> tuple[Tensor, Tensor]:
    """Replace each element by the code of the codebook entry nearest to ``x / absmax`` of its block.

    "Nearest" compares with the fp32 midpoints of neighbouring entries; a tie goes to the lower magnitude.
    The sign is kept: no element gets an entry of the other sign, one that is nearest to 0 becomes 0 whatever its
    sign, and 0 stays exactly 0. A block of zeros has absmax 0. ``nonzero`` (unsigned only) lifts every positive
    element to at least the first code, because a second moment of 0 would make the next step divide by little.

    Shapes: ``x`` floating point, any shape and strides, finite (a value that is not spoils its block); unsigned
    takes ``x >= 0``. Returns uint8 codes shaped like ``x`` and fp32 absmax ``[block_count]``, on the device of ``x``.
    Raises: ConfigurationError for a block size below 1 and for ``nonzero`` with the signed codebook.
    """
    _check_block_size(block_size)
    if nonzero and signed:
        raise ConfigurationError("nonzero=True needs signed=False: a first moment may be zero")
    flat = x.detach().float().reshape(-1)
    absmax = block_absmax(flat, block_size)
    codes = _nearest(_scaled(flat, absmax, block_size), _tables(signed, x.device))
    if nonzero:  # asked of x, because x / absmax may have underflowed to 0
        codes = torch.maximum(codes, (flat > 0).view(torch.uint8))
    return codes.view(x.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool, block_size: int) -> Tensor:
    """The codebook entry of each code times the absmax of its block.

    Shapes: ``codes`` uint8 of any shape, ``absmax`` fp32 ``[block_count]``. Returns fp32 shaped like ``codes``.
    Raises: ConfigurationError when ``absmax`` does not have one entry per block.
    """
    _check_block_size(block_size)
    blocks = block_count(codes.numel(), block_size)
    if absmax.numel() != blocks:
        raise ConfigurationError(
            f"absmax has {absmax.numel()} entries; {codes.numel()} codes in blocks of {block_size} need {blocks}"
        )
    values = _tables(signed, codes.device).values.index_select(0, codes.reshape(-1).int())
    for rows, scale in _with_scale(values, absmax, block_size):
        rows.mul_(scale)
    return values.view(codes.shape)


def encode_elements(x: Tensor, absmax: Tensor, signed: bool, *, nonzero: bool = False) -> Tensor:
    """The codes of ``quantize_blockwise`` where the absmax is known, for elements that are not in the order of blocks.

    Shapes: fp32 ``[n]`` and the absmax of each one's block, fp32 ``[n]``. Returns uint8 ``[n]``.
    """
    codes = _nearest(x / torch.where(absmax > 0, absmax, 1.0), _tables(signed, x.device))
    return torch.maximum(codes, (x > 0).view(torch.uint8)) if nonzero else codes


def decode_elements(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """What ``encode_elements`` encoded. Shapes: uint8 ``[n]``, fp32 ``[n]``. Returns fp32 ``[n]``."""
    return _tables(signed, codes.device).values.index_select(0, codes.int()).mul_(absmax)


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ConfigurationError(f"block_size={block_size} must be at least 1, for example 256")


def _rows(flat: Tensor, block_size: int) -> list[Tensor]:
    """Views of ``flat``: the whole blocks as ``[blocks, block_size]``, then a short last one as ``[1, rest]``."""
    whole = flat.numel() // block_size * block_size
    rows = [flat[:whole].view(-1, block_size)]
    return rows if whole == flat.numel() else [*rows, flat[whole:].view(1, -1)]


def _with_scale(flat: Tensor, scale: Tensor, block_size: int) -> list[tuple[Tensor, Tensor]]:
    """The views of ``_rows``, each with its blocks' scale as a column."""
    rows = _rows(flat, block_size)
    columns = torch.tensor_split(scale.view(-1, 1), [len(rows[0])])
    return list(zip(rows, columns, strict=False))  # without a short last block its column is empty


def _scaled(flat: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """``x / absmax`` in [-1, 1]. A division, not a product with the reciprocal, which overflows for tiny blocks."""
    divisor = torch.where(absmax > 0, absmax, 1.0)
    out = torch.empty_like(flat)
    for (rows, scale), target in zip(_with_scale(flat, divisor, block_size), _rows(out, block_size), strict=True):
        torch.div(rows, scale, out=target)
    return out


def _nearest(scaled: Tensor, tables: _Tables) -> Tensor:
    """The code of each element of a flat fp32 tensor.

    A binary search (``torch.bucketize``) costs about 33 ns per element on one core, this 1.5 ns: at most one
    boundary shares its upper 16 bits with an element, so a table finds the code up to one comparison.
    """
    upper_half = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    codes = tables.lowest.index_select(0, upper_half)
    codes += scaled > tables.last.index_select(0, codes)
    return codes.to(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Tables:
    values: Tensor
    """fp32 [256]: the codebook."""
    last: Tensor
    """fp32 [256]: the largest number that still gets this code."""
    lowest: Tensor
    """int32 [65536]: the code of the smallest number whose fp32 bits begin with these 16."""

    def to(self, device: torch.device) -> _Tables:
        return _Tables(self.values.to(device), self.last.to(device), self.lowest.to(device))


@cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    if device.type != "cpu":
        return _tables(signed, torch.device("cpu")).to(device)
    values = _dynamic_map(signed)
    middle = (values[1:] + values[:-1]) / 2
    # A tie belongs to the lower magnitude: above zero to the lower entry, below zero to the upper one.
    below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    last = torch.cat([torch.where(middle > 0, middle, below), torch.full_like(middle[:1], torch.inf)])
    return _Tables(values, last, torch.bucketize(_smallest_by_upper_half(), last[:-1], out_int32=True))


def _smallest_by_upper_half() -> Tensor:
    """For each of the 65536 upper halves, the smallest fp32 number that begins with it."""
    upper = torch.arange(1 << 16, dtype=torch.int64, device="cpu")
    is_negative = (upper >> 15).bool()
    bits = (upper << 16) + is_negative * (0xFFFF - (1 << 32))  # as a signed 32-bit number
    return bits.to(torch.int32).view(torch.float32)


def _dynamic_map(signed: bool) -> Tensor:
    """Decade ``d`` holds the midpoints of equal cells of [0.1, 1], scaled by 10^(d-6); then 0 and 1."""
    entries = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for decade in range(_DECADES):
        edges = _edges(2**decade if signed else 2 ** (decade + 1))
        positive = (edges[1:] + edges[:-1]) / 2 * float(f"1e{decade - _DECADES + 1}")
        entries += [positive, -positive] if signed else [positive]
    return torch.cat(entries).sort().values


def _edges(cells: int) -> Tensor:
    """``linspace(0.1, 1, cells + 1)`` in fp32 as the published tables have it: counted from both ends with a
    fused multiply-add. ``torch.linspace`` itself gives other bits on processors without AVX2. Here products and
    sums are exact in fp64 and rounded once, which is what fused means.
    """
    first = float(torch.tensor(0.1, dtype=torch.float32))
    width = float(torch.tensor((1.0 - first) / cells, dtype=torch.float32))
    index = torch.arange(cells + 1, dtype=torch.float64, device="cpu")
    from_start, from_end = first + width * index, 1.0 - width * (cells - index)
    return torch.where(index < (cells + 1) // 2, from_start, from_end).float()
