"""The update as a torch operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from holdfast.optim import AdamW8bit
from holdfast.optim.coefficients import Coefficients
from holdfast.optim.ops import OperatorEngine
from holdfast.optim.quantize import quantize_blockwise
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import RULES
from holdfast.optim.torch_engine import TorchEngine

_BY = Coefficients(step_size=0.1, beta1=0.9, blend1=0.1, beta2=0.99, blend2=0.01, eps=1e-8)


def _row(n: int, eight_bit: bool, device: str = "cpu") -> Row:
    values = torch.linspace(-1, 1, n), torch.linspace(0, 1, n)
    param, grad = torch.linspace(1, -1, n), torch.linspace(-2, 3, n)
    if not eight_bit:
        return Row(param, grad, [v.clone() for v in values], [], _BY)
    stored = [quantize_blockwise(v, signed, 64) for v, signed in zip(values, (True, False), strict=True)]
    return Row(param, grad, [c for c, _ in stored], [a for _, a in stored], _BY)


def _tensors(rows: list[Row]) -> list[Tensor]:
    return [t for row in rows for t in (row.param, *row.moments, *row.absmax)]


def _arguments(n: int) -> tuple[object, ...]:
    row = _row(n, eight_bit=True)
    numbers = [getattr(_BY, name) for name in Coefficients.__dataclass_fields__]
    return "adam", [row.param], [row.grad], row.moments, row.absmax, numbers, [0], [0], 64, True, False


def test_rows_of_both_widths_go_through_the_operator_with_the_same_bits() -> None:
    ours, theirs = ([_row(200, True), _row(130, False)] for _ in range(2))
    OperatorEngine().update(RULES["adam"], ours, Settings(64))
    TorchEngine().update(RULES["adam"], theirs, Settings(64))
    assert all(torch.equal(a, b) for a, b in zip(_tensors(ours), _tensors(theirs), strict=True))


def test_the_operator_keeps_what_its_schema_promises() -> None:
    torch.library.opcheck(torch.ops.holdfast.update.default, _arguments(200))


def test_a_compiled_function_traces_the_operator_without_a_break() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(param: Tensor, grad: Tensor, moments: list[Tensor], absmax: list[Tensor]) -> Tensor:
        numbers = [getattr(_BY, name) for name in Coefficients.__dataclass_fields__]
        torch.ops.holdfast.update("adam", [param], [grad * 1.0], moments, absmax, numbers, [0], [0], 64, True, False)
        return param * 2

    row, other = _row(200, True), _row(200, True)
    doubled = update(row.param, row.grad, list(row.moments), list(row.absmax))
    TorchEngine().update(RULES["adam"], [other], Settings(64))
    assert torch.equal(row.param, other.param) and torch.equal(doubled, other.param * 2)


def test_fake_tensors_are_checked_and_nothing_is_computed() -> None:
    with torch._subclasses.FakeTensorMode():
        row = Row(torch.empty(200), torch.empty(200), [torch.empty(200), torch.empty(200)], [], _BY)
        OperatorEngine().update(RULES["adam"], [row], Settings(64))
        assert row.param.shape == (200,)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Names, FlopCounterMode])
def test_a_step_is_the_operator_while_a_mode_looks_on_and_gives_the_same_bits(mode: type) -> None:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 5000)) for _ in range(2)]
    for param, watched in zip(params, (False, True), strict=True):
        optimizer = AdamW8bit([param])
        for _ in range(2):
            param.grad = torch.linspace(1, -1, 5000)
            if not watched:
                optimizer.step()
                continue
            looker = mode() if mode is _Names else mode(display=False)
            with looker:
                optimizer.step()
            if isinstance(looker, _Names):
                assert "holdfast.update.default" in looker.names
    assert torch.equal(*params)


def test_versions_of_what_is_written_are_counted() -> None:
    row = _row(200, True)
    before = [t._version for t in _tensors([row])]
    OperatorEngine().update(RULES["adam"], [row], Settings(64))
    assert all(t._version > version for t, version in zip(_tensors([row]), before, strict=True))
