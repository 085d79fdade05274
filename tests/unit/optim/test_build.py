"""Configuration to optimizer: which class, which groups, which state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.errors import ConfigurationError
from holdfast.optim import AdamW8bit, OptimConfig, OptimName, build_optimizer, ensure_state, parameter_groups

_BOTH = pytest.mark.parametrize("name", list(OptimName))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 96), nn.Linear(96, 96), nn.LayerNorm(96))


def test_matrices_and_embeddings_decay_and_vectors_do_not() -> None:
    network, config = _network(), OptimConfig(weight_decay=0.3)
    decayed, free = parameter_groups(network.named_parameters(), config)
    names = {id(p): n for n, p in network.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["0.weight", "1.weight"] and decayed["weight_decay"] == 0.3
    assert [names[id(p)] for p in free["params"]] == ["1.bias", "2.weight", "2.bias"] and free["weight_decay"] == 0.0


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


def test_adamw_is_the_one_of_torch() -> None:
    config = OptimConfig(name=OptimName.ADAMW, lr=0.1, betas=[0.5, 0.6], eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(config, _network().parameters())
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.5, 0.6), 1e-3, 0.2)


@_BOTH
def test_unsound_options_build_nothing_and_are_all_reported(name: OptimName) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_optimizer(OptimConfig(name=name, lr=-1.0, block_size=1), _network().parameters())
    assert len(caught.value.problems) == 2


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for param in network.parameters():
        param.grad = torch.randn(param.shape, generator=draw)
    optimizer.step()


@_BOTH
def test_state_made_up_front_trains_like_state_made_by_the_first_step(name: OptimName) -> None:
    networks, config = (_network(), _network()), OptimConfig(name=name)
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


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"fused": True}])
def test_state_of_torch_variants_is_complete(options: dict[str, bool]) -> None:
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    ensure_state(optimizer)
    keys = {id(p): set(optimizer.state[p]) for p in network.parameters()}
    _step(network, optimizer, 0)
    assert {id(p): set(optimizer.state[p]) for p in network.parameters()} == keys


def test_the_state_of_another_optimizer_is_not_guessed() -> None:
    with pytest.raises(ConfigurationError, match="optimizer SGD is unknown"):
        ensure_state(torch.optim.SGD(_network().parameters()))
