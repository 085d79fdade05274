"""Sequences of tasks: starting, training, finishing, replaying."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adapters import (
    abandon_task,
    adapters_of,
    boundary_jump,
    collect_inputs,
    create_method,
    finish_task,
    footprint,
    inject,
    load_adapters,
    method_names,
    penalty,
    register,
    registry,
    save_adapters,
    start_task,
    trainable_parameters,
    use_tasks,
    using_tasks,
)
from holdfast.adapters.low_rank import LowRank
from holdfast.adapters.method import Site, Tensors
from holdfast.errors import ConfigurationError, InvariantViolation
from holdfast.optim import AdamW8bit
from holdfast.trainer.model import Decoder, initialise
from tests.support.tiny_training import TINY

_TASKS = ("sums", "differences")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def _data(task: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(len(task))
    x = torch.randn(64, 6, generator=draw) + (2.0 if task == "sums" else -2.0)
    first, second = x[:, :3].sum(1), x[:, 3:].sum(1)
    return x, torch.stack([first + second, first] if task == "sums" else [first - second, second], dim=1) / 3


def _loss(model: nn.Module, task: str) -> Tensor:
    x, y = _data(task)
    return F.mse_loss(model(x), y)


def _learn(model: nn.Module, task: str, steps: int = 60) -> None:
    """As a caller would: new parameters, new optimizer, loss and penalty."""
    _collect(model, task)
    start_task(model, task, seed=1)
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=2e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (_loss(model, task) + penalty(model)).backward()
        optimizer.step()
    model.eval()


def _collect(model: nn.Module, task: str) -> None:
    if adapters_of(model).method.needs_inputs:
        with collect_inputs(model), torch.no_grad():
            use_tasks(model)
            model(_data(task)[0])


def _finish(model: nn.Module, task: str) -> None:
    _collect(model, task)
    finish_task(model)


def _output(model: nn.Module, task: str) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.eval()(_data(task)[0])
        return y


def test_every_method_of_the_folder_is_registered() -> None:
    assert method_names() == [
        "brainstacks",
        "freeze_and_add",
        "inflora",
        "lora",
        "mora",
        "mora_learned",
        "mora_random",
        "mora_uniform",
        "olora",
        "oracle",
    ]


@pytest.mark.parametrize("name", method_names())
def test_two_tasks_one_after_the_other(name: str) -> None:
    model = _model()
    base = {key: t.clone() for key, t in model.state_dict().items()}
    bare = {task: float(_loss(model, task).detach()) for task in _TASKS}
    method = create_method(name, {"rank": 3, **({"energy": 0.8} if name == "inflora" else {})})
    inject(model, method)
    outputs = list[Tensor]()
    used = set[int]()
    for number, task in enumerate(_TASKS):
        use_tasks(model, first=number if not method.needs_task else 0)
        started = float(_loss(model, task).detach())
        _learn(model, task)
        parameters = trainable_parameters(model)
        assert used.isdisjoint(map(id, parameters))
        used |= set(map(id, parameters))
        learned = float(_loss(model, task).detach())
        assert learned < 0.7 * started
        trained = _output(model, task)
        _finish(model, task)
        use_tasks(model, **({"only": task} if method.needs_task else {"first": number + 1}))
        # Freezing changes nothing: what was validated is what is kept.
        assert torch.equal(_output(model, task), trained)
        assert trainable_parameters(model) == []
        outputs.append(trained)
    if method.keeps_tasks:
        with using_tasks(model, **({"only": _TASKS[0]} if method.needs_task else {"first": 1})):
            assert torch.equal(_output(model, _TASKS[0]), outputs[0])
    else:
        with pytest.raises(ConfigurationError, match="has overwritten 'sums' by 'differences'"):
            use_tasks(model, first=1)
    assert torch.equal(_output(model, _TASKS[1]), outputs[1])
    for layer in adapters_of(model).layers.values():
        assert torch.equal(layer.weight, base[f"{layer.name}.weight"])
    use_tasks(model, first=0)
    assert float(_loss(model, _TASKS[0]).detach()) == bare[_TASKS[0]]


@pytest.mark.parametrize("name", [n for n in method_names() if n not in ("lora", "oracle")])
def test_prefixes_of_many_tasks_replay_what_was_computed_then(name: str) -> None:
    model = _model()
    inject(model, create_method(name, {"rank": 2}))
    x = _data("sums")[0]
    outputs = [model(x)]
    for number in range(4):
        _collect(model, "sums")
        start_task(model, f"t{number}")
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter))
        _finish(model, "sums")
        outputs.append(_output(model, "sums"))
    for first, want in enumerate(outputs):
        with using_tasks(model, first=first):
            assert torch.equal(_output(model, "sums"), want)
    assert torch.equal(_output(model, "sums"), outputs[-1])
    with using_tasks(model, only="t0"):
        assert torch.equal(_output(model, "sums"), outputs[1])


@pytest.mark.parametrize("name", method_names())
def test_a_decoder_learns_and_replays_its_tasks(name: str) -> None:
    model = Decoder(TINY)
    initialise(model, 0)
    method = create_method(name, {"rank": 3})
    inject(model, method, ["wq", "wv", "w_down"])
    outputs = []
    for task in range(3):
        tokens = torch.arange(task, task + 32).view(2, 16)
        start, finish = (lambda task=task: start_task(model, f"t{task}")), (lambda: finish_task(model))
        for step in (start, finish):
            use_tasks(model, first=0)
            with collect_inputs(model), torch.no_grad():
                model(tokens)
            use_tasks(model)
            if step is finish:
                outputs.append(_logits(model))
            step()
            if step is start:
                before = model.train()(tokens, tokens + 1)
                optimizer = AdamW8bit(trainable_parameters(model), lr=1e-2)
                for _ in range(4):
                    optimizer.zero_grad()
                    (model(tokens, tokens + 1) + penalty(model)).backward()
                    optimizer.step()
                assert float(model(tokens, tokens + 1).detach()) < float(before.detach())
    if not method.keeps_tasks:
        outputs = outputs[-1:]
    for task in range(3 - len(outputs), 3):
        with using_tasks(model, **({"only": f"t{task}"} if method.needs_task else {"first": task + 1})):
            assert torch.equal(_logits(model), outputs[task - 3])


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(torch.arange(100, 132).view(2, 16))
    return logits


def test_recomputed_activations_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        model = Decoder(dataclasses.replace(TINY, activation_checkpointing=recompute))
        initialise(model, 0)
        inject(model, create_method("mora", {"rank": 2}), ["wq", "w_up"])
        start_task(model, "a")
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(0.1)
        tokens = torch.arange(32).view(2, 16)
        model.train()(tokens, tokens + 1).backward()
        found.append([p.grad for p in trainable_parameters(model)])
    assert all(a is not None and torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_a_new_method_is_one_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a tensor of its own, which the layer, the files and the counts carry without knowing it."""
    monkeypatch.setattr("holdfast.adapters.registry._CLASSES", dict(registry._CLASSES))

    @register("gated")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Gated(LowRank):
        trains = frozenset({"down", "up", "gate"})

        def begin(self, site: Site, sealed: Tensors, generator: torch.Generator) -> Tensors:
            return {**super().begin(site, sealed, generator), "gate": torch.zeros(1, site.in_features)}

        def delta(self, x_PD: Tensor, bank: Tensors, *, is_training: bool) -> Tensor:
            opened = F.linear(x_PD, bank["gate"]).sigmoid().mean(-1, keepdim=True)
            return opened * super().delta(x_PD, bank, is_training=is_training)

    model = _model()
    inject(model, create_method("gated", {"rank": 2}))
    for task in _TASKS:
        _learn(model, task, steps=3)
        finish_task(model)
    assert footprint(model).stored == 2 * (2 * (6 + 16) + 6 + 2 * (16 + 2) + 16)
    save_adapters(model, tmp_path)
    fresh = _model()
    load_adapters(fresh, tmp_path)
    assert torch.equal(_output(fresh, "sums"), _output(model, "sums"))
    with pytest.raises(InvariantViolation, match="two adapter methods are called 'gated'"):
        register("gated")(LowRank)


def test_an_abandoned_task_leaves_no_trace() -> None:
    for name in method_names():
        model = _model()
        inject(model, create_method(name, {"rank": 2}))
        _learn(model, "sums", steps=3)
        _finish(model, "sums")
        use_tasks(model, only="sums")
        before = _output(model, "sums")
        _learn(model, "differences", steps=3)
        assert not torch.equal(_output(model, "sums"), before)
        abandon_task(model)
        use_tasks(model, only="sums")
        assert torch.equal(_output(model, "sums"), before)
        assert adapters_of(model).tasks == ["sums"]


def test_one_lora_goes_on_where_it_was() -> None:
    model = _model()
    inject(model, create_method("lora", {"rank": 2, "scale": 2.0}))
    _learn(model, "sums", steps=3)
    finish_task(model)
    before = _output(model, "sums")
    start_task(model, "differences")
    assert torch.equal(model.train()(_data("sums")[0]), before)
    use_tasks(model, first=1)
    assert torch.equal(_output(model, "sums"), before)


def test_new_parameters_depend_on_seed_task_and_layer_only() -> None:
    found = []
    for noise, seed, task in ((0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")):
        model = _model()
        torch.manual_seed(noise)
        inject(model, create_method("mora", {"rank": 2}))
        start_task(model, task, seed=seed)
        found.append([layer.current["down"].detach().clone() for layer in adapters_of(model).layers.values()])
        assert all(float(t.abs().max()) <= t.shape[1] ** -0.5 for t in found[-1])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(a, b) for other in found[2:] for a, b in zip(found[0], other, strict=True))


def test_steps_out_of_order_are_refused() -> None:
    model = _model()
    inject(model, create_method("freeze_and_add", {"rank": 2}))
    with pytest.raises(ConfigurationError, match="no task is being trained"):
        finish_task(model)
    with pytest.raises(ConfigurationError, match="no task is being trained"):
        abandon_task(model)
    with pytest.raises(ConfigurationError, match="must be new and not empty"):
        start_task(model, "")
    start_task(model, "a")
    with pytest.raises(ConfigurationError, match="'a' is being trained"):
        start_task(model, "b")
    with pytest.raises(ConfigurationError, match="'a' was never trained"):
        finish_task(model)
    abandon_task(model)
    _learn(model, "a", steps=1)
    finish_task(model)
    with pytest.raises(ConfigurationError, match="must be new"):
        start_task(model, "a")
    for first in (-1, 2):
        with pytest.raises(ConfigurationError, match="from 0 to 1"):
            use_tasks(model, first=first)
    with pytest.raises(ConfigurationError, match="there is no task 'b'"):
        use_tasks(model, only="b")
    with pytest.raises(ConfigurationError, match="go without"):
        use_tasks(model, first=1, only="a")


def test_a_method_that_needs_inputs_says_so_at_both_ends_of_a_task() -> None:
    model = _model()
    inject(model, create_method("inflora", {"rank": 2}))
    with pytest.raises(ConfigurationError, match=r"needs the inputs of 0, 2 before task 'a' starts"):
        start_task(model, "a")
    _learn(model, "a", steps=1)
    with pytest.raises(ConfigurationError, match=r"before task 'a' is finished"):
        finish_task(model)
    _finish(model, "a")
    assert adapters_of(model).tasks == ["a"]


def test_collected_inputs_are_the_mean_over_all_tokens_of_all_calls() -> None:
    model = _model()
    inject(model, create_method("inflora"), ["0"])
    x = torch.randn(7, 3, 6)
    with collect_inputs(model):
        model(x[:2])
        model(x[2:])
    flat = x.flatten(0, 1).double()
    found = adapters_of(model).layers["0"].inputs
    assert found is not None
    torch.testing.assert_close(found, flat.T @ flat / 21)


def test_the_boundary_jump_is_what_untrained_keys_do_and_leaves_the_model_alone() -> None:
    jumps = {}
    for name in ("mora", "freeze_and_add"):
        model = _model()
        inject(model, create_method(name, {"rank": 3}))
        _learn(model, "sums")
        _finish(model, "sums")
        model[0].train()
        before = _output(model, "sums")
        model[0].train()
        jumps[name] = boundary_jump(model, lambda model=model: _loss(model, "sums"))
        assert (model.training, model[0].training) == (False, True)
        assert adapters_of(model).current is None and torch.equal(_output(model, "sums"), before)
    assert abs(jumps["freeze_and_add"]) < 1e-6 < abs(jumps["mora"])


def test_the_boundary_jump_keeps_the_choice_of_tasks() -> None:
    model = _model()
    inject(model, create_method("mora", {"rank": 3}))
    for task in _TASKS:
        _learn(model, task, steps=3)
        finish_task(model)
    use_tasks(model, first=1)
    before = _output(model, "sums")
    boundary_jump(model, lambda: _loss(model, "sums"))
    assert torch.equal(_output(model, "sums"), before)


def test_a_failing_loss_leaves_no_task_behind() -> None:
    model = _model()
    inject(model, create_method("mora", {"rank": 3}))
    calls = iter([0.0])
    with pytest.raises(StopIteration):
        boundary_jump(model, lambda: next(calls))
    assert adapters_of(model).current is None
