"""Every optimizer in 32 and 8 bits: against double precision, against torch, and on what it must leave alone."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import holdfast.optim
from holdfast.errors import ConfigurationError
from holdfast.optim import AdamW, AdamW8bit, RMSprop8bit, codebook, dequantize_blockwise
from tests.support.optim_reference import REFERENCES, Quantiser, Reference, clip_factor, nearest_codes

Options = dict[str, Any]

_KINDS = list(REFERENCES)
_EIGHT = [f"{kind}8bit" for kind in _KINDS]
_ALL = _KINDS + _EIGHT
_WITH_A_TRUST_RATIO = ("LAMB", "LARS")
_DECOUPLED = ("AdamW", "Lion", "AdEMAMix")
_BLOCK = 64
_ULP = 2.0**-23
_TABLES = {signed: codebook(signed).tolist() for signed in (True, False)}

_every = pytest.mark.parametrize("name", _ALL)
_every_8bit = pytest.mark.parametrize("name", _EIGHT)

_CASES: list[tuple[str, Options]] = [
    ("AdamW", {}),
    ("AdamW", {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}),
    ("Lion", {}),
    ("Lion", {"lr": 3e-3, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 3e-2, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 1e-3, "momentum": 0.9}),
    ("RMSprop", {"lr": 1e-3, "alpha": 0.95, "centered": True}),
    ("RMSprop", {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.8, "centered": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3}),
    ("LAMB", {}),
    ("LAMB", {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("LARS", {}),
    ("LARS", {"lr": 1.0, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05, "trust_coefficient": 0.02}),
    ("LARS", {"lr": 1.0, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05, "trust_coefficient": 0.02}),
    ("LARS", {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.05, "trust_coefficient": 0.02}),
    ("AdEMAMix", {}),
    (
        "AdEMAMix",
        {
            "lr": 1e-2, "betas": (0.8, 0.9, 0.99), "alpha": 3.0, "t_alpha": 20, "t_beta3": 25, "eps": 1e-3,
            "weight_decay": 0.1,
        },
    ),
]  # fmt: skip


def _words(case: Any) -> str | None:
    return " ".join(f"{k}={v}" for k, v in case.items()) or "defaults" if isinstance(case, dict) else None


def _has_8bit_form(case: tuple[str, Options]) -> bool:
    kind, options = case
    return not (kind == "SGD" and not options.get("momentum")) and options.get("momentum") != 0.0


_cases = pytest.mark.parametrize(("kind", "options"), _CASES, ids=_words)
_cases_8bit = pytest.mark.parametrize(("kind", "options"), list(filter(_has_8bit_form, _CASES)), ids=_words)
_cases_of_torch = pytest.mark.parametrize(
    ("kind", "options"), [case for case in _CASES if hasattr(torch.optim, case[0])], ids=_words
)


def _kind(name: str) -> str:
    return name.removesuffix("8bit")


def _make(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """Everything is quantised in 8 bits, however small; momentum where SGD needs it."""
    needed: Options = {"momentum": 0.9} if _kind(name) == "SGD" else {}
    optimizer: torch.optim.Optimizer = getattr(holdfast.optim, name)(
        params, **{"block_size": _BLOCK, "min_8bit_size": 0, **needed, **options}
    )
    return optimizer


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _params(*shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(_randn(*shape, seed=number).to(dtype)) for number, shape in enumerate(shapes)]


def _take(optimizer: torch.optim.Optimizer, *grads: Tensor) -> None:
    """One step with these gradients, for the parameters in their order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.dtype)
    optimizer.step()


def _train(optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for t in range(steps):
        _take(optimizer, *(_randn(*p.shape, seed=1000 * seed + 10 * t + at) for at, p in enumerate(params)))


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != "step"}


def _bits(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Parameters and state, to the bit."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values: list[Any] = [*params, *(v for p in params for v in optimizer.state[p].values())]
    return [
        v.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if isinstance(v, Tensor) else v
        for v in values
    ]


def _same_bits(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> bool:
    """Without pytest's account of thousands of differences."""
    return bool(_bits(left) == _bits(right))


def _flat64(tensor: Tensor) -> Any:
    return tensor.detach().double().flatten().numpy()


def _decoded(state: dict[str, Any], name: str, signed: bool, block_size: int = _BLOCK) -> Tensor:
    if name in state:
        return state[name]
    return dequantize_blockwise(state[f"{name}_codes"], state[f"{name}_absmax"], signed, block_size)


_CLASSES_AND_DEFAULTS: dict[str, Options] = {
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "Adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0},
    "SGD": {"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0},
    "RMSprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False},
    "Adagrad": {"lr": 1e-2, "lr_decay": 0, "weight_decay": 0, "initial_accumulator_value": 0, "eps": 1e-10},
    "LAMB": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 1e-2},
    "LARS": {"lr": 1e-3, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False},
    "AdEMAMix": {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "weight_decay": 1e-2},
}
_OPTIONS: Options = {
    "maximize": False,
    "block_size": 256,
    "min_8bit_size": 4096,
    "nonzero_second_moment": True,
    "percentile_clipping": 100,
    "stochastic_rounding": False,
    "seed": 0,
}


@_every
def test_positional_arguments_and_defaults_are_the_documented_ones(name: str) -> None:
    documented, cls = _CLASSES_AND_DEFAULTS[_kind(name)], getattr(holdfast.optim, name)
    assert issubclass(cls, getattr(holdfast.optim, _kind(name)))
    positional = [
        p.name for p in inspect.signature(cls).parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == ["params", *documented]
    group = cls(_params((3,)), **({"momentum": 0.9} if name == "SGD8bit" else {})).param_groups[0]
    want = {**documented, **_OPTIONS, "bits": 8 if name.endswith("8bit") else 32}
    want |= {"momentum": 0.9} if name == "SGD8bit" else {}
    assert {key: group[key] for key in want} == want
    assert tuple(group["codebooks"]) == ("dynamic-signed", "dynamic-unsigned")


@_cases
def test_32_bit_steps_follow_the_papers_in_double_precision(kind: str, options: Options) -> None:
    params = _params((7, 11, 13), (65,), ())
    optimizer = _make(kind, params, **{"momentum": 0, **options} if kind == "SGD" else options)
    group, rate = optimizer.param_groups[0], optimizer.param_groups[0]["lr"]
    truths = [REFERENCES[kind](_flat64(param), group) for param in params]
    for t in range(40):
        group["lr"] = rate * (1, 0.5, 2)[t % 3]
        grads = [_randn(*p.shape, seed=100 + 3 * t + at) for at, p in enumerate(params)]
        _take(optimizer, *grads)
        for truth, grad in zip(truths, grads, strict=True):
            truth.options["lr"] = group["lr"]
            truth.step(_flat64(grad))
    for param, truth in zip(params, truths, strict=True):
        state = optimizer.state[param]
        assert state.get("step", 40) == 40 and set(_tensors(state)) == set(truth.moments)
        # Half a rounding per step of a weight, always to the same side where it is the decay that was rounded.
        np.testing.assert_allclose(_flat64(param), truth.theta, rtol=20 * _ULP, atol=10 * _ULP)
        for name, moment in truth.moments.items():
            np.testing.assert_allclose(_flat64(state[name]), moment, rtol=40 * _ULP, atol=20 * _ULP)


@_cases_of_torch
def test_32_bit_steps_are_those_of_torch_to_a_few_units_in_the_last_place(kind: str, options: Options) -> None:
    ours, theirs = _params((7, 11, 13), (65,), ()), _params((7, 11, 13), (65,), ())
    options = {"momentum": 0, **options} if kind == "SGD" else options
    mine, reference = _make(kind, ours, **options), getattr(torch.optim, kind)(theirs, **options)
    rate = mine.param_groups[0]["lr"]
    assert rate == reference.param_groups[0]["lr"]
    for t in range(50):
        for optimizer in (mine, reference):
            optimizer.param_groups[0]["lr"] = rate * (1, 0.5, 2)[t % 3]
            _take(optimizer, *(_randn(*p.shape, seed=100 + 3 * t + at) for at, p in enumerate(ours)))
    for param, truth in zip(ours, theirs, strict=True):
        assert (param - truth).abs().max() < 10 * _ULP
        for name, value in _tensors(reference.state[truth]).items():
            assert value is None or torch.allclose(mine.state[param][name], value, rtol=1e-6, atol=10 * _ULP)


def test_the_reference_quantises_like_the_walk_over_the_codebook() -> None:
    for signed, table in _TABLES.items():
        entries = np.array(table, np.float32)
        x = _randn(300, seed=5).numpy() ** 3
        x = np.concatenate(
            [x if signed else np.abs(x), [1], (entries[1:] + entries[:-1]) / np.float32(2), np.zeros(99)]
        )
        codes, absmax = Quantiser(_TABLES, _BLOCK, nonzero=False).encode(x, signed)
        assert codes.tolist() == nearest_codes(x.astype(np.float32), table, _BLOCK)
        assert absmax[-1] == 0 and absmax[0] == np.abs(x[:_BLOCK].astype(np.float32)).max()


def _run_beside_the_reference(
    kind: str, options: Options, steps: int
) -> Iterator[tuple[nn.Parameter, dict[str, Any], Reference, Tensor]]:
    """An 8-bit run of a tensor with a short last block: what it holds, and its free-running reference, before a step
    with the gradient that comes with it.
    """
    param = nn.Parameter(_randn(13, 23, seed=3))
    optimizer = _make(f"{kind}8bit", [param], **options)
    rate = optimizer.param_groups[0]["lr"]
    truth = REFERENCES[kind](_flat64(param), optimizer.param_groups[0], Quantiser(_TABLES, _BLOCK))
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = truth.options["lr"] = rate * (1, 0.5, 2)[t % 3]
        grad = _randn(13, 23, seed=100 + t) * torch.exp(_randn(13, 23, seed=900 + t % 2))
        yield param, optimizer.state[param], truth, grad
        _take(optimizer, grad)
        truth.step(_flat64(grad))
    yield param, optimizer.state[param], truth, grad


@_cases_8bit
def test_each_8_bit_step_is_the_exact_step_from_the_stored_moments(kind: str, options: Options) -> None:
    quantiser = Quantiser(_TABLES, _BLOCK)
    exact: Reference | None = None
    before: dict[str, Any] = {}
    for param, state, truth, grad in _run_beside_the_reference(kind, options, 30):
        if exact:
            np.testing.assert_allclose(
                _flat64(param), exact.theta, rtol=2 * _ULP, atol=1e-5 * exact.options["lr"], err_msg=f"step {exact.t}"
            )
            assert set(_tensors(state)) == {f"{m}_{part}" for m in exact.moments for part in ("codes", "absmax")}
            for name, signed in exact.signed.items():
                codes, absmax = state[f"{name}_codes"].flatten().numpy(), state[f"{name}_absmax"].numpy()
                np.testing.assert_allclose(absmax, quantiser.encode(exact.exact[name], signed)[1], rtol=1e-5)
                assert not quantiser.misplaced(codes, exact.exact[name], before[name], signed).size, (name, exact.t)
        exact = REFERENCES[kind](_flat64(param), truth.options, quantiser)
        exact.t = truth.t
        for name, signed in exact.signed.items() if truth.t else ():
            parts = (state[f"{name}_codes"].flatten().numpy(), state[f"{name}_absmax"].numpy())
            exact.moments[name] = quantiser.decode(*parts, signed)
        before = exact.moments.copy()
        exact.step(_flat64(grad))


@_cases_8bit
def test_an_8_bit_run_follows_double_precision_with_quantised_moments(kind: str, options: Options) -> None:
    *_, (param, state, truth, _) = _run_beside_the_reference(kind, options, 30)
    # A moment within a rounding of a threshold may take the neighbouring code, and its element another path.
    off = np.abs(_flat64(param) - truth.theta) > 20 * _ULP
    assert truth.t == 30 and off.mean() <= 0.01
    for name, signed in truth.signed.items():
        apart = np.abs(_flat64(_decoded(state, name, signed)) - truth.moments[name])
        assert (apart > 1e-5 * np.abs(truth.moments[name]).max()).mean() <= 0.01


@_cases_8bit
def test_the_first_8_bit_step_is_the_32_bit_step(kind: str, options: Options) -> None:
    if options.get("initial_accumulator_value"):
        options = {**options, "initial_accumulator_value": 0.25}  # 1.0 times its absmax: exact in 8 bits
    narrow, wide = _params((300,), (70, 3)), _params((300,), (70, 3))
    first, second = _make(f"{kind}8bit", narrow, **options), _make(kind, wide, **options)
    for optimizer in (first, second):
        _train(optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))
    _train(first, 1, seed=2)
    _train(second, 1, seed=2)
    assert kind == "Lion" or not any(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@_every
def test_an_element_without_gradient_does_not_move_a_bit_in_a_thousand_steps(name: str) -> None:
    param = nn.Parameter(_randn(200))
    with torch.no_grad():
        param[3] = -0.0
    optimizer = _make(name, [param], weight_decay=0)
    before, grad = param.detach().clone(), torch.zeros(200)
    for t in range(1000):
        grad[::7] = _randn(29, seed=t)  # neighbours in the same blocks do get gradients
        _take(optimizer, grad)
    idle = torch.arange(200) % 7 != 0
    assert param.detach()[idle].numpy().tobytes() == before[idle].numpy().tobytes()
    assert (param[~idle] != before[~idle]).all()


_BAD = [0, 70, 199]


def _with_quiet_elements(*seeds: int) -> list[Tensor]:
    """Gradients whose elements at ``_BAD`` are so small that no absmax depends on them."""
    return [_randn(200, seed=seed).index_fill(0, torch.tensor(_BAD), 1e-3) for seed in seeds]


@_every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
def test_an_unusable_gradient_element_is_skipped_and_disturbs_no_other(name: str, bad: float) -> None:
    params = [nn.Parameter(_randn(200)) for _ in range(2)]
    clean, poisoned = (_make(name, [param], weight_decay=0.01) for param in params)
    *past, grad = _with_quiet_elements(1, 2, 3)
    for old in past:
        for optimizer in (clean, poisoned):
            _take(optimizer, old)
    before = {k: v.clone() for k, v in [("param", params[1].detach()), *_tensors(poisoned.state[params[1]]).items()]}
    _take(clean, grad)
    _take(poisoned, grad.index_fill(0, torch.tensor(_BAD), bad))
    others = torch.ones(200, dtype=torch.bool).index_fill(0, torch.tensor(_BAD), False)
    pairs = {"param": (params[1].detach(), params[0].detach())}
    state, clean_state = (_tensors(o.state[p]) for o, p in zip((poisoned, clean), params[::-1], strict=True))
    pairs |= {key: (state[key], clean_state[key]) for key in state}
    for key, (now, want) in pairs.items():
        assert torch.isfinite(now).all(), key
        if _kind(name) not in _WITH_A_TRUST_RATIO and not key.endswith("absmax"):
            assert torch.equal(now[others], want[others]), key
        if not key.endswith(("codes", "absmax")):
            assert torch.equal(now[~others], before[key][~others]), key
        assert not torch.equal(now, before[key]), key


@pytest.mark.parametrize("name", ["LAMB", "LAMB8bit", "LARS", "LARS8bit"])
def test_an_unusable_gradient_element_leaves_a_finite_trust_ratio(name: str) -> None:
    clean, poisoned = (nn.Parameter(_randn(200)) for _ in range(2))
    for param, bad in ((clean, 0.0), (poisoned, torch.nan)):
        optimizer = _make(name, [param], lr=0.1, weight_decay=0)
        _take(optimizer, *(g.index_fill(0, torch.tensor(_BAD), bad) for g in _with_quiet_elements(1)))
    assert not torch.equal(poisoned, _randn(200))
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0.02 * (clean - _randn(200)).abs().max().item())


@_every_8bit
def test_a_kept_moment_is_encoded_anew_with_the_absmax_of_its_block(name: str) -> None:
    param = nn.Parameter(_randn(64))
    optimizer = _make(name, [param])
    _take(optimizer, _randn(64, seed=1))
    reference = REFERENCES[_kind(name)](_flat64(param), optimizer.param_groups[0])
    before = {m: _decoded(optimizer.state[param], m, s)[5].item() for m, s in reference.signed.items()}
    grad = 3 * _randn(64, seed=2)
    grad[5] = torch.nan
    _take(optimizer, grad)
    for moment, signed in reference.signed.items():
        now, largest = (
            _decoded(optimizer.state[param], moment, signed)[5].item(),
            optimizer.state[param][f"{moment}_absmax"].item(),
        )
        assert now == pytest.approx(before[moment], abs=largest * 0.5 * 0.0141)  # half of the codebook's widest gap


@_every_8bit
def test_a_block_without_any_usable_gradient_keeps_every_bit(name: str) -> None:
    param = nn.Parameter(_randn(200))
    optimizer = _make(name, [param])
    _train(optimizer, 3)
    parts = {"param": param.detach(), **_tensors(optimizer.state[param])}
    before = {key: value.clone() for key, value in parts.items()}
    grad = _randn(200, seed=50)
    grad[64:128] = torch.nan
    _take(optimizer, grad)
    for key, now in parts.items():
        block = 1 if key.endswith("absmax") else slice(64, 128)
        assert torch.equal(now[block], before[key][block]) and not torch.equal(now, before[key]), key


@_every
def test_gradients_are_usable_up_to_two_to_the_63(name: str) -> None:
    largest = torch.tensor(2.0**63)
    param = nn.Parameter(torch.ones(2))
    optimizer = _make(name, [param], weight_decay=0)
    _take(optimizer, torch.stack([-largest, torch.nextafter(largest, torch.tensor(torch.inf))]))
    assert torch.isfinite(param).all() and param[1] == 1
    assert param[0] > 1  # against the gradient


@pytest.mark.parametrize("name", [name for name in _ALL if _kind(name) in _DECOUPLED])
def test_weight_decays_before_the_update_and_without_a_gradient(name: str) -> None:
    options: Options = {"lr": 0.5, "weight_decay": 0.5, **({"alpha": 0.0} if "AdEMAMix" in name else {})}
    param = nn.Parameter(torch.full((1,), 2.0))
    optimizer = _make(name, [param], **options)
    _take(optimizer, torch.zeros(1))
    assert param.item() == 1.5
    param = nn.Parameter(torch.full((1,), 2.0))
    _take(_make(name, [param], **options), torch.ones(1))
    assert param.item() == pytest.approx(2.0 * 0.75 - 0.5)  # decayed after the update it would be 1.125


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    ("kind", "options", "moved"),
    [  # g = 1e-3 = eps, so that every reading of eps gives another number
        ("AdamW", {"weight_decay": 0}, 0.5),
        ("Adam", {}, 0.5),
        ("AdEMAMix", {"weight_decay": 0, "alpha": 0.0}, 0.5),
        ("LAMB", {"weight_decay": 0}, 0.5),
        ("RMSprop", {"alpha": 0.75}, 1e-3 / (0.5e-3 + 1e-3)),
        ("Adagrad", {}, 0.5),
    ],
)
def test_eps_is_added_where_torch_adds_it(kind: str, options: Options, moved: float, bits: int) -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = _make(kind, [param], bits=bits, lr=1.0, eps=1e-3, **options)
    _take(optimizer, torch.full((1,), 1e-3))
    assert -param.item() == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("name", ["LAMB", "LAMB8bit"])
def test_a_lamb_step_is_as_long_as_the_learning_rate_times_the_weights(name: str) -> None:
    param, adam = _params((40, 30))[0], _params((40, 30))[0]
    optimizer, plain = (
        _make(name, [param], lr=0.03, weight_decay=0.1),
        _make(name.replace("LAMB", "Adam"), [adam], lr=0.03),
    )
    for t in range(5):
        before, grad = param.detach().clone(), _randn(40, 30, seed=t + 9)
        _take(optimizer, grad)
        _take(plain, grad)
        assert (param.detach() - before).norm().item() == pytest.approx(0.03 * before.norm().item(), rel=1e-5)
    assert (param - adam).norm() > 0.01 * param.norm()


@pytest.mark.parametrize("name", ["LARS", "LARS8bit"])
def test_a_lars_step_is_the_gradient_times_the_layers_own_rate(name: str) -> None:
    param, sgd = _params((40, 30))[0], _params((40, 30))[0]
    before, grad = param.detach().clone(), 100 * _randn(40, 30, seed=9)
    _take(_make(name, [param], lr=0.5, weight_decay=0.1, trust_coefficient=0.02), grad)
    _take(_make(name.replace("LARS", "SGD"), [sgd], lr=0.5, weight_decay=0.1), grad)
    trust = 0.02 * before.norm() / (grad.norm() + 0.1 * before.norm())
    torch.testing.assert_close(before - param, 0.5 * trust * (grad + 0.1 * before), rtol=1e-5, atol=1e-6)
    assert (param - sgd).norm() > 0.01 * param.norm()


@pytest.mark.parametrize("name", ["LAMB", "LAMB8bit", "LARS", "LARS8bit"])
def test_a_parameter_of_zeros_has_a_trust_ratio_of_one(name: str) -> None:
    param = nn.Parameter(torch.zeros(100))
    _take(_make(name, [param], lr=0.5), torch.full((100,), 2.0))
    torch.testing.assert_close(param.detach(), torch.full((100,), -0.5 if "LAMB" in name else -1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["LARS", "LARS8bit"])
def test_a_gradient_of_zeros_has_a_trust_ratio_of_one(name: str) -> None:
    param = nn.Parameter(torch.ones(100))
    _take(_make(name, [param], lr=0.5, weight_decay=0.25), torch.zeros(100))
    torch.testing.assert_close(param.detach(), torch.full((100,), 1 - 0.5 * 0.25), rtol=1e-6, atol=0)


@_every
def test_maximize_is_a_run_with_negated_gradients_bit_for_bit(name: str) -> None:
    up, down = _params((300,), (3,)), _params((300,), (3,))
    climbing, descending = _make(name, up, maximize=True, weight_decay=0.1), _make(name, down, weight_decay=0.1)
    for t in range(4):
        grads = [_randn(300, seed=t), _randn(3, seed=t)]
        _take(climbing, *grads)
        _take(descending, *(-g for g in grads))
    assert _same_bits(climbing, descending)


@pytest.mark.parametrize("name", ["SGD", "SGD8bit", "Lion8bit", "AdamW8bit"])
@pytest.mark.parametrize("percentile", [0, 5, 50, 99])
def test_a_gradient_is_clipped_to_a_percentile_of_the_last_100_norms(name: str, percentile: int) -> None:
    clipped, plain = _params((90,)), _params((90,))
    optimizer, reference = _make(name, clipped, percentile_clipping=percentile), _make(name, plain)
    squares: list[float] = []
    factors = []
    for t in range(230):
        grad = _randn(90, seed=t) * torch.exp(0.2 * _randn(1, seed=t + 500))
        squares.append(grad.double().square().sum().item())
        factors.append(clip_factor(squares, percentile))
        _take(optimizer, grad)
        _take(reference, grad * factors[-1])
        # Each step from the same bits: a code that falls on the other side of a threshold must not add up.
        for key, value in _tensors(optimizer.state[clipped[0]]).items():
            if key in reference.state[plain[0]]:
                reference.state[plain[0]][key].copy_(value)
        off = (clipped[0] - plain[0]).detach().abs()
        assert off.max() < 2e-6 or (name == "Lion8bit" and (off > 2e-6).sum() <= 1), t
        plain[0].data.copy_(clipped[0].data)
    grad_norms = optimizer.state[clipped[0]]["grad_norms"]
    assert (grad_norms.dtype, grad_norms.shape) == (torch.float32, (100,))
    assert (min(factors) < 0.8) is (percentile < 99) and max(factors) == 1


@_every
def test_a_gradient_ten_times_as_long_as_the_first_is_clipped_to_it(name: str) -> None:
    clipped, plain = _params((90,)), _params((90,))
    optimizer, reference = _make(name, clipped, percentile_clipping=50, lr=0.01), _make(name, plain, lr=0.01)
    for factor in (1, 10):
        _take(optimizer, factor * _randn(90))
        _take(reference, _randn(90))
    torch.testing.assert_close(clipped, plain, rtol=0, atol=2e-6)


@_every
def test_an_unusable_gradient_does_not_poison_the_history_of_norms(name: str) -> None:
    param = _params((90,))[0]
    optimizer = _make(name, [param], percentile_clipping=50)
    _take(optimizer, _randn(90))
    _take(optimizer, _randn(90).index_fill(0, torch.tensor([3]), torch.inf))
    _take(optimizer, torch.full((90,), torch.nan))
    before = param.detach().clone()
    _take(optimizer, _randn(90))
    assert torch.isfinite(optimizer.state[param]["grad_norms"]).all()
    assert torch.isfinite(param).all() and not torch.equal(param, before)


def _rounded(name: str, n: int, steps: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """bf16 parameters after ``steps`` with stochastic rounding, and the fp32 numbers they were rounded from in the last
    step."""
    param = nn.Parameter(_randn(n).bfloat16())
    optimizer = _make(name, [param], lr=1e-3, stochastic_rounding=True, **options)
    for t in range(steps):
        wide = nn.Parameter(param.detach().float())
        twin = _make(name, [wide], lr=1e-3, **options)
        state = copy.deepcopy(dict(optimizer.state.get(param, {})))
        if state:
            twin.state[wide] = state
        grad = _randn(n, seed=77 + t).bfloat16()
        _take(optimizer, grad)
        _take(twin, grad.float())
    return param.detach(), wide.detach()


def _neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The two bf16 numbers around each fp32 number, lower magnitude first; equal where it is one itself."""
    bits = exact.view(torch.int32)
    inner = (bits & ~0xFFFF).view(torch.float32)
    outer = torch.where(inner == exact, inner, ((bits & ~0xFFFF) + 0x10000).view(torch.float32))
    return inner, outer


@_every
@pytest.mark.parametrize("steps", [1, 2])
def test_stochastic_rounding_takes_one_of_the_two_neighbours_without_bias(name: str, steps: int) -> None:
    n = 40_000
    rounded, exact = _rounded(name, n, steps)
    inner, outer = _neighbours(exact)
    went_out = rounded.float() == outer
    assert (went_out | (rounded.float() == inner)).all()
    gap = (outer - inner).abs()
    share = torch.where(gap > 0, (exact - inner).abs() / gap, 0.0)
    between = gap > 0
    for low in (0.0, 0.25, 0.5, 0.75):  # the chance of going outwards is the distance to the inner neighbour
        part = between & (share >= low) & (share < low + 0.25)
        count, want = part.sum().item(), share[part].double().sum().item()
        spread = (share[part] * (1 - share[part])).double().sum().sqrt().item()
        assert count == 0 or abs(went_out[part].sum().item() - want) <= 5 * spread + 1, (low, count)
    assert between.sum() > n / 10


@_every
def test_stochastic_rounding_depends_on_the_seed_the_step_and_the_parameter_alone(name: str) -> None:
    def run(seed: int) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(2000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = _make(name, params, lr=1e-3, stochastic_rounding=True, seed=seed)
        for _ in range(2):
            _take(optimizer, *[_randn(2000)] * 2)
        return [p.detach().clone() for p in params]

    torch.manual_seed(0)
    first, other = run(7)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(run(7), (first, other), strict=True))
    assert not torch.equal(first, other)
    assert not torch.equal(run(8)[0], first)


@_every
def test_stochastic_rounding_goes_on_bit_exact_after_a_restart(name: str) -> None:
    options: Options = {"stochastic_rounding": True, "lr": 1e-2}
    params = _params((300,), (5,), dtype=torch.bfloat16)
    optimizer = _make(name, params, seed=3, **options)
    _train(optimizer, 3)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = _make(name, others, seed=4, **options)
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        _train(each, 2, seed=9)
    assert _same_bits(other, optimizer)


def test_stochastic_rounding_lets_steps_below_half_a_unit_add_up() -> None:
    def mean(stochastic: bool) -> float:
        param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = _make("SGD", [param], lr=1e-4, momentum=0, stochastic_rounding=stochastic)
        for _ in range(100):
            _take(optimizer, torch.ones(4096))
        return param.detach().float().mean().item()

    assert mean(False) == 1.0
    assert mean(True) == pytest.approx(0.99, abs=5e-4)


_MOMENTS = {"SGD": 1, "Lion": 1, "RMSprop": 1, "Adagrad": 1, "LARS": 1, "AdEMAMix": 3}


@_every
def test_moments_take_one_byte_and_a_64th_or_four_bytes_each(name: str) -> None:
    param = nn.Parameter(torch.zeros(1024, 64))
    optimizer = _make(name, [param], block_size=256)
    _train(optimizer, 1)
    taken = sum(t.nbytes for t in _tensors(optimizer.state[param]).values()) / param.numel()
    assert taken == _MOMENTS.get(_kind(name), 2) * (1 + 4 / 256 if name.endswith("8bit") else 4)
    assert type(optimizer.state[param]["step"]) is int


@pytest.mark.parametrize("kind", _KINDS)
def test_a_group_may_ask_for_the_other_precision(kind: str) -> None:
    for name, bits in ((kind, 8), (f"{kind}8bit", 32)):
        special, normal = params = _params((9, 9), (9, 9))
        optimizer = _make(name, [{"params": [special], "bits": bits}, {"params": [normal]}])
        _train(optimizer, 2)
        narrow = [any(key.endswith("_codes") for key in optimizer.state[p]) for p in params]
        assert narrow == [bits == 8, bits == 32]


@pytest.mark.parametrize("kind", _KINDS)
def test_a_group_with_other_bits_trains_as_the_class_of_these_bits(kind: str) -> None:
    mixed, pure = (_make(kind, _params((9, 9)), bits=8), _make(f"{kind}8bit", _params((9, 9))))
    for optimizer in (mixed, pure):
        _train(optimizer, 3)
    assert _same_bits(mixed, pure)


@_every_8bit
def test_parameters_below_the_minimum_size_keep_32_bit_moments(name: str) -> None:
    small, large = params = _params((99,), (100,))
    optimizer = _make(name, params, min_8bit_size=100)
    _train(optimizer, 1)
    narrow = [any(key.endswith("_codes") for key in optimizer.state[p]) for p in (small, large)]
    assert narrow == [False, True]


@_every_8bit
@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_stores_one_absmax_per_block_of_its_moment(name: str, block_size: int) -> None:
    n = 5003
    param = nn.Parameter(_randn(n))
    optimizer = _make(name, [param], block_size=block_size)
    truth = REFERENCES[_kind(name)](
        _flat64(param), optimizer.param_groups[0], quantiser := Quantiser(_TABLES, block_size)
    )
    grad = _randn(n, seed=1)
    _take(optimizer, grad)
    truth.step(_flat64(grad))
    for moment, signed in truth.signed.items():
        _, want = quantiser.encode(truth.exact[moment], signed)
        np.testing.assert_allclose(optimizer.state[param][f"{moment}_absmax"].numpy(), want, rtol=1e-6)


@_every
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    def trained(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        param = nn.Parameter(torch.linspace(-1, 1, 100_003))
        optimizer = _make(name, [param], percentile_clipping=50)
        for t in range(3):
            _take(optimizer, _randn(100_003, seed=t % 2) * (t + 1))
        return [param.detach(), *_tensors(optimizer.state[param]).values()]

    usual = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(trained(1), trained(3), strict=True))
    finally:
        torch.set_num_threads(usual)


@_every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_take_the_fp32_step_and_round_once(name: str, dtype: torch.dtype) -> None:
    narrow = _params((300,), (3,), dtype=dtype)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    rate = 10.0 if _kind(name) == "LARS" else 0.01  # steps that bfloat16 can see
    first, second = _make(name, narrow, lr=rate), _make(name, wide, lr=rate)
    grads = [_randn(*p.shape, seed=4).to(dtype) for p in narrow]
    _take(first, *grads)
    _take(second, *(g.float() for g in grads))
    for n, w in zip(narrow, wide, strict=True):
        assert n.dtype == dtype and torch.equal(n, w.to(dtype)) and not torch.equal(n, _randn(*n.shape).to(dtype))
        assert all(torch.equal(first.state[n][key], value) for key, value in _tensors(second.state[w]).items())


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "in the middle of a buffer": lambda x: torch.cat([torch.zeros(3), x.reshape(-1)])[3:].view(x.shape),
}


@_every
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_strides_of_parameters_and_gradients_change_no_bit(name: str, layout: str) -> None:
    strided, plain = nn.Parameter(_LAYOUTS[layout](_randn(20, 30))), nn.Parameter(_randn(20, 30))
    first, second = _make(name, [strided]), _make(name, [plain])
    for t in range(3):
        strided.grad = _LAYOUTS[layout](_randn(20, 30, seed=t))
        first.step()
        _take(second, _randn(20, 30, seed=t))
    assert _same_bits(first, second)
    assert all(tensor.is_contiguous() for tensor in _tensors(first.state[strided]).values())


@_every
@pytest.mark.parametrize("shape", [(20, 30), (600,)])
def test_an_expanded_gradient_is_read_as_what_it_shows(name: str, shape: tuple[int, ...]) -> None:
    spread, plain = _params(shape) + _params(shape)
    first, second = _make(name, [spread]), _make(name, [plain])
    spread.grad = torch.ones(1).expand(shape)
    first.step()
    _take(second, torch.ones(shape))
    assert _same_bits(first, second)


@_every
@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_empty_and_scalar_parameters_are_updated(name: str, shape: tuple[int, ...]) -> None:
    param, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(5))
    optimizer = _make(name, [param, other], percentile_clipping=50)
    for _ in range(2):
        _take(optimizer, torch.ones(shape), torch.ones(5))
    assert torch.isfinite(param).all() and (param != 1).all() and (other != 1).all()


@pytest.mark.parametrize("name", ["SGD8bit", "SGD"])
def test_sgd_needs_momentum_in_8_bits_only(name: str) -> None:
    cls = getattr(holdfast.optim, name)
    if name == "SGD":
        param = nn.Parameter(torch.ones(3))
        optimizer = cls([param], lr=0.5)
        _take(optimizer, torch.ones(3))
        assert torch.equal(param, torch.full((3,), 0.5)) and not _tensors(optimizer.state[param])
    else:
        with pytest.raises(ConfigurationError, match="momentum"):
            cls(_params((3,)))


def _saved(state_dict: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@_every
@pytest.mark.parametrize(
    "travel",
    [_saved, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d)), lambda d: d],
    ids=["torch.save", "deepcopy", "pickle", "direct"],
)
def test_training_goes_on_with_the_same_bits_after_a_round_trip(name: str, travel: Callable[[Any], Any]) -> None:
    options: Options = {"percentile_clipping": 50, "min_8bit_size": 100, "lr": 1e-2}
    params = _params((9, 13), (5,))
    optimizer = _make(name, params, **options)
    _train(optimizer, 3)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = _make(name, others, **{**options, "lr": 1.0})
    other.load_state_dict(travel(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 1e-2 and _same_bits(other, optimizer)
    for each in (optimizer, other):
        _train(each, 2, seed=9)
    assert _same_bits(other, optimizer)


@_every
def test_a_loaded_state_shares_no_memory_with_the_state_dict(name: str) -> None:
    params, others = _params((9, 13)), _params((9, 13))
    optimizer, other = _make(name, params), _make(name, others)
    _train(optimizer, 2)
    other.load_state_dict(optimizer.state_dict())
    before = _bits(optimizer)
    _train(other, 2, seed=3)
    assert _bits(optimizer) == before


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}])
def test_every_form_of_rmsprop_survives_a_round_trip(options: Options) -> None:
    optimizer, other = (_make("RMSprop8bit", _params((9, 13)), **options) for _ in range(2))
    _train(optimizer, 3)
    with torch.no_grad():
        other.param_groups[0]["params"][0].copy_(optimizer.param_groups[0]["params"][0])
    other.load_state_dict(_saved(optimizer.state_dict()))
    for each in (optimizer, other):
        _train(each, 2, seed=9)
    assert _same_bits(other, optimizer)


@_every_8bit
def test_a_state_dict_with_another_block_size_is_refused(name: str) -> None:
    optimizer, other = _make(name, _params((9, 13))), _make(name, _params((9, 13)), block_size=128)
    _train(optimizer, 1)
    _train(other, 1, seed=2)
    before = _bits(other)
    with pytest.raises(ConfigurationError, match="block_size=64"):
        other.load_state_dict(optimizer.state_dict())
    assert _bits(other) == before


@_every_8bit
def test_a_state_dict_with_another_codebook_is_refused(name: str) -> None:
    optimizer, other = _make(name, _params((9, 13))), _make(name, _params((9, 13)))
    _train(optimizer, 1)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["codebooks"] = ("linear", "linear")
    with pytest.raises(ConfigurationError, match="codebooks"):
        other.load_state_dict(state_dict)


_KEEPS = {
    "AdamW": "m v", "Adam": "m v", "LAMB": "m v", "SGD": "buffer", "LARS": "buffer", "Lion": "m", "RMSprop": "square",
    "Adagrad": "sum", "AdEMAMix": "m slow v",
}  # fmt: skip


@_every
def test_the_state_dict_of_an_optimizer_with_other_moments_is_refused(name: str) -> None:
    own = _KEEPS[_kind(name)]
    for kind in [kind for kind in _KINDS if _KEEPS[kind] != own]:
        other = _make(name.replace(_kind(name), kind), _params((9, 13)))
        _train(other, 1)
        with pytest.raises(
            ConfigurationError, match=r"the state of parameter 0 of group 0 has the keys|^group 0 of the state dict: "
        ):
            _make(name, _params((9, 13))).load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad"])
def test_the_state_dict_of_torch_is_refused_with_a_way_out(kind: str) -> None:
    theirs = getattr(torch.optim, kind)(_params((9, 13)), lr=1e-3)
    _train(theirs, 1)
    with pytest.raises(ConfigurationError, match="interop"):
        _make(f"{kind}8bit", _params((9, 13))).load_state_dict(theirs.state_dict())


def _unfit_gradient(unfit: str) -> nn.Parameter:
    param = nn.Parameter(torch.ones(10, 4))
    if unfit == "sparse":
        param.grad = torch.ones(10, 4).to_sparse()
        return param
    gradient = torch.ones(10, 4, device="meta")

    class Elsewhere(nn.Parameter):
        """torch itself refuses to assign such a gradient; a wrapped tensor may still have one."""

        grad = property(lambda self: gradient, lambda self, value: None)

    return Elsewhere(torch.ones(10, 4))


@_every
@pytest.mark.parametrize(("unfit", "reason"), [("sparse", "sparse"), ("meta", "meta")])
def test_an_unfit_gradient_is_refused_by_the_name_of_its_parameter_before_anything_changes(
    name: str, unfit: str, reason: str
) -> None:
    dense = nn.Parameter(torch.ones(3))
    dense.grad = torch.ones(3)
    for params, called in (
        ([dense, _unfit_gradient(unfit)], "parameter 1 of group 0"),
        ([("head.weight", dense), ("tail.bias", _unfit_gradient(unfit))], "tail.bias"),
    ):
        optimizer = _make(name, params)
        with pytest.raises(ConfigurationError, match=f"{called}.*{reason}"):
            optimizer.step()
        assert torch.equal(dense, torch.ones(3)) and not optimizer.state.get(dense)


@_every
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_parameters_that_fp32_cannot_represent_are_refused_by_name(name: str, dtype: torch.dtype) -> None:
    unfit = nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(ConfigurationError, match=f"parameter 0 of group 0.*{dtype}"):
        _make(name, [unfit])
    with pytest.raises(ConfigurationError, match=f"tail\\.bias.*{dtype}"):
        _make(name, [("head.weight", _params((3,))[0]), ("tail.bias", unfit)])


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Lion8bit", {"lr": -1.0}, "lr=-1.0"),
        ("LAMB", {"betas": (0.9, 1.0)}, "betas"),
        ("RMSprop", {"eps": 0.0}, "eps=0.0"),
        ("SGD8bit", {"momentum": -0.1}, "momentum=-0.1"),
        ("SGD", {"momentum": 0.0, "nesterov": True}, "nesterov"),
        ("SGD", {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov"),
        ("Adagrad8bit", {"lr_decay": -1.0}, "lr_decay=-1.0"),
        ("LARS8bit", {"trust_coefficient": 0.0}, "trust_coefficient=0.0"),
        ("AdEMAMix8bit", {"betas": (0.9, 0.999)}, "betas"),
        ("AdamW8bit", {"betas": (0.9, 0.999, 0.9999)}, "betas"),
        ("AdEMAMix", {"t_alpha": 0}, "t_alpha=0"),
        ("Adam", {"bits": 4}, "bits=4"),
        ("AdamW", {"percentile_clipping": 101}, "percentile_clipping=101"),
        ("AdamW8bit", {"block_size": 100}, "block_size=100"),
        ("AdamW8bit", {"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_refused(name: str, options: Options, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        _make(name, _params((3,)), **options)


def test_a_block_size_that_no_longer_fits_the_stored_blocks_is_refused() -> None:
    optimizer = _make("AdamW8bit", _params((300,)))
    _train(optimizer, 1)
    optimizer.param_groups[0]["block_size"] = 2 * _BLOCK
    with pytest.raises(ConfigurationError):
        _train(optimizer, 1)


def test_a_mistyped_option_is_an_error_as_with_any_function() -> None:
    with pytest.raises(TypeError, match="momentun"):
        RMSprop8bit(_params((3,)), momentun=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize("make", [AdamW, AdamW8bit])
def test_a_second_moment_that_rounds_to_zero_would_make_the_next_step_explode(make: Callable[..., Any]) -> None:
    def moved(nonzero: bool) -> float:
        param = nn.Parameter(torch.zeros(2))
        optimizer = make([param], lr=1e-3, weight_decay=0, min_8bit_size=0, nonzero_second_moment=nonzero)
        for gradient in ([1.0, 1e-4], [1.0, 0.0]):
            _take(optimizer, torch.tensor(gradient))
        return param.detach().abs().max().item()

    assert moved(True) < 5e-3
    assert (moved(False) < 5e-3) is (make is AdamW)
