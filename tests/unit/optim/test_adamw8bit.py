"""What surrounds the update: state, state dicts, options and what is refused, on AdamW8bit as one of the family."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import ConfigurationError
from holdfast.optim import AdamW8bit, RMSprop8bit, SGD8bit

_LARGE, _SMALL = (70, 100), (33,)


def _params(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in (_LARGE, _SMALL)]


def _train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)
        optimizer.step()


def _bits(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[bytes | int]:
    tensors: list[Any] = [*params, *(v for p in params for v in optimizer.state[p].values())]
    return [t.detach().numpy().tobytes() if isinstance(t, Tensor) else t for t in tensors]


def test_large_tensors_keep_codes_and_small_ones_fp32() -> None:
    large, small = params = _params()
    optimizer = AdamW8bit(params)
    _train(params, optimizer, 2)
    kinds = {k: (v.dtype, tuple(v.shape)) for k, v in optimizer.state[large].items() if k != "step"}
    assert kinds == {
        "exp_avg_codes": (torch.uint8, _LARGE),
        "exp_avg_absmax": (torch.float32, (28,)),
        "exp_avg_sq_codes": (torch.uint8, _LARGE),
        "exp_avg_sq_absmax": (torch.float32, (28,)),
    }
    assert set(optimizer.state[small]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[large]["step"] == 2 and type(optimizer.state[small]["step"]) is int


def test_the_moments_of_a_large_matrix_take_2_03_bytes_per_parameter() -> None:
    param = nn.Parameter(torch.zeros(1024, 1024))
    optimizer = AdamW8bit([param])
    optimizer.ensure_state()
    state = (v for k, v in optimizer.state[param].items() if k != "step")
    assert sum(t.nbytes for t in state) / param.numel() == 2 + 8 / 256


def test_state_allocated_up_front_is_the_state_of_the_first_step_at_a_stable_address() -> None:
    params, eager = _params(), _params()
    frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
    optimizer, lazy = AdamW8bit([*params, frozen]), AdamW8bit(eager)
    optimizer.ensure_state()
    addresses = [v.data_ptr() for p in params for k, v in optimizer.state[p].items() if k != "step"]
    assert frozen not in optimizer.state and len(addresses) == 6
    _train(params, optimizer, 3)
    optimizer.ensure_state()
    _train(eager, lazy, 3)
    assert [v.data_ptr() for p in params for k, v in optimizer.state[p].items() if k != "step"] == addresses
    assert _bits(params, optimizer) == _bits(eager, lazy)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    params = _params()
    optimizer, before = AdamW8bit(params), params[0].detach().clone()
    params[1].grad = torch.ones(_SMALL)
    optimizer.step()
    assert torch.equal(params[0], before) and params[0] not in optimizer.state


def test_8_bit_moments_stay_close_to_torch() -> None:
    ours, theirs = _params(), _params()
    mine, reference = AdamW8bit(ours, lr=1e-3, weight_decay=0.0), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.0)
    start = ours[0].detach().clone()
    _train(ours, mine, 50)
    _train(theirs, reference, 50)
    moved, error = (theirs[0] - start).norm(), (ours[0] - theirs[0]).norm()
    assert 0 < error < 0.03 * moved


def test_groups_may_override_every_option() -> None:
    first, second = _params()[0], _params()[0]
    optimizer = AdamW8bit(
        [{"params": [first], "min_8bit_size": 1 << 20, "lr": 0.0, "weight_decay": 0.0}, {"params": [second]}],
        block_size=64,
    )
    before = first.detach().clone()
    _train([first, second], optimizer, 1)
    assert "exp_avg" in optimizer.state[first] and torch.equal(first, before)
    assert optimizer.state[second]["exp_avg_absmax"].numel() == -(-7000 // 64)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW8bit([param])

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0 and (param < 1).all()


def test_a_learning_rate_scheduler_drives_it() -> None:
    params = _params()
    optimizer = AdamW8bit(params, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    _train(params, optimizer, 1)
    schedule.step()
    before = params[0].detach().clone()
    _train(params, optimizer, 1)
    assert torch.equal(params[0], before)


def test_loaded_codes_are_bytes_of_their_own() -> None:
    params, others = _params(dtype=torch.bfloat16), _params(dtype=torch.bfloat16)
    optimizer, other = AdamW8bit(params), AdamW8bit(others)
    _train(params, optimizer, 1)
    other.load_state_dict(optimizer.state_dict())
    before = _params_state(optimizer, params[0])
    loaded = other.state[others[0]]
    assert loaded["exp_avg_codes"].dtype == torch.uint8 and loaded["exp_avg_absmax"].dtype == torch.float32
    for key in before:
        loaded[key].zero_()
    assert all(torch.equal(v, before[k]) for k, v in _params_state(optimizer, params[0]).items())


def _params_state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in optimizer.state[param].items() if k != "step"}


def test_state_moves_to_the_device_of_its_parameter() -> None:
    params = _params()
    optimizer = AdamW8bit(params)
    _train(params, optimizer, 1)
    elsewhere = AdamW8bit([nn.Parameter(torch.empty(shape, device="meta")) for shape in (_LARGE, _SMALL)])
    elsewhere.load_state_dict(optimizer.state_dict())
    state = elsewhere.state[elsewhere.param_groups[0]["params"][0]]
    assert state["exp_avg_codes"].device.type == "meta" and state["exp_avg_codes"].dtype == torch.uint8


def test_the_state_dict_records_how_codes_become_numbers() -> None:
    (group,) = AdamW8bit(_params(), block_size=512).state_dict()["param_groups"]
    assert group["block_size"] == 512 and group["codebooks"] == ("dynamic-signed", "dynamic-unsigned")
    assert json.loads(json.dumps(group))["block_size"] == 512


def test_groups_that_went_through_json_are_accepted() -> None:
    params = _params()
    optimizer = AdamW8bit(params)
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict({**state_dict, "param_groups": json.loads(json.dumps(state_dict["param_groups"]))})
    _train(params, optimizer, 1)


def test_a_loaded_state_keeps_its_precision_whatever_the_new_threshold() -> None:
    params, others = _params(), _params()
    optimizer, other = AdamW8bit(params, min_8bit_size=1 << 20), AdamW8bit(others)
    _train(params, optimizer, 2)
    other.load_state_dict(optimizer.state_dict())
    _train(params, optimizer, 1, seed=5)
    _train(others, other, 1, seed=5)
    assert "exp_avg" in other.state[others[0]]
    assert torch.equal(other.state[others[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg"])


def _state_dict(**options: Any) -> dict[str, Any]:
    params = _params()
    optimizer = AdamW8bit(params, **options)
    _train(params, optimizer, 1)
    return optimizer.state_dict()


def _with_float_codes() -> dict[str, Any]:
    state_dict = _state_dict()
    state_dict["state"][0]["exp_avg_codes"] = state_dict["state"][0]["exp_avg_codes"].float()
    return state_dict


def _with_other_codebooks() -> dict[str, Any]:
    state_dict = _state_dict()
    state_dict["param_groups"][0]["codebooks"] = ("linear", "linear")
    return state_dict


def _of_torch() -> dict[str, Any]:
    params = _params()
    optimizer = torch.optim.AdamW(params)
    _train(params, optimizer, 1)
    return optimizer.state_dict()


def _with_unknown_parameter() -> dict[str, Any]:
    state_dict = _state_dict()
    state_dict["state"][7] = state_dict["state"][0]
    return state_dict


def _with_other_shape() -> dict[str, Any]:
    state_dict = _state_dict()
    state_dict["state"][0], state_dict["state"][1] = state_dict["state"][1], state_dict["state"][0]
    return state_dict


@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (lambda: _state_dict(block_size=2048), "has block_size=2048, this optimizer has 256"),
        (_with_other_codebooks, r"has codebooks=\['linear', 'linear'\]"),
        (_of_torch, "no optimizer of holdfast wrote it; holdfast.optim.interop reads those of torch"),
        (_with_float_codes, r"exp_avg_codes of parameter 0 of group 0 is float32 \[70, 100\].*needs uint8 \[70, 100\]"),
        (_with_unknown_parameter, "state for parameter 7"),
        (_with_other_shape, r"exp_avg of parameter 0 of group 0 is float32 \[33\]"),
        (
            lambda: AdamW8bit(_params()[:1]).state_dict(),
            r"groups of \[1\] parameters, this optimizer has groups of \[2\]",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(
    unfit: Callable[[], dict[str, Any]], reason: str
) -> None:
    params = _params()
    optimizer = AdamW8bit(params)
    _train(params, optimizer, 2)
    before = _bits(params, optimizer)
    with pytest.raises(ConfigurationError, match=reason):
        optimizer.load_state_dict(unfit())
    assert _bits(params, optimizer) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be a finite number of at least 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": 0.0}, "eps=0.0 must be a finite number of at least 1e-30"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"block_size": 100}, "block_size=100 must be a power of two in 64..4096, for example 256"),
        ({"block_size": 32}, "block_size=32"),
        ({"block_size": 8192}, "block_size=8192"),
        ({"block_size": 256.0}, "block_size=256.0"),
        ({"min_8bit_size": -1}, "min_8bit_size=-1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        AdamW8bit(_params(), **options)


def test_all_problems_of_a_group_are_reported_together_and_the_group_is_not_taken() -> None:
    optimizer = AdamW8bit(_params())
    unfit = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ConfigurationError) as caught:
        optimizer.add_param_group({"params": [unfit], "lr": -1.0, "block_size": 5, "codebooks": ("a", "b")})
    assert [problem.split("=")[0].split(" is ")[0] for problem in caught.value.problems] == [
        "lr",
        "block_size",
        "codebooks",
        "parameter 0 of group 1",
    ]
    assert len(optimizer.param_groups) == 1


def _trained_loss(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """A two-layer network learns a fixed random two-layer network."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))
    student = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))
    optimizer = make(list(student.parameters()))
    x = torch.randn(512, 32)
    y = teacher(x).detach()
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(student(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_small_network_learns_as_well_as_with_torch() -> None:
    reference = _trained_loss(lambda params: torch.optim.AdamW(params, lr=3e-3))
    ours = _trained_loss(lambda params: AdamW8bit(params, lr=3e-3))
    assert reference < 0.01 and ours < 1.15 * reference


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (lambda p: RMSprop8bit(p, centered=True, momentum=0.9), RMSprop8bit),
        (lambda p: AdamW8bit(p, percentile_clipping=5), AdamW8bit),
        (lambda p: SGD8bit(p, momentum=0.5, nesterov=True), lambda p: SGD8bit(p, momentum=0.9)),
    ],
)
def test_saved_options_win_over_those_it_was_built_with(saved: Callable[..., Any], live: Callable[..., Any]) -> None:
    params, others = _params(), _params()
    optimizer, other = saved(params), live(others)
    _train(params, optimizer, 2)
    _train(others, other, 2)
    with torch.no_grad():
        for param, twin in zip(params, others, strict=True):
            twin.copy_(param)
    other.load_state_dict(optimizer.state_dict())
    _train(params, optimizer, 2, seed=9)
    _train(others, other, 2, seed=9)
    assert _bits(others, other) == _bits(params, optimizer)


def test_a_state_dict_with_options_that_cannot_be_is_refused() -> None:
    optimizer = AdamW8bit(_params())
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["betas"] = (0.9, 1.5)
    with pytest.raises(ConfigurationError, match=r"group 0 of the state dict: betas=\(0.9, 1.5\) must be"):
        optimizer.load_state_dict(state_dict)
