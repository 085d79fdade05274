"""Optimizer state as named tensors and scalars, enough to carry it elsewhere and back."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import ConfigurationError
from holdfast.optim import (
    AdamW,
    AdamW8bit,
    AdEMAMix8bit,
    Lion8bit,
    RMSprop8bit,
    describe_state,
    ensure_state,
    load_scalars,
    scalars,
)
from holdfast.types import Quantization

_OPTIMIZERS = pytest.mark.parametrize("make", [AdamW8bit, AdamW])


def _param(shape: tuple[int, ...] = (64, 80)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def _train(param: Tensor, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        param.grad = torch.randn(param.shape, generator=draw)
        optimizer.step()


def test_codes_name_their_block_size_codebook_and_absmax() -> None:
    param = _param()
    optimizer = AdamW8bit([param], block_size=512)
    ensure_state(optimizer)
    entries = describe_state(optimizer, param)
    assert [(entry.key, entry.quantization) for entry in entries] == [
        ("exp_avg_codes", Quantization(512, "dynamic-signed", "exp_avg_absmax")),
        ("exp_avg_absmax", None),
        ("exp_avg_sq_codes", Quantization(512, "dynamic-unsigned", "exp_avg_sq_absmax")),
        ("exp_avg_sq_absmax", None),
    ]
    assert all(entry.tensor is optimizer.state[param][entry.key] for entry in entries)


@pytest.mark.parametrize(
    ("make", "signed", "unsigned"),
    [
        (Lion8bit, ["exp_avg"], []),
        (partial(RMSprop8bit, centered=True, momentum=0.9), ["grad_avg", "momentum_buffer"], ["square_avg"]),
        (AdEMAMix8bit, ["exp_avg", "exp_avg_slow"], ["exp_avg_sq"]),
    ],
)
def test_every_moment_has_the_codebook_of_its_sign(make: Any, signed: list[str], unsigned: list[str]) -> None:
    param = _param()
    optimizer = make([param])
    ensure_state(optimizer)
    found = {e.key: e.quantization for e in describe_state(optimizer, param) if e.quantization is not None}
    assert found == {
        f"{moment}_codes": Quantization(256, f"dynamic-{kind}", f"{moment}_absmax")
        for kind, moments in (("signed", signed), ("unsigned", unsigned))
        for moment in moments
    }


def test_an_optimizer_of_another_package_is_not_guessed() -> None:
    param = _param()
    optimizer = torch.optim.AdamW([param])
    _train(param, optimizer, 1)
    with pytest.raises(ConfigurationError, match=r"AdamW is unknown here; use an optimizer of holdfast\.optim"):
        describe_state(optimizer, param)


@_OPTIMIZERS
def test_32_bit_state_is_two_plain_tensors(make: type[torch.optim.Optimizer]) -> None:
    param = _param((5,))
    optimizer = make([param])
    ensure_state(optimizer)
    entries = describe_state(optimizer, param)
    assert [(e.key, e.tensor.dtype, e.quantization) for e in entries] == [
        ("exp_avg", torch.float32, None),
        ("exp_avg_sq", torch.float32, None),
    ]


@_OPTIMIZERS
def test_what_is_described_is_all_it_takes_to_go_on_elsewhere(make: type[torch.optim.Optimizer]) -> None:
    param = _param()
    optimizer = make([param])
    _train(param, optimizer, 3)
    other_param = nn.Parameter(param.detach().clone())
    other = make([other_param])
    ensure_state(other)
    for target, source in zip(describe_state(other, other_param), describe_state(optimizer, param), strict=True):
        target.tensor.copy_(source.tensor)
    load_scalars(other, other_param, json.loads(json.dumps(scalars(optimizer, param))))
    assert scalars(other, other_param) == {"step": 3}
    _train(param, optimizer, 2, seed=7)
    _train(other_param, other, 2, seed=7)
    assert torch.equal(param, other_param)


@_OPTIMIZERS
def test_state_that_was_never_made_is_an_error_and_none_is_made_by_asking(make: type[torch.optim.Optimizer]) -> None:
    param = _param()
    optimizer = make([param])
    for ask in (describe_state, scalars):
        with pytest.raises(ConfigurationError, match=r"shape \[64, 80\] has no optimizer state; call ensure_state"):
            ask(optimizer, param)
    assert len(optimizer.state) == 0


@_OPTIMIZERS
def test_a_frozen_parameter_has_nothing_to_describe(make: type[torch.optim.Optimizer]) -> None:
    frozen = _param().requires_grad_(False)
    optimizer = make([frozen, _param()])
    ensure_state(optimizer)
    assert describe_state(optimizer, frozen) == [] and scalars(optimizer, frozen) == {}
    load_scalars(optimizer, frozen, {})


@_OPTIMIZERS
def test_scalars_of_something_else_are_refused(make: type[torch.optim.Optimizer]) -> None:
    param = _param()
    optimizer = make([param])
    ensure_state(optimizer)
    with pytest.raises(
        ConfigurationError, match=r"optimizer scalars \['epoch'\] do not fit; this state has \['step'\]"
    ):
        load_scalars(optimizer, param, {"epoch": 3})
