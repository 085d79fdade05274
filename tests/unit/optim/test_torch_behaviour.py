"""What users of ``torch.optim`` rely on without thinking about it, for every optimizer of the family."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

import holdfast.optim
from tests.support.optim_reference import REFERENCES

_ALL = [*REFERENCES, *(f"{kind}8bit" for kind in REFERENCES)]
_RATES = {"LAMB": 1e-2, "LARS": 10.0, "SGD": 5e-2, "Adagrad": 5e-2}
_every = pytest.mark.parametrize("name", _ALL)


def _make(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """Quantised in 8 bits however small; with a rate at which this network learns."""
    kind = name.removesuffix("8bit")
    usual: dict[str, Any] = {"lr": _RATES.get(kind, 3e-3), "block_size": 64, "min_8bit_size": 0}
    usual |= {"momentum": 0.9} if kind == "SGD" else {}
    optimizer: torch.optim.Optimizer = getattr(holdfast.optim, name)(params, **{**usual, **options})
    return optimizer


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def _loss(model: Callable[[Tensor], Tensor], step: int = 0) -> Tensor:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :4]))


def _step(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    optimizer.zero_grad()
    _loss(model, step).backward()
    optimizer.step()


def _train(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        _step(model, optimizer, step)


def _values(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Parameters and state, to the bit."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values: list[Any] = [*params, *(v for p in params for v in optimizer.state.get(p, {}).values())]
    return [v.detach().numpy().tobytes() if isinstance(v, Tensor) else v for v in values]


def _same(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> bool:
    return _values(left) == _values(right)


@_every
def test_a_small_network_learns(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = _loss(model).item()
    _train(model, optimizer, 60)
    assert _loss(model).item() < 0.8 * before


@_every
def test_a_group_added_later_starts_with_its_own_options_and_disturbs_no_other(name: str) -> None:
    model, alone = _model(), _model()
    for layer in (model[2], alone[2]):
        layer.requires_grad_(False)
    optimizer, other = (_make(name, m[0].parameters()) for m in (model, alone))
    _train(model, optimizer, 2)
    _train(alone, other, 2)
    assert _same(optimizer, other)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.0, "weight_decay": 0.0})
    before = model[2].weight.detach().clone()
    _step(model, optimizer, 2)
    _step(alone, other, 2)
    assert torch.equal(model[2].weight, before) and all(p in optimizer.state for p in model.parameters())
    assert torch.equal(model[0].weight, alone[0].weight)
    optimizer.param_groups[1]["lr"] = 0.1
    _step(model, optimizer, 3)
    assert not torch.equal(model[2].weight, before)


def _one_cycle(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    has_momentum = bool({"momentum", "betas"} & set(optimizer.defaults)) and optimizer.defaults.get("momentum", 1) != 0
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8, cycle_momentum=has_momentum)


_SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
    "OneCycleLR": _one_cycle,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 0.1, step_size_up=2, cycle_momentum=False),
}


@_every
@pytest.mark.parametrize("schedule", _SCHEDULES)
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR's own use of another scheduler
def test_a_schedule_is_a_run_whose_options_are_set_by_hand(name: str, schedule: str) -> None:
    model, by_hand = _model(), _model()
    optimizer, manual = _make(name, model.parameters()), _make(name, by_hand.parameters())
    scheduler, rates = _SCHEDULES[schedule](optimizer), set()
    for step in range(6):
        cycled = {key: optimizer.param_groups[0][key] for key in ("lr", "momentum", "betas") if key in manual.defaults}
        manual.param_groups[0].update(cycled)
        rates.add(cycled["lr"])
        _step(model, optimizer, step)
        _step(by_hand, manual, step)
        scheduler.step()
    assert _same(optimizer, manual) and len(rates) > 2


@_every
def test_a_plateau_lowers_the_rate_that_the_next_step_uses(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters(), weight_decay=0.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.0, patience=0)
    _step(model, optimizer)
    scheduler.step(1.0)
    before = model[0].weight.detach().clone()
    _step(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    scheduler.step(1.0)
    before = model[0].weight.detach().clone()
    _step(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0 and torch.equal(model[0].weight, before)


@_every
def test_weights_are_averaged_over_steps(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters())
    average, scheduler, seen = AveragedModel(model), SWALR(optimizer, swa_lr=1e-2, anneal_epochs=2), []
    for step in range(4):
        _step(model, optimizer, step)
        average.update_parameters(model)
        scheduler.step()
        seen.append(model[0].weight.detach().clone())
    assert len({w.numpy().tobytes() for w in seen}) == 4
    torch.testing.assert_close(average.module[0].weight.detach(), torch.stack(seen).mean(0))


@_every
def test_a_closure_runs_once_with_gradients_on_and_its_loss_is_returned(name: str) -> None:
    model, plain = _model(), _model()
    optimizer, other = _make(name, model.parameters()), _make(name, plain.parameters())
    losses = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) == losses[0] and len(losses) == 1
    _step(plain, other)
    assert _same(optimizer, other) and optimizer.step() is None


@_every
def test_a_parameter_without_gradient_sits_a_step_out(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters())
    _train(model, optimizer, 2)
    still, moving = model[0].weight, model[2].weight
    kept, before = [still.detach().clone(), copy.deepcopy(dict(optimizer.state[still]))], moving.detach().clone()
    optimizer.zero_grad()
    _loss(model).backward()
    still.grad = None
    optimizer.step()
    assert torch.equal(still, kept[0]) and optimizer.state[still].keys() == kept[1].keys()
    assert all(torch.equal(optimizer.state[still][k], v) for k, v in kept[1].items() if k != "step")
    assert not torch.equal(moving, before)
    assert (optimizer.state[still]["step"], optimizer.state[moving]["step"]) == (2, 3)
    _train(model, optimizer, 1)
    assert optimizer.state[still]["step"] == 3 and not torch.equal(still, kept[0])


@_every
def test_frozen_parameters_may_be_given_and_are_left_alone(name: str) -> None:
    model = _model()
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer = _make(name, model.parameters(), weight_decay=0.1)
    _train(model, optimizer, 2)
    assert torch.equal(model[0].weight, before) and not optimizer.state.get(model[0].weight)


@_every
def test_gradients_are_read_and_never_written(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters(), weight_decay=0.1, maximize=True, percentile_clipping=0)
    _train(model, optimizer, 2)
    _loss(model).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert len(before) == 4
    assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@_every
def test_zero_grad_clears_or_fills_with_zeros(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters())
    _loss(model).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@_every
def test_backward_through_weights_that_a_step_has_changed_is_an_error(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters())
    loss = _loss(model)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@_every
def test_hooks_run_around_each_step_and_may_replace_its_arguments(name: str) -> None:
    model, seen = _model(), []
    optimizer = _make(name, model.parameters())
    before = model[0].weight.detach().clone()
    pre = optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: seen.append(("pre", opt is optimizer, torch.equal(model[0].weight, before)))
    )
    post = optimizer.register_step_post_hook(
        lambda opt, args, kwargs: seen.append(("post", opt is optimizer, torch.equal(model[0].weight, before)))
    )
    _step(model, optimizer)
    assert seen == [("pre", True, True), ("post", True, False)]
    pre.remove()
    post.remove()
    _step(model, optimizer)
    assert len(seen) == 2


@_every
def test_state_dict_hooks_run_and_may_change_the_options(name: str) -> None:
    model, seen = _model(), []
    optimizer = _make(name, model.parameters())
    _train(model, optimizer, 1)
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {**state_dict, "extra": "kept"})
    saved = optimizer.state_dict()
    assert saved["extra"] == "kept" and saved["state"] and seen == ["before saving"]

    def halve(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("before loading")
        groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other = _make(name, _model().parameters())
    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    other.load_state_dict(saved)
    assert seen[1:] == ["before loading", "loaded"]
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] / 2
    assert len(other.state) == 4


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_a_hook_sees_the_state_before_and_after_it_is_loaded(name: str) -> None:
    model, seen = _model(), []
    optimizer, other = _make(name, model.parameters()), _make(name, _model().parameters())
    _train(model, optimizer, 1)

    def a_step_later(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {
            **state_dict,
            "state": {at: {**one, "step": one["step"] + 1} for at, one in state_dict["state"].items()},
        }

    other.register_load_state_dict_pre_hook(a_step_later)
    other.register_load_state_dict_post_hook(lambda opt: seen.extend(one["step"] for one in opt.state.values()))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [2, 2, 2, 2]


@_every
def test_a_state_dict_is_made_of_plain_values_and_numbered_parameters(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters())
    _train(model, optimizer, 1)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"} and list(saved["state"]) == [0, 1, 2, 3]
    assert saved["param_groups"][0]["params"] == [0, 1, 2, 3]
    kinds = {type(value) for state in saved["state"].values() for value in state.values()}
    assert kinds == {int, Tensor}
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["param_groups"] == saved["param_groups"]


@_every
def test_a_run_with_a_schedule_resumes_with_the_same_bits(name: str) -> None:
    def parts() -> tuple[nn.Sequential, torch.optim.Optimizer, lr_scheduler.LRScheduler]:
        model = _model()
        optimizer = _make(name, model.parameters())
        return model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 8)

    model, optimizer, scheduler = parts()
    halfway: list[Any] = []
    for step in range(6):
        if step == 3:
            halfway = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, scheduler)]
        _step(model, optimizer, step)
        scheduler.step()
    model2, optimizer2, scheduler2 = resumed = parts()
    for part, saved in zip(resumed, halfway, strict=True):
        part.load_state_dict(saved)
    for step in range(3, 6):
        _step(model2, optimizer2, step)
        scheduler2.step()
    assert _same(optimizer, optimizer2) and scheduler.get_last_lr() == scheduler2.get_last_lr()


@_every
def test_the_representation_names_the_class_and_its_options(name: str) -> None:
    text = repr(_make(name, _model().parameters(), lr=0.125))
    assert text.startswith(f"{name} (") and "lr: 0.125" in text and "block_size: 64" in text


def _deepcopied(parts: Any) -> Any:
    return copy.deepcopy(parts)


def _pickled(parts: Any) -> Any:
    return pickle.loads(pickle.dumps(parts))


@_every
@pytest.mark.parametrize("duplicate", [_deepcopied, _pickled])
def test_a_copy_of_model_and_optimizer_trains_on_its_own(name: str, duplicate: Callable[[Any], Any]) -> None:
    model = _model()
    optimizer = _make(name, model.parameters(), percentile_clipping=50)
    _train(model, optimizer, 2)
    before = _values(optimizer)
    model2, optimizer2 = duplicate((model, optimizer))
    assert type(optimizer2) is type(optimizer) and optimizer.defaults.items() <= optimizer2.defaults.items()
    assert optimizer2.param_groups[0]["params"][0] is model2[0].weight
    assert _same(optimizer2, optimizer)
    _train(model2, optimizer2, 2, first=2)
    assert _values(optimizer) == before
    _train(model, optimizer, 2, first=2)
    assert _same(optimizer2, optimizer) and _values(optimizer) != before


@_every
def test_autocast_needs_no_gradient_scaler(name: str) -> None:
    model = _model()
    optimizer = _make(name, model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        before = _loss(model).item()
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, step)
        loss.backward()
        optimizer.step()
    assert _loss(model).item() < 0.8 * before


@_every
def test_a_gradient_scaler_may_drive_it_all_the_same(name: str) -> None:
    model, plain = _model(), _model()
    optimizer, other = _make(name, model.parameters()), _make(name, plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (False, True, False):
        before = _values(optimizer)
        optimizer.zero_grad()
        scaler.scale(_loss(model)).backward()
        if bad and model[0].weight.grad is not None:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert _values(optimizer) == before  # the scaler leaves the whole step out
        else:
            _step(plain, other)
    torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=1e-4, atol=1e-5)


@_every
def test_a_compiled_model_trains_to_the_same_bits(name: str) -> None:
    torch._dynamo.reset()
    model, plain = _model(), _model()
    optimizer, other = _make(name, model.parameters()), _make(name, plain.parameters())
    _train(torch.compile(model, backend="eager"), optimizer, 2)
    _train(plain, other, 2)
    assert _same(optimizer, other)


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit", "SGD"])
def test_a_compiled_training_step_may_call_the_optimizer(name: str) -> None:
    torch._dynamo.reset()
    model, plain = _model(), _model()
    optimizer, other = _make(name, model.parameters()), _make(name, plain.parameters())
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))

    def step(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        (model(x) ** 2).mean().backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        compiled(model, optimizer)
        optimizer.zero_grad()
        step(plain, other)
        other.zero_grad()
    assert _same(optimizer, other)


@_every
def test_a_rate_held_in_a_tensor_is_read_at_each_step(name: str) -> None:
    model, plain = _model(), _model()
    rate = torch.tensor(2.0**-7)
    optimizer, other = _make(name, model.parameters(), lr=rate), _make(name, plain.parameters(), lr=2.0**-7)
    _step(model, optimizer)
    _step(plain, other)
    rate.mul_(0.5)
    other.param_groups[0]["lr"] = 2.0**-8
    _step(model, optimizer, 1)
    _step(plain, other, 1)
    assert _same(optimizer, other) and rate == 2.0**-8


@_every
def test_a_schedule_drives_a_rate_held_in_a_tensor(name: str) -> None:
    model, plain = _model(), _model()
    optimizer = _make(name, model.parameters(), lr=torch.tensor(2.0**-7))
    other = _make(name, plain.parameters(), lr=2.0**-7)
    schedules = [lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (optimizer, other)]
    for step in range(3):
        _step(model, optimizer, step)
        _step(plain, other, step)
        for scheduler in schedules:
            scheduler.step()
    assert _same(optimizer, other)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) and optimizer.param_groups[0]["lr"] == 2.0**-10
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    third = _make(name, _model().parameters())
    third.load_state_dict(torch.load(buffer, weights_only=True))
    assert third.param_groups[0]["lr"] == 2.0**-10


@_every
def test_gradients_may_be_clipped_before_the_step(name: str) -> None:
    model, plain = _model(), _model()
    optimizer, other = _make(name, model.parameters()), _make(name, plain.parameters())
    for step in range(2):
        for each in (model, plain):
            each.zero_grad()
            _loss(each, step).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        for param in plain.parameters():
            assert param.grad is not None
            param.grad *= min(1.0, 0.01 / (norm.item() + 1e-6))
        optimizer.step()
        other.step()
    assert norm > 0.01
    torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=1e-4, atol=1e-5)


@_every
def test_named_parameters_keep_their_names_and_change_nothing_else(name: str) -> None:
    model, plain = _model(), _model()
    optimizer, other = _make(name, model.named_parameters()), _make(name, plain.parameters())
    _train(model, optimizer, 2)
    _train(plain, other, 2)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert _same(optimizer, other) and optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    resumed = _make(name, _model().named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert list(resumed.state) == resumed.param_groups[0]["params"]
    resumed.load_state_dict(other.state_dict())
    assert len(resumed.state) == 4


@_every
def test_an_optimizer_per_parameter_may_step_inside_backward(name: str) -> None:
    model, plain = _model(), _model()
    own = {param: _make(name, [param]) for param in model.parameters()}
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: own[p].step())
    together = _make(name, plain.parameters())
    for step in range(2):
        model.zero_grad()
        _loss(model, step).backward()
        _step(plain, together, step)
    assert [v for o in own.values() for v in _values(o)[:1]] == _values(together)[:4]


@_every
def test_tied_weights_are_updated_once(name: str) -> None:
    model, single = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)]), nn.Parameter(torch.ones(4, 4))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    optimizer, other = _make(name, model.parameters()), _make(name, [single])
    model[0].weight.grad, single.grad = torch.eye(4), torch.eye(4)
    optimizer.step()
    other.step()
    assert _same(optimizer, other)


@_every
def test_misuse_is_reported_as_by_torch(name: str) -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        _make(name, [])
    with pytest.raises(TypeError, match="should be an iterable"):
        _make(name, param)
    optimizer = _make(name, [param])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [param]})
    with pytest.raises(ValueError, match="non-leaf"):
        optimizer.add_param_group({"params": [param * 2]})


@_every
def test_options_of_the_constructor_are_the_defaults_of_groups(name: str) -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = _make(name, [{"params": [first], "lr": 0.5}, {"params": [second]}], lr=0.25)
    assert optimizer.defaults["lr"] == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
