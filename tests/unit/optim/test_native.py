"""The C++ kernels against the plain-torch path, bit for bit, and how they behave among threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.optim import AdamW8bit, native
from holdfast.optim import coefficients as coefficients_of
from holdfast.optim.coefficients import FIELDS, Coefficients
from holdfast.optim.quantize import codebook, dequantize_blockwise, quantize_blockwise
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import RULES, Norms
from holdfast.optim.torch_engine import TorchEngine

_ISAS = native.isas()
pytestmark = pytest.mark.skipif(not _ISAS, reason="the C++ kernels have not been built here")

_KERNELS = Path(native.__file__).parent / "kernels"
_GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


@pytest.fixture(params=_ISAS)
def engine(request: pytest.FixtureRequest) -> native.NativeEngine:
    return native.NativeEngine(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


def _randn(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def _around_every_threshold(signed: bool, ulps: int) -> Tensor:
    table = codebook(signed)
    middle = ((table[1:] + table[:-1]) / 2).view(torch.int32)
    near = torch.cat([middle + step for step in range(-ulps, ulps + 1)]).view(torch.float32)
    return near[near.abs() <= 1]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_around_every_threshold_are_those_of_the_table(engine: native.NativeEngine, signed: bool) -> None:
    x = torch.cat([_around_every_threshold(signed, 300), torch.ones(1)])
    x = x if signed else x.clamp_min(0)
    want, _ = quantize_blockwise(x, signed, x.numel())
    assert torch.equal(engine.encode(x, 1.0, signed, nonzero=False), want)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("largest", [1.0, 0.37, 3.0e7, 2.0**-99, 1e-31, 1e-42, 3e38])
def test_codes_of_any_scale_are_those_of_a_true_division(
    engine: native.NativeEngine, signed: bool, largest: float
) -> None:
    x = torch.cat([_around_every_threshold(signed, 4), torch.exp(4 * _randn(5001, 1)) * _randn(5001, 2).sign()])
    x = x if signed else x.abs()
    x = x / x.abs().max() * largest
    want, absmax = quantize_blockwise(x, signed, x.numel(), nonzero=not signed)
    assert torch.equal(engine.encode(x, absmax.item(), signed, nonzero=not signed), want)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_decodes_to_its_entry(engine: native.NativeEngine, signed: bool) -> None:
    codes = torch.arange(256).repeat(3)[:701].to(torch.uint8)
    want = dequantize_blockwise(codes, torch.tensor([0.7]), signed, 701)
    assert torch.equal(engine.decode(codes, torch.tensor(0.7).item(), signed), want)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_all_ratios_that_fp32_has_are_those_of_the_table(signed: bool) -> None:
    engines, first, last, step = [native.NativeEngine(isa) for isa in _ISAS], 96 << 23, (127 << 23) + 1, 1 << 22
    for start in range(first, last, step):
        ratios = torch.arange(start, min(start + step, last), dtype=torch.int32).view(torch.float32)
        for x in (ratios, -ratios) if signed else (ratios,):
            want, _ = quantize_blockwise(torch.cat([x, torch.ones(1)]), signed, len(x) + 1)
            assert all(torch.equal(engine.encode(x, 1.0, signed, nonzero=False), want[:-1]) for engine in engines)


def _row(rule: str, n: int, dtype: torch.dtype, eight_bit: bool, seed: int) -> Row:
    grad = _randn(n, seed) * torch.exp(3 * _randn(n, seed + 1))
    if n > 70:
        grad[[3, 70]] = torch.tensor([torch.nan, 1e30])
    signs = list(RULES[rule].moments.values())
    values = [_randn(n, seed + 2 + i) if signed else _randn(n, seed + 2 + i).square() for i, signed in enumerate(signs)]
    by = Coefficients(
        grad_scale=-0.5, l2=0.01, decay=0.999, step_size=0.01, beta1=0.9, blend1=0.1, beta2=0.99, blend2=0.01,
        beta3=0.999, blend3=0.001, eps=1e-8, root_scale=1.5, correction=2.0, mix=5.0, trust=0.7, weight_decay=0.1,
    )  # fmt: skip
    param = _randn(n, seed + 9).to(dtype)
    if not eight_bit:
        return Row(param, grad.to(dtype), values, [], by, first=1000, key=7)
    stored = [quantize_blockwise(v, signed, 64) for v, signed in zip(values, signs, strict=True)]
    return Row(param, grad.to(dtype), [c for c, _ in stored], [a for _, a in stored], by, first=1000, key=7)


def _clone(row: Row) -> Row:
    moments, absmax = [m.clone() for m in row.moments], [a.clone() for a in row.absmax]
    return Row(row.param.clone(), row.grad, moments, absmax, row.by, row.first, row.key)


def _bits(rows: list[Row]) -> list[bytes]:
    tensors = [t for row in rows for t in (row.param, *row.moments, *row.absmax)]
    return [t.view(torch.uint8).numpy().tobytes() for t in tensors]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_gives_the_bits_of_plain_torch(
    engine: native.NativeEngine, rule: str, dtype: torch.dtype, stochastic: bool
) -> None:
    sizes = (1, 63, 64, 257, 5000, 0)
    rows = [_row(rule, n, dtype, eight, 20 * i) for i, n in enumerate(sizes) for eight in (True, False)]
    others = [_clone(row) for row in rows]
    settings = Settings(64, stochastic_rounding=stochastic)
    before = _bits(rows)
    engine.update(RULES[rule], rows, settings)
    TorchEngine().update(RULES[rule], others, settings)
    assert _bits(rows) == _bits(others) != before


@pytest.mark.parametrize("rule", list(RULES))
def test_a_short_last_block_without_usable_gradients_keeps_every_bit(engine: native.NativeEngine, rule: str) -> None:
    rows = [_row(rule, n, torch.float32, eight, 5) for n in (513, 70) for eight in (True, False)]
    for row in rows:
        row.grad[-(row.grad.numel() % 64) :] = torch.nan
        row.by = replace(row.by, eps=1e-20)
    others = [_clone(row) for row in rows]
    engine.update(RULES[rule], rows, Settings(64))
    TorchEngine().update(RULES[rule], others, Settings(64))
    assert _bits(rows) == _bits(others)


@pytest.mark.parametrize("kind", list(Norms))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_plain_torch_to_the_last_bit(
    engine: native.NativeEngine, kind: Norms, dtype: torch.dtype
) -> None:
    rows = [_row("lamb", n, dtype, eight, n) for n in (1, 63, 300, 5000, 0) for eight in (True, False)]
    before = _bits(rows)
    assert engine.norms(kind, rows, Settings(64)) == TorchEngine().norms(kind, rows, Settings(64))
    assert _bits(rows) == before


def test_damaged_state_gives_wrong_numbers_and_no_crash(engine: native.NativeEngine) -> None:
    row = _row("adam", 1000, torch.float32, True, 0)
    row.moments[0].random_(0, 256)
    row.absmax[0][:4] = torch.tensor([torch.nan, torch.inf, -1.0, 1e-45])
    row.absmax[1][:4] = torch.tensor([torch.inf, torch.nan, 3e38, -3e38])
    for _ in range(3):
        engine.update(RULES["adam"], [row], Settings(64))
    assert torch.isfinite(row.param[4 * 64 :]).all()


def test_two_python_threads_may_step_at_the_same_time(two_threads: None) -> None:
    def trained(seed: int) -> Tensor:
        param = torch.nn.Parameter(_randn(300_000, seed))
        optimizer = AdamW8bit([param])
        for step in range(5):
            param.grad = _randn(300_000, 100 * seed + step)
            optimizer.step()
        return param.detach()

    alone = [trained(seed) for seed in (1, 2)]
    together: list[Tensor | None] = [None, None]

    def run(place: int) -> None:
        together[place] = trained(place + 1)

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert all(t is not None and torch.equal(t, a) for t, a in zip(together, alone, strict=True))


_FORK = """
import os, signal, torch
from holdfast.optim import AdamW8bit
p = torch.nn.Parameter(torch.linspace(-1, 1, 300_000)); o = AdamW8bit([p])
p.grad = torch.linspace(1, -1, 300_000)
torch.set_num_threads(2)  # torch itself must do nothing large from here on: its own threads do not survive a fork
def step():
    o.step(); return p[7].item()
step()
child = os.fork()
if child == 0:
    signal.alarm(20)
    print("child", step(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent", step())
"""


def test_a_forked_child_goes_on_with_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=50, check=True)
    (child, first), (parent, second) = (line.split() for line in done.stdout.splitlines())
    assert (child, parent) == ("child", "parent") and first == second


_WITHOUT = """
import torch
from dataclasses import replace
from pathlib import Path
from holdfast.optim import native
native.NATIVE = replace(native.NATIVE, path=Path("/nowhere/libholdfast_optim.so"))
from holdfast.optim import AdamW8bit
p = torch.nn.Parameter(torch.ones(5000)); o = AdamW8bit([p])
for _ in range(3):
    p.grad = torch.ones(5000); o.step()
print(native.isas(), p[0].item())
"""


def test_without_the_library_steps_are_plain_torch_and_that_is_said_once() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT], capture_output=True, text=True, timeout=50, check=True, env=env
    )
    assert done.stdout.startswith("[] 0.99")
    assert done.stderr.count("plain torch") == 1 and "/nowhere/libholdfast_optim.so" in done.stderr


def test_the_coefficients_are_in_the_order_of_the_c_interface() -> None:
    text = (_KERNELS / "abi.h").read_text().split("struct Coefficients {")[1].split("};")[0]
    lines = [line.split("//")[0].strip().removeprefix("float ").rstrip(";") for line in text.splitlines()]
    assert [name.strip() for line in lines if line for name in line.split(",")] == list(FIELDS)


def test_the_rules_and_norms_are_numbered_as_in_the_c_interface() -> None:
    text = (_KERNELS / "abi.h").read_text()
    names = [n.strip().lower() for n in text.split("enum : int32_t {\n")[1].split("RULES")[0].split(",") if n.strip()]
    assert {name: rule.native for name, rule in RULES.items()} == {name: at for at, name in enumerate(names)}
    assert "{ GRADIENT_NORM, PARAM_AND_GRADIENT, PARAM_AND_LAMB_DIRECTION }" in text
    assert [int(kind) for kind in Norms] == [0, 1, 2]


def test_coefficients_that_are_not_used_are_neutral() -> None:
    assert coefficients_of.lion(_GROUP, 1).root_scale == 1.0 and Coefficients().blend1 == 1.0
