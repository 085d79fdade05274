"""The C++ kernels: found, bound by ctypes, called with a table of pointers. Needs torch and the built library.

``kernels/`` is compiled into one library when the package is installed (``build_kernels.py``) and ships in wheels. The
instruction set is chosen at run time; all give the same bits.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import chain, repeat
from operator import attrgetter, is_

import torch
from torch import Tensor

from holdfast.errors import InvariantViolation
from holdfast.native_build import IsaChoice
from holdfast.optim.build_kernels import NATIVE
from holdfast.optim.coefficients import FIELDS, Coefficients
from holdfast.optim.quantize import codebook
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import Norms, Rule
from holdfast.optim.table import RowTable
from holdfast.optim.torch_engine import TorchEngine

__all__ = ["NativeEngine", "cpu_engine", "isas", "using"]

_log = logging.getLogger(__name__)

_ISAS = NATIVE.isas
"""From slow to fast, numbered as in ``dispatch.h``."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_NO_POINTERS = (0, 0, 0)


class _Options(ctypes.Structure):
    _fields_ = (
        ("block_size", ctypes.c_int32),
        ("nonzero_second_moment", ctypes.c_int32),
        ("stochastic_rounding", ctypes.c_int32),
    )


class NativeEngine:
    """See ``Engine``. Rows that hold float16 go to ``TorchEngine``."""

    def __init__(self, isa: str) -> None:
        self._isa = _ISAS.index(isa)
        self._other = TorchEngine()

    def update(self, rule: Rule, rows: Sequence[Row], settings: Settings) -> None:
        fit = _fit(rows)
        if len(fit) < len(rows):
            self._other.update(rule, [row for row in rows if not _is_fit(row)], settings)
        table, coefficients = _table(fit)
        code = _library().holdfast_update(
            self._isa,
            rule.native,
            _address(table),
            len(fit),
            _address(coefficients),
            ctypes.byref(_options(settings)),
            torch.get_num_threads(),
        )
        _check(code)

    def norms(self, kind: Norms, rows: Sequence[Row], settings: Settings) -> list[tuple[float, float]]:
        if len(_fit(rows)) < len(rows):
            return self._other.norms(kind, rows, settings)
        table, coefficients = _table(rows)
        sums = array("d", bytes(16 * len(rows)))
        code = _library().holdfast_norms(
            self._isa,
            int(kind),
            _address(table),
            len(rows),
            _address(coefficients),
            ctypes.byref(_options(settings)),
            torch.get_num_threads(),
            _address(sums),
        )
        _check(code)
        return list(zip(sums[::2], sums[1::2], strict=True))

    def encode(self, x: Tensor, absmax: float, signed: bool, nonzero: bool) -> Tensor:
        """The codes of one block's values. For tests of the codecs alone. Shapes: fp32 [n] to uint8 [n]."""
        codes = torch.empty(x.numel(), dtype=torch.uint8)
        _check(
            _library().holdfast_encode(
                self._isa, x.data_ptr(), x.numel(), absmax, int(signed), int(nonzero), codes.data_ptr()
            )
        )
        return codes

    def decode(self, codes: Tensor, absmax: float, signed: bool) -> Tensor:
        """The values of one block's codes. For tests of the codecs alone. Shapes: uint8 [n] to fp32 [n]."""
        x = torch.empty(codes.numel())
        _check(
            _library().holdfast_decode(self._isa, codes.data_ptr(), codes.numel(), absmax, int(signed), x.data_ptr())
        )
        return x


def cpu_engine() -> NativeEngine | TorchEngine:
    """The fastest engine that this machine has for CPU tensors."""
    return _engine(_choice.current())


@cache
def _engine(isa: str | None) -> NativeEngine | TorchEngine:
    return TorchEngine() if isa is None else NativeEngine(isa)


@cache
def _best() -> str | None:
    """The fastest instruction set that can be used; None without the library."""
    if usable := isas():
        return usable[-1]
    _log.warning(
        "%s: optimizer steps take plain torch operations, many times slower on a CPU, with the same results. "
        "`python -m holdfast.optim.build_kernels` builds it, or says why not.",
        _loaded(),
    )
    return None


_choice = IsaChoice(_best)
using = _choice.using
"""``with using(isa)``: CPU updates use this instruction set, or plain torch for None. For tests and measurements."""


def isas() -> list[str]:
    """Instruction sets that both the library and this processor have, from slow to fast; none without the library."""
    return NATIVE.usable(_loaded())


def _library() -> ctypes.CDLL:
    library = _loaded()
    if isinstance(library, str):
        raise InvariantViolation(library)
    return library


@cache
def _loaded() -> ctypes.CDLL | str:
    """The library, ready for calls, or why it cannot be used."""
    library = NATIVE.load()
    if isinstance(library, str):
        return library
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.holdfast_update.argtypes = [int32, int32, pointer, int64, pointer, pointer, int64]
    library.holdfast_norms.argtypes = [int32, int32, pointer, int64, pointer, pointer, int64, pointer]
    library.holdfast_encode.argtypes = [int32, pointer, int64, ctypes.c_float, int32, int32, pointer]
    library.holdfast_decode.argtypes = [int32, pointer, int64, ctypes.c_float, int32, pointer]
    library.holdfast_set_codebooks.argtypes = [pointer, pointer]
    signed, unsigned = codebook(True), codebook(False)
    library.holdfast_set_codebooks(signed.data_ptr(), unsigned.data_ptr())
    return library


def _is_fit(row: Row) -> bool:
    return row.param.dtype in _TYPES and row.grad.dtype in _TYPES


def _fit(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows whose dtypes the kernels know; a table of which all are known stays one."""
    if isinstance(rows, RowTable) and rows.prepared is not None:
        return rows
    fit = [row for row in rows if _is_fit(row)]
    return rows if len(fit) == len(rows) else fit


def _table(rows: Sequence[Row]) -> tuple[array[int], array[float]]:
    """The rows as ``Row`` of ``kernels/abi.h``, and the distinct coefficients."""
    if not isinstance(rows, RowTable):
        return _numbers(rows)
    if not isinstance(rows.prepared, array):
        rows.prepared, coefficients = _numbers(rows)
        return rows.prepared, coefficients
    table, first = rows.prepared, rows.by[0]
    table[_GRAD::_WIDTH] = array("q", map(Tensor.data_ptr, rows.grads))
    table[_KEY::_WIDTH] = array("q", rows.keys)
    if all(map(is_, rows.by, repeat(first))):
        table[_COEFFICIENTS::_WIDTH] = array("q", bytes(8 * len(rows)))
        return table, array("f", _scalars(first))
    known = {id(by): by for by in rows.by}
    index = {one: number for number, one in enumerate(known)}
    table[_COEFFICIENTS::_WIDTH] = array("q", [index[id(by)] for by in rows.by])
    return table, array("f", chain.from_iterable(map(_scalars, known.values())))


_GRAD, _COEFFICIENTS, _KEY, _WIDTH = 1, 12, 14, 15
"""Where ``Row`` of ``kernels/abi.h`` has what varies from step to step, and its length, in 8 bytes."""
_scalars = attrgetter(*FIELDS)


def _numbers(rows: Sequence[Row]) -> tuple[array[int], array[float]]:
    known: dict[Coefficients, int] = {}
    table = array("q")
    for row in rows:
        moments = [moment.data_ptr() for moment in row.moments]
        absmax = [scale.data_ptr() for scale in row.absmax]
        table.extend(
            (
                row.param.data_ptr(),
                row.grad.data_ptr(),
                *moments,
                *_NO_POINTERS[len(moments) :],
                *absmax,
                *_NO_POINTERS[len(absmax) :],
                row.param.numel(),
                _TYPES[row.param.dtype],
                _TYPES[row.grad.dtype],
                bool(absmax),
                known.setdefault(row.by, len(known)),
                row.first,
                row.key,
            )
        )
    return table, array("f", chain.from_iterable(map(_scalars, known)))


def _options(settings: Settings) -> _Options:
    return _Options(settings.block_size, settings.nonzero_second_moment, settings.stochastic_rounding)


def _address(numbers: array[int] | array[float]) -> int:
    return numbers.buffer_info()[0]


def _check(code: int) -> None:
    if code == -2:
        raise MemoryError("no memory for the table of an optimizer step; nothing has been changed")
    if code:
        raise InvariantViolation(f"the optimizer library refused a call with {code}")
