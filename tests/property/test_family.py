"""Laws that every optimizer of the family keeps, whatever its options, its tensors and the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import holdfast.optim
from holdfast.optim import codebook, native
from tests.support.optim_reference import REFERENCES, Quantiser

_law = settings(deadline=None, max_examples=30)  # a busy machine is no counter-example
_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_TABLES = {signed: codebook(signed).tolist() for signed in (True, False)}
_F64 = npt.NDArray[np.float64]
_NORMLESS = [kind for kind in REFERENCES if kind not in ("LAMB", "LARS")]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BETA = st.sampled_from([0.5, 0.9, 0.99])
_SOMETIMES = st.sampled_from([0.0, 0.1])
_SPECIAL: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "AdamW": {"betas": st.tuples(_BETA, _BETA), "eps": st.sampled_from([1e-8, 1e-3])},
    "Adam": {"betas": st.tuples(_BETA, _BETA), "eps": st.sampled_from([1e-8, 1e-3])},
    "LAMB": {"betas": st.tuples(_BETA, _BETA)},
    "Lion": {"betas": st.tuples(_BETA, _BETA)},
    "AdEMAMix": {"betas": st.tuples(_BETA, _BETA, st.just(0.999)), "t_alpha": st.sampled_from([None, 2])},
    "SGD": {"momentum": _BETA, "nesterov": st.booleans()},
    "LARS": {"momentum": _BETA, "dampening": _SOMETIMES},
    "RMSprop": {"alpha": _BETA, "momentum": st.sampled_from([0.0, 0.9]), "centered": st.booleans()},
    "Adagrad": {"lr_decay": _SOMETIMES, "initial_accumulator_value": _SOMETIMES},
}


@dataclass(frozen=True)
class _Run:
    """A few steps of one optimizer, up to the tensors."""

    name: str
    options: dict[str, Any]
    seed: int
    scale: float
    """Of the gradients, as a power of ten."""
    dtype: torch.dtype = torch.float32
    steps: int = 3

    def randn(self, *shape: int, at: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + at))

    def start(self, *shape: int) -> Tensor:
        return self.randn(*shape).to(self.dtype)

    def grads(self, *shape: int) -> list[Tensor]:
        """Over many orders of magnitude, with some exact zeros; finite in ``dtype``."""
        return [self._grad(t, shape) for t in range(1, self.steps + 1)]

    def _grad(self, t: int, shape: tuple[int, ...]) -> Tensor:
        size = torch.exp(2 * self.randn(*shape, at=t + 50)) * 10**self.scale
        largest = torch.finfo(self.dtype).max
        grad = (self.randn(*shape, at=t) * size).clamp(-largest, largest)
        return (grad * (self.randn(*shape, at=t + 90) > -1.3)).to(self.dtype)

    def train(self, starts: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> list[dict[str, Tensor]]:
        """Each parameter, under "param", and its state after one step per row of ``grads``."""
        params = [torch.nn.Parameter(start.clone(memory_format=torch.preserve_format)) for start in starts]
        optimizer = getattr(holdfast.optim, self.name)(params, **self.options)
        for row in grads:
            for param, grad in zip(params, row, strict=True):
                param.grad = grad
            optimizer.step()
        return [
            {"param": param.detach(), **{k: v for k, v in optimizer.state[param].items() if k != "step"}}
            for param in params
        ]


@st.composite
def _runs(
    draw: st.DrawFn,
    kinds: Sequence[str] = tuple(REFERENCES),
    bits: Sequence[str] = ("", "8bit"),
    dtypes: Sequence[torch.dtype] = _DTYPES,
    scales: tuple[float, float] = (-12, 12),
) -> _Run:
    kind, suffix, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(bits)), draw(st.sampled_from(dtypes))
    options = {
        "lr": draw(st.sampled_from([1e-3, 1e-2])),
        "weight_decay": draw(_SOMETIMES),
        "maximize": draw(st.booleans()),
        "block_size": draw(st.sampled_from(_BLOCK_SIZES)),
        "min_8bit_size": 0,
        "nonzero_second_moment": draw(st.booleans()),
        **{key: draw(values) for key, values in _SPECIAL[kind].items()},
    }
    return _Run(kind + suffix, options, draw(st.integers(0, 2**32)), draw(st.floats(*scales)), dtype)


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """To the bit; NaN is never the same."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@_law
@given(run=_runs(_NORMLESS), n=st.integers(1, 3000), cut=st.integers(0, 40))
def test_a_tensor_cut_on_a_block_boundary_trains_to_the_same_bits(run: _Run, n: int, cut: int) -> None:
    start, grads, at = run.start(n), run.grads(n), min(cut * run.options["block_size"], n)
    (whole,) = run.train([start], [[g] for g in grads])
    left, right = run.train([start[:at], start[at:]], [[g[:at], g[at:]] for g in grads])
    assert _same(whole, {key: torch.cat([left[key], right[key]]) for key in whole})


@_law
@given(run=_runs(), n=st.integers(1, 1000), padding=st.integers(1, 500))
def test_zero_padding_stays_zero_and_changes_nothing_before_it(run: _Run, n: int, padding: int) -> None:
    start, grads = run.start(n), run.grads(n)
    (plain,) = run.train([start], [[g] for g in grads])
    (padded,) = run.train(
        [torch.cat([start, start.new_zeros(padding)])], [[torch.cat([g, g.new_zeros(padding)])] for g in grads]
    )
    assert (padded["param"][n:] == 0).all()
    if run.name.removesuffix("8bit") in _NORMLESS:  # else the order of summation may move a norm by a rounding
        assert _same({key: padded[key][: len(plain[key])] for key in plain}, plain)


@_law
@given(run=_runs(), sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=3), clipping=st.sampled_from([100, 50]))
def test_two_threads_leave_the_same_bits_as_one(run: _Run, sizes: list[int], clipping: int) -> None:
    run = replace(run, options={**run.options, "percentile_clipping": clipping}, steps=2)
    starts, grads = [run.start(n) for n in sizes], list(zip(*(run.grads(n) for n in sizes), strict=True))
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run.train(starts, grads)
        torch.set_num_threads(2)
        assert all(map(_same, run.train(starts, grads), alone))
    finally:
        torch.set_num_threads(usual)


@_law
@given(run=_runs(bits=["8bit"], dtypes=[torch.float32]), n=st.integers(1, 1500))
def test_codes_decode_to_within_half_a_code_step_of_the_exact_moment(run: _Run, n: int) -> None:
    # Without differences of numbers that nearly agree, so that double precision tells what fp32 must come close to.
    run = replace(
        run, options={**run.options, "weight_decay": 0.0} | ({"momentum": 0.0} if run.options.get("centered") else {})
    )
    quantiser = Quantiser(_TABLES, run.options["block_size"], run.options["nonzero_second_moment"])
    param = torch.nn.Parameter(run.start(n))
    optimizer = getattr(holdfast.optim, run.name)([param], **run.options)
    for t, grad in enumerate(run.grads(n)):
        options = optimizer.param_groups[0]
        truth = REFERENCES[run.name.removesuffix("8bit")](param.detach().double().numpy(), options)
        truth.t = t
        if t:
            truth.moments = {m: _decoded(quantiser, optimizer.state[param], m, s)[0] for m, s in truth.signed.items()}
        before, param.grad = truth.moments.copy(), grad
        optimizer.step()
        truth.step((-grad if run.options["maximize"] else grad).double().numpy())
        for name, signed in truth.signed.items():
            decoded, absmax = _decoded(quantiser, optimizer.state[param], name, signed)
            exact = truth.exact[name]
            best = _distance_to_the_nearest_entry(exact, absmax, signed, quantiser.nonzero)
            roundings = 2.0**-20 * (np.abs(decoded) + np.abs(exact) + np.abs(before[name])) + 2.0**-148
            assert (np.abs(decoded - exact) <= best + roundings).all(), (name, t)


def _decoded(quantiser: Quantiser, state: dict[str, Any], name: str, signed: bool) -> tuple[_F64, _F64]:
    """A moment, and per element the absmax of its block."""
    codes, absmax = state[f"{name}_codes"].numpy(), state[f"{name}_absmax"].numpy()
    per_element = np.repeat(absmax.astype(np.float64), quantiser.block_size)[: len(codes)]
    return quantiser.decode(codes, absmax, signed), per_element


def _distance_to_the_nearest_entry(exact: _F64, absmax: _F64, signed: bool, nonzero: bool) -> _F64:
    """Half a code step at most. A second moment that must not become 0 has no entry there."""
    apart = np.abs(np.array(_TABLES[signed]) * absmax[:, None] - exact[:, None])
    lifted = (exact > 0) & (nonzero and not signed)
    return np.where(lifted, apart[:, 1:].min(1), apart.min(1))


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "in the middle of a buffer": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
}


@_law
@given(
    run=_runs(),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    layouts=st.tuples(*[st.sampled_from(list(_LAYOUTS))] * 2),
)
def test_strides_change_no_bit(run: _Run, rows: int, columns: int, layouts: tuple[str, str]) -> None:
    start, grads = run.start(rows, columns), run.grads(rows, columns)
    (plain,) = run.train([start], [[g] for g in grads])
    of_param, of_grad = (_LAYOUTS[layout] for layout in layouts)
    param = torch.nn.Parameter(of_param(start))
    optimizer = getattr(holdfast.optim, run.name)([param], **run.options)
    for grad in grads:
        param.grad = of_grad(grad)
        optimizer.step()
    assert _same({"param": param.detach(), **{k: v for k, v in optimizer.state[param].items() if k != "step"}}, plain)


@pytest.mark.parametrize("isa", native.isas() or [None])
@_law
@given(
    run=_runs(scales=(-30, 18)),
    shapes=st.lists(st.sampled_from([(0,), (), (7,), (64,), (33, 41), (257, 3), (4111,)]), min_size=1, max_size=3),
    clipping=st.sampled_from([100, 30]),
    stochastic=st.booleans(),
    bad=st.sampled_from([None, torch.nan, torch.inf, 1e30]),
)
def test_native_kernels_leave_the_bits_of_the_torch_path(
    isa: str | None, run: _Run, shapes: list[tuple[int, ...]], clipping: int, stochastic: bool, bad: float | None
) -> None:
    if isa is None:
        pytest.skip("the library of native kernels is not built or not usable on this machine")
    more = {"percentile_clipping": clipping, "stochastic_rounding": stochastic, "seed": run.seed}
    run = replace(run, options={**run.options, **more})
    grads = [run.grads(*shape) for shape in shapes]
    if bad is not None:
        for grad in grads[0]:
            grad.view(-1)[::5] = torch.tensor(bad).to(grad.dtype)
    rows, starts = list(zip(*grads, strict=True)), [run.start(*shape) for shape in shapes]
    with native.using(None):
        truth = run.train(starts, rows)
    with native.using(isa):
        assert all(map(_same, run.train(starts, rows), truth))
