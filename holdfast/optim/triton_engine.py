"""The kernels of ``triton_kernels.py`` as an engine for CUDA. Compiles on first use; ``problem_on`` tells if it can.

Rows that agree in dtypes, in the width of their moments and in alignment are updated by one launch: a table on the
device names the tensors of each row, and the grid covers them all. Parameters, moments, codes and scales get the bits
of ``torch_engine.py`` and of the C++ kernels, however many rows share a launch, but for one thing: which bits a NaN has
is not promised. Every operation is rounded once and by the same rule (IEEE 754, subnormal numbers kept, nothing fused),
and an 8-bit code is settled by a comparison with its exact threshold.

``norms`` agrees bit for bit as well. Blocks are summed within a kernel by halving and the blocks of a row by halving in
torch, all rows whose number of blocks needs the same power of two together; one read brings all sums back.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, chain
from operator import attrgetter

import torch
from torch import Tensor

from holdfast.optim import triton_kernels
from holdfast.optim.coefficients import FIELDS, Coefficients
from holdfast.optim.quantize import block_count, codebook
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import RULES, Norms, Rule
from holdfast.optim.table import RowTable

__all__ = ["TritonEngine", "problem_on"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbered as in ``triton_kernels.py``."""
_TILE, _PER_THREAD = 1024, 8
"""Elements of a program, unless a block is larger, and of a thread. By the registers that ``ptxas`` counts for AdamW:
about 100 here, 180 with twice as many per thread."""
_ALIGNMENT = 16
"""Bytes, and elements, that a wide load needs."""


class TritonEngine:
    """See ``Engine``."""

    def update(self, rule: Rule, rows: Sequence[Row], settings: Settings) -> None:
        signed = sum(is_signed << number for number, is_signed in enumerate(rule.moments.values()))
        for launch in _call(rows, settings.block_size).launches:
            with _current(launch.device):
                triton_kernels.update_tiles[launch.grid](
                    *launch.arguments(),
                    RULE=rule.native,
                    SIGNED=signed,
                    MOMENTS=len(rule.moments),
                    NONZERO=settings.nonzero_second_moment,
                    STOCHASTIC=settings.stochastic_rounding,
                    **launch.constants(settings.block_size),
                )

    def norms(self, kind: Norms, rows: Sequence[Row], settings: Settings) -> list[tuple[float, float]]:
        if not rows:
            return []
        call = _call(rows, settings.block_size)
        sums = torch.zeros(2, sum(call.widths), dtype=torch.float64, device=rows[0].param.device)
        for launch in call.launches:
            with _current(launch.device):
                triton_kernels.block_sums[launch.grid](
                    *launch.arguments(),
                    *sums,
                    KIND=int(kind),
                    LEVELS=settings.block_size.bit_length() - 1,
                    **launch.constants(settings.block_size),
                )
        totals = dict(zip(call.order, _sums_of_rows(sums, [call.widths[n] for n in call.order]), strict=True))
        return [totals[number] for number in range(len(rows))]


def problem_on(device: torch.device) -> str | None:
    """Why kernels do not run on this device, by trying one; None when they do. Compiling it takes a second."""
    if not triton_kernels.HAS_TRITON:
        return "Triton is not installed"
    one = torch.ones(16, device=device)
    row = Row(one, torch.ones_like(one), (), (), Coefficients(step_size=1.0))
    try:
        TritonEngine().update(RULES["plain_sgd"], [row], Settings(block_size=64))
        return None if not one.any() else "a trial update gave a wrong result"
    except Exception as error:  # a compiler runs in there; whatever it threw, there is another engine
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the rows of one launch have in common: the kernel is compiled for it."""

    param_type: int
    grad_type: int
    is_8bit: bool
    is_aligned: bool


class _Launch:
    """One launch of a kernel: some rows of a call as numbers."""

    def __init__(self, kind: _Kind, rows: Mapping[int, Row], places: Mapping[int, int], block_size: int) -> None:
        self.kind, self.numbers, self.device = kind, list(rows), next(iter(rows.values())).param.device
        tile = block_size * _blocks_per_tile(block_size)
        self._tiles = tuple(-(-row.param.numel() // tile) for row in rows.values())
        self._table, self._scalars = array("q"), array("f")
        for (number, row), first_tile in zip(rows.items(), accumulate(self._tiles, initial=0), strict=False):
            self._table.extend(_fields(row, first_tile, places[number]))

    @property
    def grid(self) -> tuple[int]:
        return (sum(self._tiles),)

    def renew(self, addresses: Sequence[int], by: Sequence[Coefficients], keys: Sequence[int]) -> bool:
        """Take what varies from step to step, of all rows of the call. False where alignment has been lost."""
        mine = [by[number] for number in self.numbers]
        index = {one: position for position, one in enumerate({id(each): None for each in mine})}
        self._table[_GRAD::_WIDTH] = array("q", [addresses[number] for number in self.numbers])
        self._table[_KEY::_WIDTH] = array("q", [keys[number] for number in self.numbers])
        self._table[_COEFFICIENTS::_WIDTH] = array("q", [index[id(each)] for each in mine])
        self._scalars = array("f", chain.from_iterable(map(_scalars, {id(each): each for each in mine}.values())))
        return not self.kind.is_aligned or not any(addresses[number] % _ALIGNMENT for number in self.numbers)

    def arguments(self) -> tuple[Tensor, ...]:
        """The tensors that both kernels begin with. The scalars go behind the table, so that one copy brings both."""
        numbers = array("q", self._table)
        numbers.frombytes(self._scalars.tobytes())
        on_device, cut = _uploaded(numbers, self.device), len(self._table)
        scalars = on_device[cut:].view(torch.float32)
        return on_device[:cut], scalars, _row_of_tile(self._tiles, self.device), _books(self.device)

    def constants(self, block_size: int) -> dict[str, int | bool]:
        return {
            "PARAM": self.kind.param_type,
            "GRAD": self.kind.grad_type,
            "IS_8BIT": self.kind.is_8bit,
            "ALIGNED": self.kind.is_aligned,
            "BLOCK": block_size,
            "ROWS": _blocks_per_tile(block_size),
            "num_warps": max(block_size, _TILE) // (32 * _PER_THREAD),
            "enable_fp_fusion": False,
        }


class _Call:
    """The rows of one call of the engine, by launches, and where their sums go."""

    def __init__(self, rows: Sequence[Row], block_size: int) -> None:
        self.widths = [_power_of_two(block_count(row.param.numel(), block_size)) for row in rows]
        self.order = sorted(range(len(rows)), key=self.widths.__getitem__)
        places = dict(zip(self.order, accumulate((self.widths[n] for n in self.order), initial=0), strict=False))
        kinds: dict[_Kind, dict[int, Row]] = {}
        for number, row in enumerate(rows):
            if row.param.numel():
                kinds.setdefault(_kind(row), {})[number] = row
        self.launches = [_Launch(kind, some, places, block_size) for kind, some in kinds.items()]
        self.renew([row.grad for row in rows], [row.by for row in rows], [row.key for row in rows])

    def renew(self, grads: Sequence[Tensor], by: Sequence[Coefficients], keys: Sequence[int]) -> bool:
        """Go to another step. False where this step's gradients need other kernels."""
        addresses = [grad.data_ptr() for grad in grads]
        return all(launch.renew(addresses, by, keys) for launch in self.launches)


def _call(rows: Sequence[Row], block_size: int) -> _Call:
    """Kept with a table: to read its tensors anew would take longer than to update them."""
    if not isinstance(rows, RowTable):
        return _Call(rows, block_size)
    if not isinstance(rows.prepared, _Call) or not rows.prepared.renew(rows.grads, rows.by, rows.keys):
        rows.prepared = _Call(rows, block_size)
    return rows.prepared


def _kind(row: Row) -> _Kind:
    tensors = (row.param, row.grad, *row.moments, *row.absmax)
    odd = row.param.numel() % _ALIGNMENT or any(tensor.data_ptr() % _ALIGNMENT for tensor in tensors)
    return _Kind(_TYPES[row.param.dtype], _TYPES[row.grad.dtype], bool(row.absmax), not odd)


_GRAD, _KEY, _COEFFICIENTS, _WIDTH = 1, 11, 13, 14
"""Where a row of the table has what varies from step to step, and its length."""
_scalars = attrgetter(*FIELDS)


def _fields(row: Row, first_tile: int, place: int) -> tuple[int, ...]:
    """In the order of the fields of ``triton_kernels.py``."""
    addresses = []
    for tensors in (row.moments, row.absmax):
        addresses += [tensor.data_ptr() for tensor in tensors] + [0] * (3 - len(tensors))
    numbers = (row.param.numel(), first_tile, row.first, 0, place, 0)
    return (row.param.data_ptr(), 0, *addresses, *numbers)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _uploaded(table: array[int], device: torch.device) -> Tensor:
    """Through pinned memory: a copy from any other would wait for all that the device still has to do."""
    host = torch.frombuffer(table, dtype=torch.int64)
    return host.clone() if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=16)
def _row_of_tile(tiles: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [tiles]. The same in every step, as long as the same tensors have gradients."""
    return torch.repeat_interleave(torch.tensor(tiles, device="cpu")).to(device, torch.int32)


@cache
def _books(device: torch.device) -> Tensor:
    """fp32 [2 x 512], unsigned first: entries by code, then by magnitude code the largest ratio that still gets it."""
    return torch.cat([numbers for signed in (False, True) for numbers in _book(signed)]).to(device)


def _book(signed: bool) -> tuple[Tensor, Tensor]:
    values = codebook(signed)
    magnitudes = values[values >= 0]
    thresholds = torch.full_like(values, torch.inf)
    thresholds[: len(magnitudes) - 1] = (magnitudes[1:] + magnitudes[:-1]) / 2
    return values, thresholds


def _sums_of_rows(sums: Tensor, widths: Sequence[int]) -> list[tuple[float, float]]:
    """Shapes: fp64 ``[2, sum of widths]``, rows in ascending order of their widths, which are powers of two."""
    found, at = [], 0
    for width in sorted(set(widths)):
        count = widths.count(width)
        found.append(_halved(sums[:, at : at + count * width].view(2, count, width)))
        at += count * width
    firsts, seconds = torch.cat(found, 1).tolist()
    return list(zip(firsts, seconds, strict=True))


def _halved(x: Tensor) -> Tensor:
    """The sum over the last dim, as a tree."""
    while x.shape[-1] > 1:
        low, high = x.chunk(2, -1)
        x = low + high
    return x[..., 0]


def _blocks_per_tile(block_size: int) -> int:
    return max(_TILE // block_size, 1)


def _power_of_two(count: int) -> int:
    """The smallest that is not below ``count``."""
    return 1 << max(count - 1, 0).bit_length()
