"""Each method against its formula, row by row in float64, and the gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.adapters import (
    AdaptedLinear,
    Method,
    collect_inputs,
    create_method,
    finish_task,
    inject,
    measure_routing,
    penalty,
    start_task,
    trainable_parameters,
    use_tasks,
)
from holdfast.adapters.methods.mora import MoRA
from holdfast.adapters.routing import effective_atoms, route, scores
from holdfast.errors import ConfigurationError


def _adapted(method: Method, *, tasks: int, d: int = 5, o: int = 4, bias: bool = True, seed: int = 0) -> AdaptedLinear:
    """A float64 layer with finished tasks of random numbers, and one more that is current."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(d, o, bias=bias, dtype=torch.float64))
    inject(model, method)
    for number in range(tasks + 1):
        if method.needs_inputs:
            with collect_inputs(model):
                model(torch.randn(50, d, dtype=torch.float64))
        start_task(model, f"task {number}", seed=seed)
        layer: AdaptedLinear = model[0]
        with torch.no_grad():
            layer.current["up"].normal_()
        if number < tasks:
            if method.needs_inputs:
                with collect_inputs(model):
                    model(torch.randn(50, d, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, d).double()))
            finish_task(model)
    return layer


class NegativeZeros(nn.Linear):
    """A base with outputs that a sum with zero would change."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x).relu()


def _rows(layer: AdaptedLinear) -> list[tuple[Tensor, Tensor]]:
    """(a_i, c b_i), oldest first, straight from what is stored."""
    scale = layer.method.scale  # type: ignore[attr-defined]
    current = list(zip(layer.current["down"].detach(), layer.current["up"].detach() * scale, strict=True))
    old = layer.sealed()
    return [*zip(old["down"], old["up"], strict=True), *current] if old else current


def mora_reference(x: Tensor, rows: Sequence[tuple[Tensor, Tensor]], k: int, tau: float, delta: float | None) -> Tensor:
    """Steps 1 to 6, one atom at a time; ``delta`` None in training."""
    z = [float(a @ x) for a, _ in rows]
    norm = math.sqrt(sum(value * value for value in z))
    s = [value / norm if norm else 0.0 for value in z]
    best = sorted(range(len(s)), key=lambda i: -s[i])[: min(k, len(s))]
    mass = {i: math.exp(s[i] / tau) for i in best}
    w = {i: mass[i] / sum(mass.values()) for i in best}
    if delta is not None:
        w = {i: w[i] for i in best if s[i] >= delta}
    return sum((w[i] * z[i] * rows[i][1] for i in w), torch.zeros_like(rows[0][1]))


@given(
    d=st.integers(1, 6),
    o=st.integers(1, 5),
    rank=st.integers(1, 4),
    tasks=st.integers(0, 3),
    k=st.integers(1, 20),
    tau=st.sampled_from([0.03, 0.2, 1.0]),
    delta=st.sampled_from([-1.0, 0.0, 0.2, 0.6]),
    is_training=st.booleans(),
    span=st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)),
    shape=st.sampled_from([(3,), (2, 3), (0,)]),
    seed=st.integers(0, 1000),
)
def test_mora_is_the_sum_over_its_atoms(
    d: int,
    o: int,
    rank: int,
    tasks: int,
    k: int,
    tau: float,
    delta: float,
    is_training: bool,
    span: tuple[int, int] | None,
    shape: tuple[int, ...],
    seed: int,
) -> None:
    method = MoRA(rank=rank, top_k=k, temperature=tau, threshold=delta, scale=1.5)
    layer = _adapted(method, tasks=tasks, d=d, o=o, seed=seed)
    layer.train(is_training)
    layer.count_untrained()
    layer.show(span)
    rows = _rows(layer) if span is None else _rows(layer)[rank * span[0] : rank * span[1]]
    x = torch.randn(*shape, d, dtype=torch.float64)
    got = layer(x)
    want = layer.base(x)
    for at in range(x[..., 0].numel() if rows else 0):
        flat = x.reshape(-1, d)[at]
        want.view(-1, o)[at] += mora_reference(flat, rows, k, tau, None if is_training else delta)
    assert got.shape == (*shape, o)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_all_scores_negative_still_selects_the_largest() -> None:
    method = MoRA(rank=2, top_k=2, threshold=-1.0, temperature=0.2)
    layer = _adapted(method, tasks=1, d=4)
    x = torch.ones(4, dtype=torch.float64)
    with torch.no_grad():
        for down in (layer.sealed()["down"], layer.current["down"]):
            down.copy_(-down.abs() - 0.1)
    assert float(scores(x @ layer.bank()["down"].T).amax().detach()) < 0
    want = layer.base(x) + mora_reference(x, _rows(layer), 2, 0.2, None)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(7,), (2, 3), ()])
@pytest.mark.parametrize("is_training", [False, True])
def test_gathering_values_is_the_dense_product_with_its_gradients(
    shape: tuple[int, ...], is_training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = MoRA(rank=40, top_k=2, threshold=0.1)
    layer = _adapted(method, tasks=0, d=6).train(is_training)
    layer.count_untrained()
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    calls = []
    bag = nn.functional.embedding_bag
    monkeypatch.setattr(nn.functional, "embedding_bag", lambda *args, **kw: calls.append(1) or bag(*args, **kw))
    found = []
    for least in (8, 10**6):
        monkeypatch.setattr("holdfast.adapters.methods.mora._GATHER_FROM", {False: least, True: least})
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.current.values()))))
    assert len(calls) == 1
    for gathered, dense in zip(*found, strict=True):
        torch.testing.assert_close(gathered, dense, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), found[0][0].detach(), rtol=0, atol=1e-12)


def test_a_zero_input_gives_the_base_and_finite_gradients() -> None:
    for threshold in (-1.0, 0.0, 0.2):
        layer = _adapted(MoRA(rank=2, top_k=3, threshold=threshold), tasks=1)
        for is_training in (True, False):
            layer.train(is_training).zero_grad()
            x = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert torch.equal(y, layer.base(x))
            assert all(torch.isfinite(t.grad).all() for t in (x, *layer.current.values()) if t.grad is not None)


@given(st.integers(0, 100), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_where_nothing_passes_the_output_is_the_bases_bit_by_bit(seed: int, dtype: torch.dtype) -> None:
    layer = _adapted(MoRA(rank=8, top_k=4, threshold=1.0), tasks=1, seed=seed).eval()
    layer.base = NegativeZeros(5, 4)
    x = torch.randn(6, 5, dtype=dtype)
    got, want = layer.to(dtype)(x), layer.base(x)
    assert bool(torch.signbit(want).any())
    assert torch.equal(got, want) and torch.equal(torch.signbit(got), torch.signbit(want))


def test_below_the_threshold_weights_are_not_made_up_for() -> None:
    method = MoRA(rank=3, top_k=3, threshold=0.5, temperature=0.2)
    layer = _adapted(method, tasks=0, d=3, o=2).eval()
    layer.count_untrained()
    with torch.no_grad():
        layer.current["down"].copy_(torch.eye(3))
        layer.current["up"].copy_(torch.ones(3, 2))
    x = torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)  # scores 0.83, 0.55, 0
    weights = (x / x.norm() / 0.2).softmax(0)
    want = float(3 * weights[0] + 2 * weights[1])
    torch.testing.assert_close(layer(x) - layer.base(x), torch.full((2,), want, dtype=torch.float64))


@pytest.mark.parametrize("name", ["freeze_and_add", "olora", "oracle", "lora", "inflora"])
@pytest.mark.parametrize("tasks", [0, 2])
def test_low_rank_methods_are_sums_over_rows(name: str, tasks: int) -> None:
    layer = _adapted(create_method(name, {"rank": 2, "scale": 0.5}), tasks=tasks)
    x = torch.randn(3, 5, dtype=torch.float64)
    rows = _rows(layer)
    if name in ("oracle", "lora"):
        rows = rows[-2:]
    want = layer.base(x) + sum(torch.outer(x @ a, b) for a, b in rows)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mora", "freeze_and_add", "olora", "inflora"])
def test_gradients_are_those_of_finite_differences_and_reach_the_input_through_old_rows(name: str) -> None:
    options = {"top_k": 3} if name == "mora" else {}
    layer = _adapted(create_method(name, {"rank": 2, **options}), tasks=2, seed=3).train()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert parameters == [p for key, p in layer.current.items() if key in layer.method.trains]

    def through(x: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    assert torch.autograd.gradcheck(through, (x, *parameters))
    with torch.no_grad():
        layer.current["up"].zero_()
    (from_bank,) = torch.autograd.grad(layer(x).sum(), x)
    (from_base,) = torch.autograd.grad(layer.base(x).sum(), x)
    assert float((from_bank - from_base).abs().min()) > 0


def test_frozen_numbers_get_no_gradient_and_keep_their_bits_while_new_ones_train() -> None:
    layer = _adapted(MoRA(rank=2, top_k=1), tasks=2, d=16).train()
    frozen = {name: t.clone() for name, t in layer.state_dict().items() if not name.startswith("current.")}
    x = layer.current["down"][0].detach() + 0.01 * torch.randn(8, 16, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = {name: t.detach().clone() for name, t in layer.current.items()}
    selected = set(route(x @ layer.bank()["down"].T, top_k=1, temperature=0.2).index.flatten().tolist())
    assert selected == {4}
    layer(x).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(layer.state_dict()[name], t) for name, t in frozen.items())
    assert not any(t.requires_grad for name, t in layer.named_buffers()) and layer.weight.grad is None
    for row in range(2):
        grad = layer.current["up"].grad
        assert grad is not None
        assert bool(grad[row].any()) == (4 + row in selected)
    assert any(not torch.equal(t, before[name]) for name, t in layer.current.items())


def test_routing_gradient_includes_the_norm_that_unselected_keys_share() -> None:
    z = torch.tensor([[1.0, 0.5, 0.2, -0.3]], dtype=torch.float64, requires_grad=True)
    weights = route(z, top_k=2, temperature=0.2).weights
    (grad,) = torch.autograd.grad(weights[0, 0], z)
    assert float(grad[0, 3].abs()) > 0 and float(grad[0, 2].abs()) > 0
    assert torch.autograd.gradcheck(lambda z: route(z, top_k=2, temperature=0.2).weights, (z,))


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 10))
def test_scores_have_norm_one_and_effective_atoms_lie_between_one_and_k(rows: int, k: int, tau: float) -> None:
    z = torch.randn(5, rows, dtype=torch.float64)
    torch.testing.assert_close(scores(z).norm(dim=-1), torch.ones(5, dtype=torch.float64))
    atoms = effective_atoms(route(z, top_k=k, temperature=tau).weights)
    assert bool((atoms >= 1 - 1e-12).all()) and bool((atoms <= min(k, rows) + 1e-9).all())


def test_scaling_with_the_bank_leaves_the_first_task_alone_and_lowers_the_threshold_later() -> None:
    plain, scaled = (MoRA(rank=2, top_k=8, scales_with_bank=scales) for scales in (False, True))
    z = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled.route(z[:, :2]).weights, plain.route(z[:, :2]).weights)
    want = route(z, top_k=8, temperature=0.1)
    torch.testing.assert_close(scaled.route(z).weights, want.weights)
    assert torch.equal(scaled.answers(want, 8), want.scores >= 0.1)
    assert bool((want.scores < -0.5).any())
    assert bool(MoRA(rank=2, top_k=8, threshold=-1.0, scales_with_bank=True).answers(want, 8).all())


def test_untrained_rows_stay_out_of_evaluation_and_trained_ones_do_not() -> None:
    layer = _adapted(MoRA(rank=2, top_k=2), tasks=1)
    x = torch.randn(6, 5, dtype=torch.float64)
    layer.eval()
    old = layer(x)
    layer.train()(x).sum().backward()
    new = layer.eval()(x)
    assert not torch.equal(old, new)
    layer.show((0, 1))
    assert torch.equal(layer(x), old)


def test_dropout_acts_on_the_input_in_training_only() -> None:
    layer = _adapted(MoRA(rank=2, top_k=2, dropout=0.5, threshold=-1.0), tasks=0)
    x = torch.ones(64, 5, dtype=torch.float64)
    torch.manual_seed(1)
    y = layer.train()(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    want = layer.base(x) + torch.stack([mora_reference(row, _rows(layer), 2, 0.2, None) for row in dropped])
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.eval()(x), layer(x[:1]).expand(64, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_squared", [False, True])
def test_olora_penalises_overlap_with_every_earlier_row(is_squared: bool) -> None:
    method = create_method("olora", {"rank": 2, "orthogonality": 0.7, "is_squared": is_squared})
    layer = _adapted(method, tasks=2)
    old, new = layer.sealed()["down"], layer.current["down"]
    overlaps = [float(a @ b) for a in new.detach() for b in old]
    want = 0.7 * sum(value**2 if is_squared else abs(value) for value in overlaps)
    found = method.penalty(dict(layer.current), layer.sealed())
    assert found is not None and found.item() == pytest.approx(want, rel=1e-12) and found.item() > 0
    # Downhill is towards orthogonal rows.
    (grad,) = torch.autograd.grad(found, new)
    assert method.penalty({"down": new - 1e-3 * grad}, layer.sealed()) < found
    within = torch.linalg.svd(old)[2][len(old) :]  # orthogonal to every old row
    assert float(method.penalty({"down": within}, layer.sealed())) == pytest.approx(0, abs=1e-10)


def test_inflora_keeps_out_of_the_inputs_of_earlier_tasks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4, dtype=torch.float64))
    inject(model, create_method("inflora", {"rank": 3, "energy": 1.0}))
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    first = torch.randn(40, 2, dtype=torch.float64) @ basis[:2]  # lives in two dimensions
    second = torch.randn(40, 4, dtype=torch.float64) @ basis[:4]  # in these and two others
    outputs = []
    for name, x in (("first", first), ("second", second)):
        with collect_inputs(model):
            model(x)
        start_task(model, name)
        layer: AdaptedLinear = model[0]
        assert trainable_parameters(model) == [layer.current["up"]] and float(penalty(model)) == 0
        with torch.no_grad():
            layer.current["up"].normal_()
        model.train()(first)
        outputs.append(model(first))
        with collect_inputs(model):
            model(x)
        finish_task(model)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-10)
    one, two = layer.task_rows(0), layer.task_rows(1)
    assert len(one["basis"]) == 2 and len(two["basis"]) == 2
    memory = layer.sealed()["basis"]
    torch.testing.assert_close(memory @ memory.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    # Two directions were left for three rows: the third is zero, and the others span them.
    assert not two["down"][2].any()
    torch.testing.assert_close(two["down"][:2] @ basis[:2].T, torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(two["down"].norm(dim=1)[:2], torch.full((2,), 3**-0.5, dtype=torch.float64))


def test_inflora_takes_the_strongest_directions_and_remembers_the_asked_share() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2, dtype=torch.float64))
    inject(model, create_method("inflora", {"rank": 2, "energy": 0.9}))
    x = torch.diag(torch.tensor([1.0, 5.0, 2.0, 4.0, 0.1], dtype=torch.float64))  # energies 1, 25, 4, 16, 0.01 of 46.01
    for use in (start_task, finish_task):
        with collect_inputs(model):
            model(x)
        if use is start_task:
            start_task(model, "only")
            torch.testing.assert_close(
                model[0].current["down"].abs() * 3**0.5, torch.eye(5, dtype=torch.float64)[[1, 3]], rtol=0, atol=1e-10
            )
            model[0].current["up"].data.fill_(1)
        else:
            finish_task(model)
    # 25 + 16 is 89 %, with 4 it is 98 %.
    torch.testing.assert_close(model[0].sealed()["basis"].abs(), torch.eye(5, dtype=torch.float64)[[1, 3, 2]])


def test_measured_routing_tells_atoms_answers_and_whose_they_are() -> None:
    layer = _adapted(MoRA(rank=2, top_k=4, threshold=0.5, temperature=0.3), tasks=2)
    model = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64))
    inject(model, layer.method)
    for task in range(2):
        model[0].append(layer.task_rows(task))
    x = torch.randn(9, 5, dtype=torch.float64)
    with measure_routing(model) as found:
        model.eval()(x[:4])
        model(x[4:])
    stats = found["0"]
    routing = route(x @ layer.sealed()["down"].T, top_k=4, temperature=0.3)
    per_token = [1 / sum(float(w) ** 2 for w in row) for row in routing.weights]
    old = [
        sum(float(w) for w, i in zip(*row, strict=True) if i < 2)
        for row in zip(routing.weights, routing.index, strict=True)
    ]
    assert stats.tokens == 9 and stats.effective_atoms == pytest.approx(sum(per_token) / 9)
    assert stats.mass_by_task == pytest.approx([sum(old) / 9, 1 - sum(old) / 9])
    assert stats.answered_share == pytest.approx(float((routing.scores.amax(-1) >= 0.5).double().mean()))
    use = create_method("lora")
    other = nn.Sequential(nn.Linear(2, 2))
    inject(other, use)
    with pytest.raises(ConfigurationError, match="lora does not route"), measure_routing(other):
        pass


@pytest.mark.parametrize(
    ("name", "options", "problems"),
    [
        ("mora", {"rank": 0, "top_k": 0, "temperature": 0.0, "threshold": 2.0}, 4),
        ("lora", {"scale": math.nan, "dropout": 1.0}, 2),
        ("olora", {"orthogonality": -1.0}, 1),
        ("inflora", {"energy": 0.0}, 1),
        ("mora", {"tau": 1, "delta": 2}, 2),
        ("moral", {}, 1),
    ],
)
def test_wrong_options_are_named_together(name: str, options: dict[str, float], problems: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        create_method(name, options)
    assert len(caught.value.problems) == problems
    assert all(name in problem for problem in caught.value.problems)


def test_an_oracle_has_to_be_told_the_task() -> None:
    layer = _adapted(create_method("oracle", {"rank": 2}), tasks=2)
    model = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64))
    inject(model, layer.method)
    start_task(model, "a")
    model[0].current["up"].data.fill_(1)
    finish_task(model)
    x = torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="only="):
        model(x)
    use_tasks(model, only="a")
    assert not torch.equal(model(x), model[0].base(x))
    use_tasks(model, first=0)
    assert torch.equal(model(x), model[0].base(x))
