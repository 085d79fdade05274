"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for devices that are not there.

The interpreter has to be chosen before Triton is imported, so one test runs the others in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from holdfast.optim.coefficients import Coefficients
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import RULES, Rule
from holdfast.optim.torch_engine import TorchEngine
from tests.support.engine_rows import SHAPES, at_thresholds, copied, differences, make_row, norms_of, spoil

_is_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
_interpreted = pytest.mark.skipif(not _is_interpreting, reason="runs inside test_the_kernels_in_the_interpreter")
_rules = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    # numpy on NaN, and on what is too large for float16
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(_is_interpreting, reason="it would run itself")
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def _compare(rule: Rule, rows: list[Row], settings: Settings) -> None:
    """Two updates, because the second reads what the first wrote."""
    from holdfast.optim.triton_engine import TritonEngine

    ours, theirs = copied(rows), copied(rows)
    for _ in range(2):
        TritonEngine().update(rule, ours, settings)
        TorchEngine().update(rule, theirs, settings)
        assert differences(ours, theirs) == []
    assert norms_of(TritonEngine(), rule, ours, settings) == norms_of(TorchEngine(), rule, theirs, settings)


@_interpreted
@_rules
@pytest.mark.parametrize(("block_size", "nonzero", "stochastic"), [(64, True, True), (256, False, False)])
def test_rows_of_every_kind_in_one_call(rule: Rule, block_size: int, nonzero: bool, stochastic: bool) -> None:
    rows = [make_row(rule, shape, block_size, seed) for seed, shape in enumerate(SHAPES)]
    _compare(rule, rows, Settings(block_size, nonzero, stochastic))


@_interpreted
@_rules
def test_gradients_that_cannot_be_used(rule: Rule) -> None:
    rows = [spoil(make_row(rule, shape, 64, seed), 64) for seed, shape in enumerate(SHAPES, 1)]
    _compare(rule, rows, Settings(64, stochastic_rounding=True))


@_interpreted
@pytest.mark.parametrize("block_size", [1024, 4096])
def test_blocks_of_a_tile_and_larger(block_size: int) -> None:
    rows = [make_row(RULES["lamb"], replace(SHAPES[0], elements=n), block_size, n) for n in (4096, 4097, 9216)]
    _compare(RULES["lamb"], rows, Settings(block_size))


@_interpreted
@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_moments_at_every_border_between_two_codes(name: str) -> None:
    rule, grad = RULES[name], at_thresholds(signed=name == "sgd")
    row = make_row(rule, replace(SHAPES[0], elements=len(grad)), 64, 0)
    row.grad, row.by = grad, Coefficients(step_size=0.1, eps=1e-3)  # the new moment is the gradient, or its square
    for nonzero in (True, False):
        _compare(rule, [row], Settings(64, nonzero))


@_interpreted
def test_tensors_that_start_between_two_words() -> None:
    from holdfast.optim.triton_engine import TritonEngine

    ours, theirs = [[make_row(RULES["adam"], replace(SHAPES[0], elements=576), 64, 1)] for _ in range(2)]
    for name in ("param", "grad"):
        setattr(ours[0], name, torch.cat([torch.zeros(1), getattr(ours[0], name)])[1:])
    TritonEngine().update(RULES["adam"], ours, Settings(64))
    TorchEngine().update(RULES["adam"], theirs, Settings(64))
    assert differences(ours, theirs) == []


@_interpreted
def test_no_rows_at_all() -> None:
    _compare(RULES["adam"], [], Settings(256))


_SIGNATURE = {"table": "*i64", "coefficients": "*fp32", "row_of_tile": "*i32", "books": "*fp32"}


@pytest.mark.timeout(300)
@pytest.mark.skipif(_is_interpreting, reason="the interpreter compiles nothing")
@_rules
def test_no_instruction_rounds_twice_or_flushes(rule: Rule) -> None:
    """Nothing fused, nothing approximate, no subnormal number flushed; and aligned rows are moved in wide words."""
    ptx = _ptx(rule)
    assert re.findall(r"\b\S*(?:fma|\.ftz|\.approx|\.full)\S*", ptx) == []
    assert re.search(r"ld\.global\S*\.v4", ptx)


def _ptx(rule: Rule) -> str:
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from holdfast.optim.triton_kernels import update_tiles

    signed = sum(is_signed << number for number, is_signed in enumerate(rule.moments.values()))
    constants = {
        "RULE": rule.native, "SIGNED": signed, "MOMENTS": len(rule.moments), "PARAM": 1, "GRAD": 0, "IS_8BIT": True,
        "ALIGNED": True, "NONZERO": True, "STOCHASTIC": True, "BLOCK": 256, "ROWS": 4,
    }  # fmt: skip
    takes_all = "constexprs" in compiler.ASTSource.__init__.__code__.co_varnames  # from Triton 3.3 on
    signature = {**_SIGNATURE, **dict.fromkeys(constants, "constexpr")} if takes_all else _SIGNATURE
    source = compiler.ASTSource(update_tiles, signature, constants)
    options = {"enable_fp_fusion": False, "num_warps": 4}
    return str(compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
