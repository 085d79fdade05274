"""Wrapping and unwrapping: a decoder of our own, plain modules, and GPT-2's transposed layers."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.adapters import (
    AdaptedLinear,
    adapters_of,
    create_method,
    eject,
    finish_task,
    footprint,
    inject,
    merge,
    start_task,
    trainable_parameters,
    use_tasks,
)
from holdfast.errors import ConfigurationError
from holdfast.optim import OptimConfig, parameter_groups
from holdfast.trainer.model import Decoder, initialise
from tests.support.tiny_training import TINY


class Conv1D(nn.Module):
    """As in GPT-2: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _decoder(**changes: Any) -> Decoder:
    model = Decoder(dataclasses.replace(TINY, **changes))
    initialise(model, 0)
    return model


def _sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Conv1D(5, 8), nn.Sequential(nn.Linear(5, 3, bias=False)))


def _train_by_hand(model: nn.Module, *names: str) -> None:
    torch.manual_seed(1)
    for name in names:
        start_task(model, name)
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter) / 4)
        finish_task(model)


_TOKENS = torch.arange(12).view(2, 6)


def test_a_decoder_is_wrapped_frozen_and_given_back_bit_by_bit() -> None:
    model = _decoder()
    model.head.norm.weight.requires_grad_(False)
    before = {name: (t.clone(), id(t)) for name, t in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    want = model(_TOKENS)
    adapters = inject(model, create_method("mora", {"rank": 2}), ["wq", "attention.wv"])
    assert list(adapters.layers) == [f"blocks.{i}.attention.{w}" for i in range(2) for w in ("wq", "wv")]
    assert torch.equal(model(_TOKENS), want) and not any(p.requires_grad for p in model.parameters())
    _train_by_hand(model, "a")
    assert not torch.equal(model(_TOKENS), want)
    eject(model)
    after = {name: (t, id(t)) for name, t in model.state_dict(keep_vars=True).items()}
    assert {n: i for n, (_, i) in after.items()} == {n: i for n, (_, i) in before.items()}
    assert all(torch.equal(t, before[name][0]) for name, (t, _) in after.items())
    assert dict(model.named_modules()) == modules
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.norm.weight"]
    with pytest.raises(ConfigurationError, match="no adapters"):
        adapters_of(model)


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        ("all-linear", ["0", "2", "3.0"]),
        (r"\d", ["0", "2"]),
        (["0"], ["0", "3.0"]),
        (["3.0", "2"], ["2", "3.0"]),
    ],
)
def test_layers_are_chosen_by_suffix_expression_or_all(choice: str | list[str], want: list[str]) -> None:
    model = _sequential()
    assert list(inject(model, create_method("lora"), choice).layers) == want
    assert [name for name, m in model.named_modules() if isinstance(m, AdaptedLinear)] == want


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["wq", "0", "wz"], r"no module is called 'wq'.*\n.*no module is called 'wz'"),
        ([], "target_modules is empty"),
        (["1"], "1 is a ReLU, not a linear layer"),
        ("nothing", "matches no linear layer; linear layers are called 0, 2"),
        ("(", "no regular expression"),
    ],
)
def test_a_choice_without_a_match_says_what_there_is(choice: str | list[str], message: str) -> None:
    model = _sequential()
    with pytest.raises(ConfigurationError, match=message):
        inject(model, create_method("lora"), choice)
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_shared_layers_and_second_adapters_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"head.output shares its weight .* exclude it or untie"):
        inject(_decoder(tie_embeddings=True), create_method("lora"))
    tied = _decoder(tie_embeddings=True)
    inject(tied, create_method("lora"), exclude=["head.output"])
    assert "head.output" not in adapters_of(tied).layers
    twice = nn.Linear(3, 3)
    with pytest.raises(ConfigurationError, match="0 is a layer with several names"):
        inject(nn.Sequential(twice, twice), create_method("lora"))
    with pytest.raises(ConfigurationError, match="has adapters already"):
        inject(tied, create_method("mora"))
    with pytest.raises(ConfigurationError, match="leaves none"):
        inject(_sequential(), create_method("lora"), ["2"], exclude=["2"])


def test_an_attention_projection_that_is_never_called_is_left_out() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    with pytest.raises(ConfigurationError, match="without being called"):
        inject(model, create_method("lora"), ["out_proj"])
    assert list(inject(model, create_method("lora")).layers) == ["1"]


@pytest.mark.parametrize("name", ["lora", "freeze_and_add", "olora"])
@pytest.mark.parametrize("tasks", [(), ("a",), ("a", "b")])
def test_merged_weights_compute_what_the_adapters_did(name: str, tasks: tuple[str, ...]) -> None:
    model = _sequential().double()
    base = copy.deepcopy(model)
    inject(model, create_method(name, {"rank": 2, "scale": 3.0}))
    _train_by_hand(model, *tasks)
    x = torch.randn(4, 6, dtype=torch.float64)
    want = model.eval()(x)
    weights = merge(model)
    assert all(torch.equal(t, base.state_dict()[key]) for key, t in model.state_dict().items())
    assert {key: t.shape for key, t in weights.items()} == {k: base.state_dict()[k].shape for k in weights}
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)
    assert bool(tasks) == (not torch.equal(model(x), base(x)))


def test_what_cannot_be_merged_is_refused_and_stays() -> None:
    model = _sequential()
    inject(model, create_method("mora"))
    with pytest.raises(ConfigurationError, match="mora cannot be merged: the weights of its atoms depend on the input"):
        merge(model)
    assert adapters_of(model).method.name == "mora"
    eject(model)
    inject(model, create_method("lora"))
    start_task(model, "a")
    with pytest.raises(ConfigurationError, match="'a' is being trained"):
        merge(model)


def test_an_oracle_merges_the_task_that_is_shown() -> None:
    model = _sequential().double()
    inject(model, create_method("oracle", {"rank": 2}))
    _train_by_hand(model, "a", "b")
    use_tasks(model, only="a")
    x = torch.randn(4, 6, dtype=torch.float64)
    want = model(x)
    model.load_state_dict(merge(model), strict=False)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)


def test_every_element_is_counted() -> None:
    model = _sequential()
    per_task = 2 * ((6 + 8) + (8 + 5) + (5 + 3))
    inject(model, create_method("mora", {"rank": 2, "top_k": 3}))
    assert dataclasses.astuple(footprint(model)) == (0, 0, 0)
    _train_by_hand(model, "a", "b")
    keys, values = 4 * (6 + 8 + 5), 3 * (8 + 5 + 3)
    assert dataclasses.astuple(footprint(model)) == (2 * per_task, keys + values, 0)
    start_task(model, "c")
    found = footprint(model)
    assert (found.stored, found.trainable) == (3 * per_task, per_task)
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.active == 6 * (6 + 8 + 5) + values
    use_tasks(model, first=1)
    assert footprint(model).active == 2 * (6 + 8 + 5) + 2 * (8 + 5 + 3)


def test_parameters_go_to_an_optimizer_of_this_package() -> None:
    model = _decoder()
    inject(model, create_method("lora", {"rank": 2}), ["wq"])
    with pytest.raises(ConfigurationError, match="no parameter requires a gradient"):
        parameter_groups(model, OptimConfig())
    start_task(model, "a")
    groups = parameter_groups(model, OptimConfig())
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trainable_parameters(model)}


def test_a_deep_copy_has_adapters_of_its_own() -> None:
    model = _sequential()
    inject(model, create_method("freeze_and_add", {"rank": 2}))
    twin = copy.deepcopy(model)
    _train_by_hand(twin, "a")
    assert adapters_of(model).tasks == [] and adapters_of(twin).tasks == ["a"]
    x = torch.randn(2, 6)
    assert not torch.equal(model(x), twin(x))
    eject(twin)
    assert torch.equal(model(x), twin(x)) and adapters_of(model).layers.keys() == {"0", "2", "3.0"}


def test_adapters_follow_the_model_to_another_dtype() -> None:
    model = _sequential()
    inject(model, create_method("mora", {"rank": 2}))
    _train_by_hand(model, "a")
    model.to(torch.bfloat16)
    assert model.eval()(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    start_task(model, "b")
    assert {p.dtype for p in trainable_parameters(model)} == {torch.bfloat16}


def test_the_weight_that_a_model_looks_at_is_the_bases() -> None:
    model = _sequential()
    bases = [model[0], model[3][0]]
    inject(model, create_method("lora"))
    assert model[0].weight is bases[0].weight and model[0].bias is bases[0].bias and model[3][0].bias is None
