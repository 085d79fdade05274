"""One stack and many: against a float64 loop over experts, finite differences, and exact singular vectors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.adapters import (
    AdaptedLinear,
    Site,
    adapters_of,
    create_method,
    finish_task,
    footprint,
    inject,
    merge,
    penalty,
    start_task,
    trainable_parameters,
    use_tasks,
    using_tasks,
)
from holdfast.adapters.methods.brainstacks import Brainstacks, protect, protected_directions, top_directions
from holdfast.adapters.methods.brainstacks.mixture import Gates, balance, gate, noisy, use_of_experts
from holdfast.adapters.methods.brainstacks.projection import outside
from holdfast.errors import ConfigurationError
from holdfast.trainer.model import Decoder, initialise
from tests.support.tiny_training import TINY

_D, _O = 5, 4


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.normal_()


def _stacked(method: Brainstacks, *, frozen: int, d: int = _D, o: int = _O, seed: int = 0) -> nn.Sequential:
    """Two float64 layers, frozen stacks of random numbers, and a current one that is random too."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d, o), nn.Tanh(), nn.Linear(o, d)).double()
    inject(model, method)
    for number in range(frozen + 1):
        start_task(model, f"t{number}", seed=seed)
        _randomise(model)
        if number < frozen:
            finish_task(model)
    return model


def _reference(x: Tensor, rows: Mapping[str, Tensor], method: Brainstacks, epsilon: Tensor | None) -> Tensor:
    """Δ(x) of one stack for one token, an expert at a time. ``rows``: ``up`` without the factor s."""
    logits = [float(row @ x) for row in rows["gate"]]
    if epsilon is not None:
        spread = [math.log1p(math.exp(float(row @ x))) for row in rows["noise"]]
        logits = [a + s * float(e) for a, s, e in zip(logits, spread, epsilon, strict=True)]
    best = sorted(range(method.experts), key=lambda e: -logits[e])[: method.top_k]
    mass = {e: math.exp(logits[e] - logits[best[0]]) for e in best}
    y = torch.zeros(rows["up"].shape[1], dtype=x.dtype)
    for e in best:
        a, b = (rows[name][e * method.rank : (e + 1) * method.rank] for name in ("down", "up"))
        y += mass[e] / sum(mass.values()) * (b.T @ (a @ x))
    return method.scale * math.sqrt(method.rank) * y


@settings(deadline=None)
@given(
    experts=st.integers(1, 5),
    top_k=st.integers(1, 5),
    rank=st.integers(1, 4),
    frozen=st.integers(0, 2),
    scale=st.sampled_from([1.0, -0.3]),
    is_training=st.booleans(),
    shape=st.sampled_from([(), (3,), (2, 3), (0,)]),
    seed=st.integers(0, 1000),
)
def test_a_layer_is_the_base_and_its_stacks_one_expert_at_a_time(
    experts: int, top_k: int, rank: int, frozen: int, scale: float, is_training: bool, shape: tuple[int, ...], seed: int
) -> None:
    method = Brainstacks(rank=rank, experts=experts, top_k=min(top_k, experts), scale=scale)
    layer: AdaptedLinear = _stacked(method, frozen=frozen, seed=seed)[0]
    layer.train(is_training).count_untrained()
    x = torch.randn(*shape, _D, dtype=torch.float64)
    torch.manual_seed(seed)
    epsilon = torch.randn(*shape, experts, dtype=torch.float64).view(-1, experts)
    torch.manual_seed(seed)
    got, want = layer(x), layer.base(x).detach().clone()
    current = {name: rows.detach() for name, rows in layer.current.items()}
    for at, token in enumerate(x.view(-1, _D)):
        for task in range(frozen):
            rows = layer.task_rows(task)
            assert sorted(rows) == ["down", "gate", "up"]
            unscaled = {**rows, "up": rows["up"] / (scale * math.sqrt(rank))}
            want.view(-1, _O)[at] += _reference(token, unscaled, method, None)
        want.view(-1, _O)[at] += _reference(token, current, method, epsilon[at] if is_training else None)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("projection", ["off", "output", "input", "train_only"])
def test_every_gradient_is_that_of_finite_differences_with_frozen_stacks_below_and_above(projection: str) -> None:
    method = Brainstacks(rank=2, experts=3, top_k=2, projection=projection, balance=0.5)
    model = _stacked(method, frozen=2, seed=4).train()
    layers = adapters_of(model).layers
    widths = {n: layer.in_features if projection == "input" else layer.out_features for n, layer in layers.items()}
    protect(model, {name: torch.linalg.qr(torch.randn(w, 1).double())[0].T for name, w in widths.items()})
    parameters = trainable_parameters(model)
    assert len(parameters) == 8  # down, up, gate and noise of both layers
    x = torch.randn(6, _D, dtype=torch.float64, requires_grad=True)

    def through(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)  # the routers' noise
        return model(x), penalty(model)

    assert torch.autograd.gradcheck(through, (x, *parameters))
    y, cost = through(x)
    for output in (y.square().sum(), cost):
        grads = torch.autograd.grad(output, (x, *parameters), retain_graph=True, allow_unused=True)
        by_name = dict(
            zip(["x", *(k for layer in layers.values() for k in layer.current if k != "basis")], grads, strict=True)
        )
        assert by_name["x"] is not None and bool(by_name["x"].any())
        for name in ("gate", "noise"):
            assert by_name[name] is not None and bool(by_name[name].any())
    assert not any(t.requires_grad for t in model.buffers())


def test_the_path_through_frozen_stacks_and_base_stays_when_the_new_stack_is_still_zero() -> None:
    model = _stacked(Brainstacks(rank=2), frozen=2).train()
    with torch.no_grad():
        model[2].current["up"].zero_()
    x = torch.randn(3, _D, dtype=torch.float64)
    model(x).square().sum().backward()
    lower = {name: p.grad for name, p in model[0].current.items() if p.requires_grad}
    assert all(g is not None and bool(g.any()) for g in lower.values())
    with using_tasks(model, weights={"t2": 1.0}):  # without the frozen stacks above it is another gradient
        model.zero_grad()
        model(x).square().sum().backward()
    assert not torch.equal(model[0].current["up"].grad, lower["up"])


@pytest.mark.parametrize("is_training", [False, True])
def test_a_fresh_stack_changes_no_bit(is_training: bool) -> None:
    model = Decoder(TINY)
    initialise(model, 0)
    tokens = torch.arange(32).view(2, 16)
    bare = model.train(is_training)(tokens)
    inject(model, Brainstacks(rank=2), exclude=["output"])
    for number in range(2):
        start_task(model, f"t{number}")
        got = model.train(is_training)(tokens)
        for layer in adapters_of(model).layers.values():
            layer.count_untrained()
        assert torch.equal(model(tokens), got) and torch.equal(got.view(torch.int32), bare.view(torch.int32))
        _randomise(model)
        finish_task(model)
        bare = model(tokens)
        assert not torch.equal(bare, got)


def test_noise_is_of_standard_deviation_ln_2_at_the_start_and_only_in_the_training_of_the_current_stack() -> None:
    zeros = torch.zeros(100, 4)
    torch.manual_seed(3)
    got = noisy(zeros, zeros)
    torch.manual_seed(3)
    torch.testing.assert_close(got, math.log(2) * torch.randn(100, 4))
    model = _stacked(Brainstacks(rank=2), frozen=2)
    x = torch.randn(9, _D, dtype=torch.float64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    with using_tasks(model, first=2):  # frozen ones, in training
        assert torch.equal(model.train()(x), model.eval()(x))
    quiet = _stacked(Brainstacks(rank=2, is_noisy=False), frozen=1).train()
    assert torch.equal(quiet(x), quiet(x)) and "noise" not in quiet[0].current


def test_frozen_stacks_drop_nothing_and_the_current_one_does() -> None:
    model = _stacked(Brainstacks(rank=2, dropout=0.5, is_noisy=False), frozen=2)
    x = torch.randn(9, _D, dtype=torch.float64)
    with using_tasks(model, first=2):
        assert torch.equal(model.train()(x), model.eval()(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stacks_are_trained_and_frozen_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).to(dtype)
    inject(model, Brainstacks(rank=2))
    start_task(model, "new")
    protect(model, {"0": torch.eye(10)[:2]})
    x = torch.randn(20, 12).to(dtype)
    for _ in range(2):
        (model.train()(x).float().square().mean() + penalty(model)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(model))
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(0.1)
    trained = model.eval()(x)
    finish_task(model)
    assert torch.equal(model(x), trained) and trained.dtype == model[0].sealed_up.dtype == dtype
    assert float(model[0].sealed_up[:, :2].abs().max()) == 0 < float(model[0].sealed_up.abs().max())


# -- load balance -----------------------------------------------------------------------------------------------------


@given(tokens=st.integers(0, 9), experts=st.integers(1, 5), top_k=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_balance_is_its_formula(tokens: int, experts: int, top_k: int, seed: int) -> None:
    top_k = min(top_k, experts)
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    gates = gate(logits, top_k)
    p, f = [0.0] * experts, [0.0] * experts
    for row in logits.tolist():
        total = sum(map(math.exp, row))
        for e, value in enumerate(row):
            p[e] += math.exp(value) / total / tokens
            f[e] += (sorted(row, reverse=True).index(value) < top_k) / tokens
    want = experts * sum(a * b for a, b in zip(p, f, strict=True))
    assert float(balance(gates)) == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert use_of_experts(gates).tolist() == pytest.approx(f)


def test_the_balance_is_k_where_routing_is_even_and_its_gradient_evens_it_out() -> None:
    even = Gates(
        *(torch.full((8, 4), 0.25) for _ in range(2)), torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]).repeat(4, 1)
    )
    assert float(balance(even)) == pytest.approx(2)
    logits = torch.randn(200, 4, dtype=torch.float64) + torch.tensor([2.0, 0, 0, -2])
    start = balance(gate(logits, 2))
    shift = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        (step,) = torch.autograd.grad(balance(gate(logits + shift, 2)), shift)
        shift = (shift - 0.5 * step).detach().requires_grad_()
    assert float(start) > 2.5 and float(balance(gate(logits + shift.detach(), 2))) < 2.05


def test_the_penalty_is_the_balance_of_all_layers_and_moves_the_router() -> None:
    method = Brainstacks(rank=2, balance=0.3, is_noisy=False)
    model = _stacked(method, frozen=1).train()
    x = torch.randn(7, _D, dtype=torch.float64)
    assert float(penalty(model)) == 0  # no pass yet
    seen = list[Tensor]()
    for layer in (model[0], model[2]):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    layers = zip((model[0], model[2]), seen, strict=True)
    want = sum(float(balance(method.gates(h, dict(layer.current), is_training=False)).detach()) for layer, h in layers)
    found = penalty(model)
    assert found.item() == pytest.approx(0.3 * want)
    found.backward()
    assert all(bool(layer.current["gate"].grad.any()) for layer in (model[0], model[2]))
    off = _stacked(Brainstacks(rank=2, balance=0.0), frozen=1).train()
    off(x)
    assert float(penalty(off)) == 0


def test_recomputed_activations_give_the_same_gradients_and_keep_the_first_cost() -> None:
    found = []
    for recompute in (False, True):
        model = Decoder(dataclasses.replace(TINY, activation_checkpointing=recompute))
        initialise(model, 0)
        inject(model, Brainstacks(rank=2, balance=1.0), ["wq", "w_up"])
        for name in ("a", "b"):
            start_task(model, name)
            torch.manual_seed(1)
            _randomise(model)
            if name == "a":
                finish_task(model)
        tokens = torch.arange(32).view(2, 16)
        torch.manual_seed(2)
        loss = model.train()(tokens, tokens + 1) + penalty(model)
        costs = [layer.cost for layer in adapters_of(model).layers.values()]
        loss.backward()
        assert all(layer.cost is cost for layer, cost in zip(adapters_of(model).layers.values(), costs, strict=True))
        found.append([p.grad for p in trainable_parameters(model)])
        copied = copy.deepcopy(model)  # a cost does not stand in the way
        assert float(penalty(copied)) == 0
    assert all(a is not None and torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


# -- projection -------------------------------------------------------------------------------------------------------


def _inside(delta: Tensor, basis: Tensor) -> float:
    return float((delta @ basis.T).square().sum() / delta.square().sum())


def _train(model: nn.Module, x: Tensor, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - 1).square().mean() + penalty(model)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("projection", "in_training", "in_evaluation"),
    [("output", True, True), ("train_only", True, False), ("off", False, False)],
)
def test_a_frozen_stack_stays_outside_the_protected_outputs_in_both_modes(
    projection: str, in_training: bool, in_evaluation: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    inject(model, Brainstacks(rank=2, projection=projection))
    basis = torch.linalg.qr(torch.randn(10, 3))[0].T.contiguous()
    start_task(model, "new")
    protect(model, {"0": basis})
    x = torch.randn(40, 12)
    _train(model, x)
    layer: AdaptedLinear = model[0]
    energies = [_inside((model.train(mode)(x) - layer.base(x)).detach(), basis) for mode in (True, False)]
    trained = model.eval()(x).detach()
    finish_task(model)
    assert torch.equal(model(x), trained)  # baking in is no change
    (part,) = layer.parts()
    frozen = layer.method.delta(x, part.bank, is_training=False)
    assert (energies[0] < 1e-6) == in_training
    assert (energies[1] < 1e-6) == in_evaluation == (_inside(frozen, basis) < 1e-6)
    assert "basis" not in part.bank  # V is needed no more


def test_the_input_side_leaves_protected_inputs_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    inject(model, Brainstacks(rank=2, projection="input"))
    basis = torch.linalg.qr(torch.randn(12, 3))[0].T.contiguous()
    start_task(model, "new")
    protect(model, {"0": basis})
    _train(model, torch.randn(40, 12))
    finish_task(model)
    old, new = torch.randn(9, 3) @ basis, outside(torch.randn(9, 12), basis)
    layer: AdaptedLinear = model[0]
    torch.testing.assert_close(model(old), layer.base(old), rtol=0, atol=1e-5)
    assert float((model(new) - layer.base(new)).abs().max()) > 0.1


@given(rows=st.integers(1, 60), width=st.integers(1, 20), count=st.integers(1, 6), seed=st.integers(0, 99))
def test_top_directions_are_singular_vectors_exact_or_randomised(rows: int, width: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    small = min(rows, width)
    left, right = (torch.linalg.qr(torch.randn(n, small, dtype=torch.float64))[0] for n in (rows, width))
    values = torch.logspace(0, -small / 2, small, dtype=torch.float64)
    found = top_directions(left * values @ right.T, count, seed=seed)
    kept = min(count, int((values > 1e-6).sum()))
    assert abs(len(found) - kept) <= (count > kept)  # one may lie on the bound
    torch.testing.assert_close(found @ found.T, torch.eye(len(found), dtype=torch.float64), rtol=0, atol=1e-8)
    want = right[:, : min(len(found), kept)]
    torch.testing.assert_close(
        (found @ want).norm(dim=0), torch.ones(want.shape[1], dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_randomised_directions_hold_what_the_best_ones_hold_of_a_slow_spectrum() -> None:
    torch.manual_seed(0)
    rows = torch.randn(300, 120, dtype=torch.float64) * torch.arange(1, 121, dtype=torch.float64) ** -0.4
    found = top_directions(rows, 10)
    best = torch.linalg.svdvals(rows)[:10].square().sum()
    assert 0.98 * best < (rows @ found.T).square().sum() <= best * (1 + 1e-9)


def test_many_rows_are_not_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[tuple[int, ...]]()
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x, **kw: sizes.append(tuple(x.shape)) or svd(x, **kw))
    top_directions(torch.randn(100, 500), 4)
    top_directions(torch.randn(8, 500), 4)
    assert sizes == [(12, 500), (8, 500)]


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that is computed."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_no_projector_of_the_outputs_width_is_ever_formed() -> None:
    width = 400
    model = nn.Sequential(nn.Linear(6, width))
    inject(model, Brainstacks(rank=2))
    for name in ("a", "b"):
        start_task(model, name)
        with _Largest() as computed:
            if name == "b":
                protect(model, protected_directions(model, {"a": lambda: model(torch.randn(30, 6))}, count=3))
            model.train()(torch.randn(5, 6)).sum().backward()
        _randomise(model)
        finish_task(model)
        assert 0 < computed.largest < width * width / 10


def test_protected_directions_are_what_the_frozen_stacks_add_on_each_domains_own_data() -> None:
    model = _stacked(Brainstacks(rank=2), frozen=2, d=9, o=8)
    layer: AdaptedLinear = model[0]
    for current in (model[0], model[2]):
        current.count_untrained()  # would act, if it were shown
    data = {"a": torch.randn(3, 6, 9, dtype=torch.float64), "b": torch.randn(3, 6, 9, dtype=torch.float64) + 2}
    model.train()
    found = protected_directions(model, {name: lambda x=x: model(x) for name, x in data.items()}, count=2)
    assert model.training and layer.shown is None
    want = []
    for x in data.values():
        with using_tasks(model, first=2), torch.no_grad():
            mean = (layer.eval()(x) - layer.base(x)).mean(1)
        want.append(torch.linalg.svd(mean)[2][:2])
    basis = torch.linalg.svd(torch.cat(want), full_matrices=False)[2].float()
    assert found["0"].shape == (4, 8) and found["2"].shape == (4, 9)
    torch.testing.assert_close(basis @ found["0"].T @ found["0"], basis, rtol=0, atol=1e-4)
    inputs = protected_directions(model, {"a": lambda: model(data["a"])}, count=2, side="input")
    want = torch.linalg.svd(data["a"].mean(1))[2][:2].float()
    torch.testing.assert_close((want @ inputs["0"].T @ inputs["0"]), want, rtol=0, atol=1e-5)


def test_directions_that_leave_nothing_are_refused_and_so_is_protection_without_a_task() -> None:
    model = _stacked(Brainstacks(rank=2), frozen=2)
    x = torch.randn(40, _D, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="leave nothing of 0, 2 to learn in"):
        protected_directions(model, {"a": lambda: model(x)}, count=5)
    with pytest.raises(ConfigurationError, match="bases of 2, 9 do not fit"):
        protect(model, {"0": torch.eye(_O)[:1], "2": torch.eye(_O)[:1], "9": torch.eye(_O)[:1]})
    finish_task(model)
    with pytest.raises(ConfigurationError, match="start one, then protect"):
        protect(model, {})


# -- weights and sizes ------------------------------------------------------------------------------------------------


def test_weights_choose_and_scale_stacks_and_nothing_is_the_base() -> None:
    model = _stacked(Brainstacks(rank=2), frozen=3)
    layer: AdaptedLinear = model.eval()[0]
    x = torch.randn(4, _D, dtype=torch.float64)
    deltas = [layer.method.delta(x, layer.task_rows(task), is_training=False) for task in range(3)]
    with using_tasks(model, weights={"t2": 0.25, "t0": 1.0}):
        assert torch.equal(layer(x), layer.base(x) + deltas[0] + deltas[2] * 0.25)
        assert footprint(model).active == sum(
            method.active(layer.task_rows(n))
            for n in (0, 2)
            for layer in (model[0], model[2])
            for method in [layer.method]
        )
    with using_tasks(model, weights={}):
        assert torch.equal(layer(x), layer.base(x))
    with using_tasks(model, weights={"t0": 1.0, "t1": 1.0, "t2": 1.0}):
        prefix = layer(x)
    with using_tasks(model, first=3):
        assert torch.equal(layer(x), prefix)
    problems = {"t9": 1.0, "t1": math.nan}
    with pytest.raises(ConfigurationError) as caught:
        use_tasks(model, weights=problems)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigurationError, match="go without"):
        use_tasks(model, weights={}, first=0)
    other = nn.Sequential(nn.Linear(2, 2))
    inject(other, create_method("mora"))
    with pytest.raises(ConfigurationError, match="computes its tasks together"):
        use_tasks(other, weights={})


def test_a_stack_of_the_papers_small_model_has_53_6_million_parameters() -> None:
    method, draw = Brainstacks(), torch.Generator()
    shapes = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 5632), (2048, 5632), (5632, 2048)]
    block = 0
    for d, o in shapes:
        new = method.begin(Site("x", d, o, torch.device("cpu"), torch.float32), {}, draw)
        block += sum(rows.numel() for rows in new.values())
        assert float(new["down"].abs().max()) <= d**-0.5 and float(new["gate"].std()) == pytest.approx(0.02, rel=0.05)
    assert 22 * block / 1e6 == pytest.approx(53.6, abs=0.05) and method.factor == 4


def test_wrong_options_are_named_together_and_a_merge_is_refused() -> None:
    wrong = {"rank": 0, "experts": 0, "top_k": 3, "balance": -1.0, "projection": "both"}
    with pytest.raises(ConfigurationError) as caught:
        create_method("brainstacks", wrong)
    assert len(caught.value.problems) == 5
    with pytest.raises(ConfigurationError, match="cannot be merged"):
        merge(_stacked(Brainstacks(rank=2), frozen=1))
