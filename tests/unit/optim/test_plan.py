"""What an optimizer remembers between steps: it changes no bit, and notices whatever has changed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdfast.optim
import holdfast.optim.optimizer
from holdfast.errors import ConfigurationError
from holdfast.optim import AdamW, AdamW8bit, BlockwiseOptimizer
from holdfast.optim.native import using
from holdfast.optim.plan import Plan

_NAMES = ["AdamW8bit", "AdamW", "LAMB8bit", "SGD", "RMSprop8bit"]


def _params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(70, 100), (33,), (64, 64), (4096,)]
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def _make(name: str, params: list[nn.Parameter], **options: Any) -> BlockwiseOptimizer:
    optimizer: BlockwiseOptimizer = getattr(holdfast.optim, name)(params, **options)
    return optimizer


def _draw_gradients(params: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)


def _bits(params: list[nn.Parameter], optimizer: BlockwiseOptimizer) -> list[Any]:
    values = [*params, *(value for param in params for value in optimizer.state[param].values())]
    return [v.detach().contiguous().view(torch.uint8).tolist() if isinstance(v, Tensor) else v for v in values]


def _drop_gradients(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    for number, param in enumerate(params):
        if (number + step) % 3 == 0:
            param.grad = None


def _replace_a_state_tensor(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.clone()


def _replace_the_memory_of_state(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.data = value.data.clone()


def _replace_a_state(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    optimizer.state[params[0]] = copy.deepcopy(optimizer.state[params[0]])


def _empty_a_state(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    optimizer.state[params[2]].clear()


def _replace_the_memory_of_parameters(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    for param in params:
        param.data = param.data.clone()


def _round_parameters(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    for param in params:
        grad, dtype = param.grad, torch.bfloat16 if step % 2 else torch.float32
        param.grad = None
        param.data = param.data.to(dtype)
        param.grad = None if grad is None else grad.to(dtype)


def _stride_gradients(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    if step % 2:
        for param in params:
            assert param.grad is not None
            param.grad = torch.stack([param.grad, param.grad], dim=-1)[..., 0]


def _stride_parameters(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    params[2].data = params[2].data.t().contiguous().t()
    params[3].data = torch.stack([params[3].data, params[3].data], dim=-1)[..., 0]


def _transpose_in_place(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    params[2].data = params[2].data.t()


def _reset_a_step(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    optimizer.state[params[1]]["step"] = 0


def _change_options(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    optimizer.param_groups[0] |= {"lr": 1e-3 * (step + 1), "stochastic_rounding": step % 2 == 1, "seed": step}


def _reorder(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    optimizer.param_groups[0]["params"].reverse()


def _load(params: list[nn.Parameter], optimizer: BlockwiseOptimizer, step: int) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


_CHANGES: list[Callable[[list[nn.Parameter], BlockwiseOptimizer, int], None]] = [
    _drop_gradients,
    _replace_a_state_tensor,
    _replace_the_memory_of_state,
    _replace_a_state,
    _empty_a_state,
    _replace_the_memory_of_parameters,
    _round_parameters,
    _stride_gradients,
    _stride_parameters,
    _transpose_in_place,
    _reset_a_step,
    _change_options,
    _reorder,
    _load,
]


@pytest.mark.parametrize("change", _CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("name", _NAMES)
def test_nothing_that_changes_between_steps_is_missed(
    name: str, change: Callable[[list[nn.Parameter], BlockwiseOptimizer, int], None]
) -> None:
    results = []
    for remembers in (True, False):
        params = _params()
        optimizer = _make(name, params)
        for step in range(6):
            _draw_gradients(params, step)
            if step > 1:
                change(params, optimizer, step)
            if not remembers:
                optimizer._plans.clear()
            optimizer.step()
        results.append(_bits(params, optimizer))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", _NAMES)
def test_kernels_and_torch_operations_see_the_same_rows_step_after_step(name: str) -> None:
    results = []
    for isa in (None, "portable"):
        params = _params()
        optimizer = _make(name, params)
        with using(isa):
            for step in range(3):
                _draw_gradients(params, step)
                optimizer.step()
        results.append(_bits(params, optimizer))
    assert results[0] == results[1]


def test_new_gradients_need_no_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Plan):
        def __init__(self, *args: Any) -> None:
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(holdfast.optim.optimizer, "Plan", Counted)
    params = _params()
    optimizer = AdamW8bit([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}])
    for step in range(5):
        optimizer.zero_grad()
        _draw_gradients(params, step)
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        optimizer.step()
    assert len(made) == 2


@pytest.mark.parametrize("isa", [None, "portable"])
def test_no_gradient_is_kept_alive(isa: str | None) -> None:
    params = _params()
    optimizer = AdamW8bit(params, percentile_clipping=50)
    for step in range(3):
        _draw_gradients(params, step)
        kept = [weakref.ref(param.grad) for param in params]
        with using(isa):
            optimizer.step()
        optimizer.zero_grad()
        assert [ref() for ref in kept] == [None] * len(params)


def test_versions_of_parameters_and_of_their_state_go_up() -> None:
    params = _params()
    optimizer = AdamW8bit(params)
    optimizer.ensure_state()
    tensors = [*params, *(v for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor))]
    for step in range(3):
        _draw_gradients(params, step)
        before = [tensor._version for tensor in tensors]
        optimizer.step()
        assert all(tensor._version > old for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copied", "pickled"])
def test_a_copy_has_its_own_memory_and_goes_on_alike(copied: Callable[[AdamW], AdamW]) -> None:
    params = _params()
    optimizer = AdamW8bit(params)
    for step in range(3):
        _draw_gradients(params, step)
        optimizer.step()
    assert b"Plan" not in pickle.dumps(optimizer)
    twin = copied(optimizer)
    theirs = twin.param_groups[0]["params"]
    for step in range(3, 5):
        for some, one in ((params, optimizer), (theirs, twin)):
            _draw_gradients(some, step)
            one.step()
    assert _bits(params, optimizer) == _bits(theirs, twin)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("block_size", 512, r"exp_avg_absmax of parameter 0 of group 0 is float32 \[28\].*needs float32 \[14\]"),
        ("percentile_clipping", 50, "this optimizer needs .*grad_norms"),
    ],
)
def test_an_option_that_the_state_does_not_fit_is_refused_before_anything_changes(
    option: str, value: int, reason: str
) -> None:
    params = _params()
    optimizer = AdamW8bit([{"params": params[1:]}, {"params": params[:1]}])
    optimizer.param_groups.reverse()
    _draw_gradients(params, 0)
    optimizer.step()
    before = _bits(params, optimizer)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ConfigurationError, match=reason):
        optimizer.step()
    assert _bits(params, optimizer) == before


def test_a_process_without_sharded_tensors_does_without_their_module() -> None:
    program = """
import sys
sys.modules["torch.distributed.tensor"] = None
import torch
from holdfast.optim import LAMB8bit
param = torch.nn.Parameter(torch.ones(64, 256))
optimizer = LAMB8bit([param], percentile_clipping=50)
for _ in range(2):
    param.grad = torch.ones(64, 256)
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print(optimizer.state[param]["step"])
"""
    where = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=where, capture_output=True, text=True, timeout=50, check=True
    )
    assert done.stdout.strip() == "2"
