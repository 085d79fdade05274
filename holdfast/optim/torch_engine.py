"""Updates in plain torch operations: works everywhere, and says what the kernels must do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.optim.quantize import block_absmax, dequantize_blockwise, quantize_blockwise
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import RULES, Norms, Rule, lamb_direction

__all__ = ["TorchEngine", "decoded", "update_elements", "usable_elements"]

_LARGEST_GRADIENT = 2.0**63
"""A larger one, squared, comes close to the end of fp32 and would make a whole block of second moments infinite."""

_CPU_CHUNK, _DEVICE_CHUNK = 1 << 17, 1 << 23
"""Elements updated at a time. Bounds the fp32 temporaries and, on a CPU, keeps them in its cache. Multiples of every
block size, so that chunks change no bits."""


class TorchEngine:
    """See ``Engine``."""

    def update(self, rule: Rule, rows: Sequence[Row], settings: Settings) -> None:
        for row in rows:
            for part in _parts(row, settings.block_size):
                _update(rule, part, settings)

    def norms(self, kind: Norms, rows: Sequence[Row], settings: Settings) -> list[tuple[float, float]]:
        return [_norms(kind, row, settings.block_size) for row in rows]


def update_elements(rule: Rule, param: Tensor, row: Row, moments: Sequence[Tensor]) -> Tensor | None:
    """Apply the rule to fp32 ``param`` and ``moments`` where the gradient is usable; all others keep their bits.

    Returns None when every element was used, else a mask of those that were. Reads one flag back from the device.
    """
    grad = _effective_gradient(row, param)
    usable = _usable(grad)
    if usable is None:
        rule.update(param, grad, moments, row.by)
        return None
    changing = (param, *moments)
    before = [t.clone() for t in changing]
    rule.update(param, torch.where(usable, grad, 0.0), moments, row.by)
    for now, old in zip(changing, before, strict=True):
        now.copy_(torch.where(usable, now, old))
    return usable


def decoded(rule: Rule, row: Row, block_size: int) -> list[Tensor]:
    """The moments as fp32: the tensors themselves, or copies of what the codes stand for."""
    if not row.absmax:
        return list(row.moments)
    return [
        dequantize_blockwise(codes, absmax, signed, block_size)
        for codes, absmax, signed in zip(row.moments, row.absmax, rule.moments.values(), strict=True)
    ]


def usable_elements(row: Row) -> Tensor:
    """A mask of the elements that an update of this row, still to come, will use."""
    return _effective_gradient(row, row.param.float()).abs() <= _LARGEST_GRADIENT


def _parts(row: Row, block_size: int) -> list[Row]:
    size = _CPU_CHUNK if row.param.device.type == "cpu" else _DEVICE_CHUNK
    starts = range(0, row.param.numel(), size)
    return [row] if len(starts) == 1 else [row.part(start, start + size, block_size) for start in starts]


def _update(rule: Rule, row: Row, settings: Settings) -> None:
    param, moments = row.param.float(), decoded(rule, row, settings.block_size)
    usable = update_elements(rule, param, row, moments)
    if row.absmax:
        for number, signed in enumerate(rule.moments.values()):
            nonzero = settings.nonzero_second_moment and not signed
            new = quantize_blockwise(moments[number], signed, settings.block_size, nonzero=nonzero)
            _store(row.moments[number], row.absmax[number], *new, usable, settings.block_size)
    if row.param.dtype == torch.bfloat16 and settings.stochastic_rounding:
        row.param.copy_(_rounded_stochastically(param, row))
    elif row.param.dtype != torch.float32:  # else param is the parameter itself
        row.param.copy_(param)


def _scaled_gradient(row: Row) -> Tensor:
    return row.grad.float() * row.by.grad_scale


def _effective_gradient(row: Row, param: Tensor) -> Tensor:
    scaled = _scaled_gradient(row)
    return scaled.add_(param * row.by.l2) if row.by.l2 else scaled


def _usable(grad: Tensor) -> Tensor | None:
    """Elements whose gradient can be used, or None for all of them. Comparisons with NaN are false."""
    low, high = grad.aminmax()
    if float(low) >= -_LARGEST_GRADIENT and float(high) <= _LARGEST_GRADIENT:
        return None
    return grad.abs() <= _LARGEST_GRADIENT


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


def _norms(kind: Norms, row: Row, block_size: int) -> tuple[float, float]:
    param, grad = row.param.float(), _scaled_gradient(row)
    usable = _effective_gradient(row, param).abs() <= _LARGEST_GRADIENT
    if kind is Norms.GRADIENT:
        return _sum_of_squares(torch.where(usable, grad, 0.0), block_size), 0.0
    second = grad
    if kind is Norms.PARAM_AND_LAMB_DIRECTION:
        second = _direction(row, param, grad, block_size)
    return (
        _sum_of_squares(param, block_size),
        _sum_of_squares(torch.where(usable, second, 0.0), block_size),
    )


def _direction(row: Row, param: Tensor, grad: Tensor, block_size: int) -> Tensor:
    moments = [moment.clone() for moment in decoded(RULES["lamb"], row, block_size)]
    return lamb_direction(param, grad, moments, row.by)


def _sum_of_squares(flat: Tensor, block_size: int) -> float:
    """In double precision, by halving within each block and then over the blocks."""
    squares = torch.zeros(-(-flat.numel() // block_size) * block_size, dtype=torch.float64, device=flat.device)
    squares[: flat.numel()] = flat.double().square_()
    per_block = _halved(squares.view(-1, block_size).t())
    width = 1 << max(len(per_block) - 1, 0).bit_length()
    return float(_halved(torch.nn.functional.pad(per_block, (0, width - len(per_block)))))


def _halved(rows: Tensor) -> Tensor:
    """The sum over the first dim, whose length is a power of two, as a tree."""
    while len(rows) > 1:
        half = len(rows) // 2
        rows = rows[:half] + rows[half:]
    return rows[0]


def _rounded_stochastically(values: Tensor, row: Row) -> Tensor:
    """fp32 to bf16, up with a probability of the distance from below; what bf16 can hold stays as it is."""
    bits = values.view(torch.int32)
    index = torch.arange(row.first, row.first + values.numel(), device=values.device)
    raised = (bits.long() + random16(index, row.key)).to(torch.int32)
    finite = values.isfinite()
    rounded = torch.where(finite, raised, bits) & -65536
    return torch.where(values.isnan(), values, rounded.view(torch.float32)).bfloat16()


def random16(index: Tensor, key: int) -> Tensor:
    """16 random bits per element: a hash of its index, keyed. int64 to int64."""
    low, high = index & _WORD, index >> 32
    once = _mixed(low ^ (key & _WORD))
    return _mixed(once ^ (((key >> 32) & _WORD) + high * 0x9E3779B9 & _WORD)) >> 16


_WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """A 32-bit hash with low bias, in int64 without overflow: halves are multiplied apart."""
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    return (((x >> 16) * factor & 0xFFFF) * 65536 + (x & 0xFFFF) * factor) & _WORD
