"""Atoms in groups, and MoRA's routing by others: against the formula, expert by expert in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.adapters import (
    AdaptedLinear,
    create_method,
    finish_task,
    footprint,
    inject,
    measure_routing,
    start_task,
    trainable_parameters,
    use_tasks,
)
from holdfast.adapters.methods.mora import MoRA
from holdfast.errors import ConfigurationError

_METHODS = ["mora", "mora_uniform", "mora_random", "mora_learned"]


def _adapted(name: str, *, tasks: int, d: int = 5, o: int = 4, seed: int = 0, **options: Any) -> AdaptedLinear:
    """A float64 layer with finished tasks of random numbers, and one more that is current."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d, o, dtype=torch.float64))
    inject(model, create_method(name, options))
    for number in range(tasks + 1):
        start_task(model, f"task {number}", seed=seed)
        with torch.no_grad():
            model[0].current["up"].normal_()
        if number < tasks:
            finish_task(model)
    layer: AdaptedLinear = model[0]
    return layer


def expert_reference(layer: AdaptedLinear, x: Tensor, *, is_training: bool) -> Tensor:
    """What one token is given, from what is stored: one expert, and in it one atom, after the other."""
    method = layer.method
    assert isinstance(method, MoRA)
    current = {name: t.detach() for name, t in layer.current.items()}
    stored, g = layer.sealed(), method.group
    down = [*stored.get("down", ()), *current["down"]]
    up = [*stored.get("up", ()), *(current["up"] * method.scale)]
    z = [float(a @ x) for a in down]
    experts = [list(range(first, first + g)) for first in range(0, len(down), g)]
    if method.name in ("mora_random", "mora_learned"):
        keys = [*stored.get("router", ()), *current["router"]]
        assert len(keys) == len(experts)
        r = [float(key @ x) for key in keys]
    else:
        r = [math.sqrt(sum(z[i] ** 2 for i in atoms)) if g > 1 else z[atoms[0]] for atoms in experts]
    norm = math.sqrt(sum(value**2 for value in r))
    s = [value / norm if norm else 0.0 for value in r]
    best = sorted(range(len(s)), key=lambda e: -s[e])[: method.top_k]
    mass = {e: math.exp(s[e] / method.temperature) for e in best}
    w = {e: mass[e] / sum(mass.values()) for e in best}
    if not is_training:
        w = {e: w[e] for e in best if s[e] >= method.threshold}
    if method.name == "mora_uniform":
        w = {e: 1 / len(experts) for e in range(len(experts))}
    return sum((w[e] * z[i] * up[i] for e in w for i in experts[e]), torch.zeros_like(up[0]))


@given(
    name=st.sampled_from(_METHODS),
    d=st.integers(1, 5),
    rank_and_group=st.sampled_from([(1, 1), (3, 1), (2, 2), (4, 2), (6, 3), (6, 2)]),
    tasks=st.integers(0, 2),
    k=st.integers(1, 9),
    tau=st.sampled_from([0.03, 0.2, 1.0]),
    delta=st.sampled_from([-1.0, 0.0, 0.3]),
    is_training=st.booleans(),
    shape=st.sampled_from([(), (3,), (2, 2), (0,)]),
    seed=st.integers(0, 1000),
)
def test_each_variant_is_the_sum_over_its_experts(
    name: str,
    d: int,
    rank_and_group: tuple[int, int],
    tasks: int,
    k: int,
    tau: float,
    delta: float,
    is_training: bool,
    shape: tuple[int, ...],
    seed: int,
) -> None:
    rank, group = rank_and_group
    options = {"rank": rank, "group": group, "top_k": k, "temperature": tau, "threshold": delta, "scale": 1.5}
    layer = _adapted(name, tasks=tasks, d=d, seed=seed, **options).train(is_training)
    layer.count_untrained()
    x = torch.randn(*shape, d, dtype=torch.float64)
    got, want = layer(x), layer.base(x).clone()
    for at in range(math.prod(shape)):
        want.view(-1, 4)[at] += expert_reference(layer, x.reshape(-1, d)[at], is_training=is_training)
    assert got.shape == (*shape, 4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", _METHODS)
@pytest.mark.parametrize("group", [1, 2])
def test_gradients_are_those_of_finite_differences_and_only_what_is_trained_has_one(name: str, group: int) -> None:
    layer = _adapted(name, tasks=1, rank=4, group=group, top_k=2, seed=3).train()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    parameters = {key: p for key, p in layer.current.items() if p.requires_grad}
    assert set(parameters) == {"down", "up"} | ({"router"} if name == "mora_learned" else set())

    def through(x: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    assert torch.autograd.gradcheck(through, (x, *parameters.values()))
    if name == "mora_learned":
        (grad,) = torch.autograd.grad(layer(x).square().sum(), parameters["router"])
        assert bool(grad.any())


@pytest.mark.parametrize("name", _METHODS)
def test_a_zero_input_gives_the_base_and_finite_gradients_for_groups_too(name: str) -> None:
    layer = _adapted(name, tasks=1, rank=4, group=2, top_k=2)
    for is_training in (True, False):
        layer.train(is_training).zero_grad()
        x = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert torch.equal(y, layer.base(x))
        assert all(torch.isfinite(t.grad).all() for t in (x, *layer.current.values()) if t.grad is not None)


@pytest.mark.parametrize("name", _METHODS)
def test_keys_are_frozen_with_their_task_and_a_prefix_replays_it(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4))
    inject(model, create_method(name, {"rank": 4, "group": 2, "top_k": 2, "threshold": 0.0}))
    x, replays, keys = torch.randn(6, 5), [], []
    for task in ("a", "b"):
        start_task(model, task)
        first = {key: t.detach().clone() for key, t in model[0].current.items()}
        optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(x).square().sum().backward()
            optimizer.step()
        changed = {key for key, t in model[0].current.items() if not torch.equal(t, first[key])}
        assert changed == {"down", "up"} | ({"router"} if name == "mora_learned" else set())
        finish_task(model)
        replays.append(model.eval()(x))
        keys.append({key: t.clone() for key, t in model[0].task_rows(len(replays) - 1).items()})
    use_tasks(model, first=1)
    assert torch.equal(model(x), replays[0])
    assert all(torch.equal(t, keys[0][key]) for key, t in model[0].task_rows(0).items())
    if "router" in keys[0]:
        assert keys[0]["router"].shape == (2, 5) and not torch.equal(keys[0]["router"], keys[1]["router"])


def test_a_group_that_is_the_whole_bank_is_a_lora_and_groups_of_one_are_atoms() -> None:
    whole = _adapted("mora", tasks=0, rank=4, group=4, top_k=3, threshold=0.9).eval()
    whole.count_untrained()
    x = torch.randn(6, 5, dtype=torch.float64)
    low_rank = x @ whole.current["down"].T @ whole.current["up"]
    torch.testing.assert_close(whole(x) - whole.base(x), low_rank, rtol=0, atol=1e-12)
    method, z = MoRA(rank=4, group=2, top_k=2), torch.tensor([[3.0, -4.0, 0.0, 1.0]])
    assert method.responses(z, z, {}).tolist() == [[5.0, 1.0]]
    assert MoRA(rank=4).responses(z, z, {}) is z
    assert method.responses(z, z.bfloat16(), {}).dtype == torch.float32


@pytest.mark.parametrize("name", _METHODS)
def test_mass_is_measured_by_experts_and_uniform_weights_are_chance(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64))
    inject(model, create_method(name, {"rank": 4, "group": 2, "top_k": 2, "threshold": 0.1}))
    for task in ("a", "b", "c"):
        start_task(model, task)
        model[0].current["up"].data.normal_()
        finish_task(model)
    x, layer = torch.randn(9, 5, dtype=torch.float64), model[0]
    with measure_routing(model.eval()) as found:
        model(x)
    stats, bank = found["0"], layer.sealed()
    r = layer.method.responses(x, x @ bank["down"].T, bank)
    want, atoms = [0.0, 0.0, 0.0], 0.0
    for row in (r / r.norm(dim=-1, keepdim=True)).tolist():
        best = sorted(range(6), key=lambda e, row=row: -row[e])[:2]
        mass = {e: math.exp(row[e] / 0.2) for e in best}
        w = {e: mass[e] / sum(mass.values()) for e in best}
        if name == "mora_uniform":
            w = dict.fromkeys(range(6), 1 / 6)
        for e, weight in w.items():
            want[e // 2] += weight / 9
        atoms += 1 / sum(weight**2 for weight in w.values()) / 9
    assert stats.tokens == 9 and stats.mass_by_task == pytest.approx(want)
    assert stats.effective_atoms == pytest.approx(atoms)
    if name == "mora_uniform":
        assert stats.mass_by_task == pytest.approx([1 / 3] * 3) and stats.answered_share == 1.0


def test_what_a_token_reads_is_counted() -> None:
    keys, values, routers = 12 * 5, 4 * 4, 6 * 5
    for name, want in zip(_METHODS, [keys + values, keys + 12 * 4, *[keys + values + routers] * 2], strict=True):
        layer = _adapted(name, tasks=2, rank=4, group=2, top_k=2)
        model = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64))
        inject(model, layer.method)
        start_task(model, "now")
        assert footprint(model).trainable == 4 * 9 + (2 * 5 if name == "mora_learned" else 0)
        layer.count_untrained()
        assert layer.method.active(layer.bank()) == want


@pytest.mark.parametrize(
    ("scaled", "temperature", "threshold"),
    [(False, 0.2, 0.4), (True, 0.1, 0.2), ("temperature", 0.1, 0.4), ("threshold", 0.2, 0.2)],
)
def test_temperature_and_threshold_scale_with_the_bank_together_or_alone(
    scaled: bool | str, temperature: float, threshold: float
) -> None:
    """√(rank / rows) is a half with four tasks of two experts each."""
    method = MoRA(rank=4, group=2, top_k=8, temperature=0.2, threshold=0.4, scales_with_bank=scaled)
    r = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = method.route(r)
    want = (routing.scores / temperature).softmax(-1)
    torch.testing.assert_close(routing.weights, want)
    assert torch.equal(method.answers(routing, 8), routing.scores >= threshold)
    assert 0 < int(method.answers(routing, 8).sum()) < 40


def test_groups_that_would_span_tasks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"group=3 must be at least 1 and divide rank=8"):
        MoRA(group=3)
    with pytest.raises(ConfigurationError) as caught:
        MoRA(group=0, scales_with_bank="both")
    assert len(caught.value.problems) == 2
