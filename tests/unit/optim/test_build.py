"""Configuration to optimizer: which class, which groups, which state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import holdfast.optim
from holdfast.errors import ConfigurationError
from holdfast.optim import (
    AdamW8bit,
    BlockwiseOptimizer,
    OptimConfig,
    OptimName,
    StableEmbedding,
    build_optimizer,
    ensure_state,
    parameter_groups,
)
from holdfast.optim.config import moment_count

_each_name = pytest.mark.parametrize("name", list(OptimName))


def _config(name: OptimName, **values: Any) -> OptimConfig:
    """Defaults, with a third beta where it is needed."""
    betas = [0.9, 0.95, 0.999] if name.kind == "ademamix" else [0.9, 0.95]
    return OptimConfig(name=name, betas=betas, **values)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 96), nn.Linear(96, 96), nn.LayerNorm(96))


def test_matrices_and_embeddings_decay_and_vectors_do_not_and_small_ones_keep_32_bits() -> None:
    network, config = _network(), OptimConfig(weight_decay=0.3)
    names = {id(p): n for n, p in network.named_parameters()}
    groups = parameter_groups(network, OptimConfig(weight_decay=0.3, min_8bit_size=64 * 96 + 1))
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [
        ["1.weight"],
        ["0.weight"],
        ["1.bias", "2.weight", "2.bias"],
    ]
    assert [(g["weight_decay"], g["bits"], g["min_8bit_size"]) for g in groups] == [
        (0.3, 8, 0),
        (0.3, 32, 0),
        (0.0, 32, 0),
    ]
    decayed, free = parameter_groups(network.named_parameters(), config)
    assert [names[id(p)] for p in decayed["params"]] == ["0.weight", "1.weight"] and decayed["bits"] == 8
    assert [names[id(p)] for p in free["params"]] == ["1.bias", "2.weight", "2.bias"] and free["bits"] == 32


def test_32_bit_optimizers_have_no_group_with_8_bits() -> None:
    groups = parameter_groups(_network(), OptimConfig(name=OptimName.ADAMW, min_8bit_size=0))
    assert [group["bits"] for group in groups] == [32, 32]


def test_a_model_tells_which_embeddings_keep_32_bits_and_the_caller_may_name_more() -> None:
    network = nn.ModuleDict(
        {"stable": StableEmbedding(64, 96), "plain": nn.Embedding(64, 96), "out": nn.Linear(96, 64)}
    )
    stable, plain, out = (network[key].weight for key in ("stable", "plain", "out"))
    config = OptimConfig(min_8bit_size=1024)

    def exact(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
        return [p for group in groups if group["bits"] == 32 for p in group["params"] if p.ndim == 2]

    def same(found: list[nn.Parameter], *wanted: nn.Parameter) -> bool:
        return len(found) == len(wanted) and all(a is b for a, b in zip(found, wanted, strict=True))

    assert same(exact(parameter_groups(network, config)), stable)
    assert same(exact(parameter_groups(network, config, keep_32bit=[out])), stable, out)
    assert same(exact(parameter_groups(network.named_parameters(), config)))
    assert same(exact(parameter_groups(network.named_parameters(), config, keep_32bit=[plain])), plain)
    network["out"].weight = stable  # tied, and then one parameter
    groups = parameter_groups(network, config)
    assert same(exact(groups), stable) and sum(len(group["params"]) for group in groups) == 5


def test_a_group_without_parameters_is_left_out_and_frozen_ones_belong_to_none() -> None:
    network = _network()
    network[1].bias.requires_grad_(False)
    (group,) = parameter_groups(network[1].named_parameters(), OptimConfig())
    assert group["params"] == [network[1].weight]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no parameter requires a gradient"):
        parameter_groups(_network().requires_grad_(False).named_parameters(), OptimConfig())


def test_every_option_reaches_the_8_bit_optimizer() -> None:
    config = OptimConfig(lr=0.1, betas=[0.5, 0.6], eps=1e-3, weight_decay=0.2, block_size=512, min_8bit_size=7)
    optimizer = build_optimizer(config, _network().parameters())
    (group,) = optimizer.param_groups
    assert type(optimizer) is AdamW8bit
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.5, 0.6), 1e-3, 0.2)
    assert (group["block_size"], group["min_8bit_size"]) == (512, 7)


@_each_name
def test_a_name_builds_the_class_of_that_name_with_its_options(name: OptimName) -> None:
    own = {"rmsprop": {"centered": True}, "ademamix": {"alpha": 3.0}, "lars": {"trust_coefficient": 0.1}}
    options = {"maximize": True, **own.get(name.kind, {})}
    optimizer = build_optimizer(_config(name, lr=0.1, options=options), _network().parameters())
    assert type(optimizer) is {c.lower(): getattr(holdfast.optim, c) for c in holdfast.optim.__all__}[name.value]
    assert isinstance(optimizer, BlockwiseOptimizer)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.1 and group["bits"] == (8 if name.is_8bit else 32)
    assert all(group[key] == value for key, value in options.items())


@_each_name
def test_the_number_of_moments_is_known_without_the_optimizer(name: OptimName) -> None:
    """What ``holdfast.configs`` reckons memory with."""
    every = [{}]
    if name.kind == "rmsprop":
        every += [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}, {"momentum": 0.0}]
    for options in every:
        config = _config(name, options=options)
        optimizer = build_optimizer(config, _network().parameters())
        assert moment_count(config) == len(optimizer.rule(optimizer.param_groups[0]).moments)
    if name in (OptimName.SGD, OptimName.LARS):
        config = _config(name, momentum=0.0)
        optimizer = build_optimizer(config, _network().parameters())
        assert moment_count(config) == len(optimizer.rule(optimizer.param_groups[0]).moments) == 0


@_each_name
def test_unsound_options_build_nothing_and_are_all_reported(name: OptimName) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_optimizer(_config(name, lr=-1.0, block_size=1), _network().parameters())
    assert len(caught.value.problems) == 2


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for param in network.parameters():
        param.grad = torch.randn(param.shape, generator=draw)
    optimizer.step()


@_each_name
def test_state_made_up_front_trains_like_state_made_by_the_first_step(name: OptimName) -> None:
    networks, config = (_network(), _network()), _config(name)
    eager, lazy = (build_optimizer(config, parameter_groups(n.named_parameters(), config)) for n in networks)
    ensure_state(eager)
    addresses = [v.data_ptr() for s in eager.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    for seed in range(3):
        _step(networks[0], eager, seed)
        _step(networks[1], lazy, seed)
    ensure_state(eager)
    after = [v.data_ptr() for s in eager.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert addresses == after
    for ours, theirs in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert {k: (v.dtype, v.shape) for k, v in eager.state[ours].items() if k != "step"} == {
            k: (v.dtype, v.shape) for k, v in lazy.state[theirs].items() if k != "step"
        }
        assert eager.state[ours]["step"] == lazy.state[theirs]["step"] == 3


def test_the_state_of_another_optimizer_is_not_guessed() -> None:
    with pytest.raises(ConfigurationError, match=r"SGD is unknown here; use an optimizer of holdfast\.optim"):
        ensure_state(torch.optim.SGD(_network().parameters()))
