"""A 4-bit base: codes against their formula in float64, and layers under everything that adapters do."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.adapters import (
    adapters_of,
    base_fingerprint,
    base_footprint,
    create_method,
    dequantise_base,
    eject,
    finish_task,
    inject,
    load_adapters,
    load_peft,
    merge,
    quantise_base,
    save_adapters,
    save_peft,
    start_task,
    trainable_parameters,
    using_tasks,
)
from holdfast.adapters.methods.brainstacks import (
    BoostPlan,
    Brainstacks,
    Curriculum,
    Domain,
    Pairs,
    PreferencePlan,
    Preferences,
    base_features,
    check_frozen,
    page_stacks,
    prefix,
    tune_preferences,
    validate,
)
from holdfast.adapters.nf4 import CODEBOOK, GROUP, NF4Linear, Quantised, backends, dequantise, quantise
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.trainer.model import Decoder, initialise
from tests.support.tiny_training import TINY

_WIDEST = max(b - a for a, b in pairwise(CODEBOOK))


def _codes(found: Quantised, count: int) -> list[int]:
    """One by one, the high half of a byte first."""
    halves = [half for byte in found.codes.tolist() for half in (byte >> 4, byte & 15)]
    return halves[:count]


def _absmax(found: Quantised) -> Tensor:
    """From what is stored, in float64."""
    scale = found.scale.double().repeat_interleave(GROUP)[: len(found.absmax)]
    return (found.mean.double() + found.absmax.double() * scale / 127).clamp_min(0)


def _blocks(weight: Tensor) -> list[Tensor]:
    return list(weight.double().flatten().split(64))


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 7, bias=False), nn.LayerNorm(7))


_X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def _train_by_hand(model: nn.Module, *names: str) -> None:
    torch.manual_seed(1)
    for name in names:
        start_task(model, name)
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter) / 4)
        finish_task(model)


# -- codes ------------------------------------------------------------------------------------------------------------


def test_the_codebook_is_the_quantiles_of_the_paper() -> None:
    """Section 3 and appendix E: the mean of 1 - 1/32 and 1 - 1/30 is the outermost quantile; eight parts to zero on the
    positive side, seven on the other, and all over the largest."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    upper = [NormalDist().inv_cdf(outermost + (0.5 - outermost) * i / 8) for i in range(8)]
    lower = [-NormalDist().inv_cdf(outermost + (0.5 - outermost) * i / 7) for i in range(7)]
    want = [value / upper[0] for value in sorted([*upper, 0.0, *lower])]
    assert len(CODEBOOK) == 16 and list(CODEBOOK) == pytest.approx(want, abs=5e-7)


@given(st.integers(1, 3), st.integers(1, 150), st.sampled_from([1e-3, 1.0, 1e4]), st.integers(0, 10**6))
def test_codes_are_the_nearest_to_each_share_of_its_blocks_largest(d: int, o: int, size: float, seed: int) -> None:
    weight = size * torch.randn(o, d, generator=torch.Generator().manual_seed(seed))
    shares = torch.cat([block / block.abs().max() for block in _blocks(weight)])
    away = (shares[:, None] - torch.tensor(CODEBOOK, dtype=torch.float64)).abs()
    got = torch.tensor(_codes(quantise(weight), weight.numel()))
    chosen = away.gather(1, got[:, None])[:, 0]
    assert float((chosen - away.min(1).values).max()) < 1e-6  # of two that are as near, either will do


def test_codes_are_packed_with_the_earlier_one_in_the_high_half_of_a_byte() -> None:
    weight = torch.tensor(CODEBOOK[:3])
    found = quantise(weight)
    assert found.codes.tolist() == [0x01, 0x27]  # the last half stands for nothing, with the code of zero
    assert found.codes.dtype == torch.uint8 and found.absmax.dtype == torch.int8


@given(st.integers(0, 40_000), st.integers(0, 10**6))
def test_absmax_is_kept_in_steps_around_its_mean(count: int, seed: int) -> None:
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed)).square()
    found = quantise(weight)
    largest = torch.stack([b.abs().max() for b in _blocks(weight)]) if count else torch.empty(0, dtype=torch.float64)
    assert found.absmax.shape == largest.shape and len(found.scale) == -(-len(largest) // GROUP)
    if not count:
        return
    assert float(found.mean) == pytest.approx(float(largest.mean()), rel=1e-6)
    for group, scale, steps in zip(largest.split(GROUP), found.scale, found.absmax.split(GROUP), strict=True):
        away = group - found.mean.double()
        assert float(scale) == pytest.approx(float(away.abs().max()), rel=1e-5, abs=1e-7)
        assert int(steps.abs().max()) <= 127
        assert float((away - steps.double() * scale.double() / 127).abs().max()) <= float(scale) / 254 * (1 + 1e-4)


_NUMBERS = st.floats(-1e6, 1e6, width=32).map(lambda v: v if abs(v) > 1e-20 else 0.0)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    size=st.integers(0, 300),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_shape_comes_back_within_the_bound_and_its_zeros_as_zeros(
    shape: tuple[int, ...], size: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    shape = (*shape, size)
    count = math.prod(shape)
    some = data.draw(st.lists(_NUMBERS, min_size=min(count, 1), max_size=20))
    weight = torch.tensor(some or [0.0]).repeat(-(-count // max(1, len(some))) + 1)[:count].view(shape).to(dtype)
    found = quantise(weight)
    back = dequantise(found, shape, torch.float64)
    assert back.shape == shape and back.dtype == torch.float64 and bool(back.isfinite().all())
    assert bool((back[weight == 0] == 0).all())
    for got, want, absmax in zip(_blocks(back), _blocks(weight), _absmax(found), strict=True) if count else ():
        largest = want.abs().max()
        bound = _WIDEST / 2 * largest + (largest - absmax).abs()
        assert float((got - want).abs().max()) <= float(bound) * (1 + 1e-5)
        assert float((largest - absmax).abs()) <= float(found.scale.max()) / 254 * (1 + 1e-4) + 1e-6 * float(largest)
    again = quantise(back.float())
    assert torch.equal(again.codes, found.codes)


def test_a_block_that_is_too_small_for_its_group_is_zero_and_never_turns_around() -> None:
    weight = torch.cat([torch.full((64 * 9,), 100.0), torch.full((64,), -1e-3), torch.zeros(64)])
    found = quantise(weight)
    back = dequantise(found, weight.shape, torch.float32)
    assert bool((back[:576] > 0).all()) and bool((back[576:640] <= 0).all()) and not back[640:].any()
    assert torch.equal(quantise(back).codes, found.codes)
    # The nearest step to each of these twelve is below zero: -11 × 7.39 / 127 from a mean of 0.62.
    weight = torch.cat([torch.full((64,), 8.0), torch.full((64 * 12,), 0.01)])
    found = quantise(weight)
    assert float(found.mean + found.absmax[1] * found.scale / 127) < 0
    back = dequantise(found, weight.shape, torch.float32)
    assert not back[64:].any() and not bool(torch.signbit(back).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once_to_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    found = quantise(torch.randn(9, 31, generator=torch.Generator().manual_seed(0)))
    exact = torch.tensor([CODEBOOK[c] for c in _codes(found, 279)], dtype=torch.float32)
    scale = found.scale / 127 * found.absmax.float() + found.mean
    want = exact * scale.repeat_interleave(64)[:279]
    assert torch.equal(dequantise(found, (9, 31), dtype), want.view(9, 31).to(dtype))


@pytest.mark.parametrize(
    ("weight", "block_size", "message"),
    [
        (torch.ones(4, dtype=torch.int8), 64, r"weights of torch.int8 cannot be quantised"),
        (torch.tensor([1.0, math.nan]), 64, "not finite in fp32"),
        (torch.tensor([1e300], dtype=torch.float64), 64, "not finite in fp32"),
        (torch.ones(4), 65, "block_size=65 must be one of 64, 128"),
        (torch.ones(4), 0, "block_size=0 must be one of"),
    ],
)
def test_what_has_no_codes_is_refused(weight: Tensor, block_size: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quantise(weight, block_size=block_size)


def test_bitsandbytes_does_it_on_cuda_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[dict[str, Any]]()

    def dequantize_4bit(codes: Tensor, **kw: Any) -> None:
        calls.append(kw)
        halves = torch.stack([codes >> 4, codes & 15], -1).flatten()[: kw["out"].numel()]
        values = torch.tensor(CODEBOOK)[halves.int()] * kw["absmax"].repeat_interleave(kw["blocksize"])[: len(halves)]
        kw["out"].copy_(values.view_as(kw["out"]))

    theirs, package = ModuleType("bitsandbytes.functional"), ModuleType("bitsandbytes")
    theirs.dequantize_4bit = dequantize_4bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", theirs)
    monkeypatch.setattr(backends, "_bitsandbytes", backends._bitsandbytes.__wrapped__)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for device, dtype, backend in (
        (cpu, torch.bfloat16, "auto"),
        (gpu, torch.bfloat16, "torch"),
        (gpu, torch.double, "auto"),
    ):
        assert backends.kernel_for(device, dtype, backend) is None
    kernel = backends.kernel_for(gpu, torch.bfloat16, "auto")
    assert kernel is not None
    found = quantise(torch.randn(9, 31), block_size=128)
    want = dequantise(found, (9, 31), torch.bfloat16, block_size=128)
    monkeypatch.setattr("holdfast.adapters.nf4.codes.kernel_for", lambda *_: kernel)
    assert torch.equal(dequantise(found, (9, 31), torch.bfloat16, block_size=128), want)
    assert [(kw["blocksize"], kw["quant_type"], kw["absmax"].dtype) for kw in calls] == [(128, "nf4", torch.float32)]
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert backends.kernel_for(gpu, torch.bfloat16, "auto") is None


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (0, 24)])
def test_a_layer_is_the_product_with_its_dense_weight_and_gradients_pass_to_its_input(
    bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 7, bias=bias, dtype=torch.float64)
    layer = NF4Linear.of(linear)
    assert layer.compute_dtype == torch.float64
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight(), linear.bias), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.dense()(x), layer(x), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,)) and torch.autograd.gradgradcheck(layer, (x,))
    assert [name for name, _ in layer.named_parameters()] == ["bias"] * bias


def test_a_graph_keeps_no_dense_weight() -> None:
    layer = NF4Linear.of(nn.Linear(24, 40))
    sizes = list[int]()

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(_X.clone().requires_grad_()).square().sum().backward()
    assert sizes and max(sizes) < 24 * 40


def test_a_layer_computes_in_its_inputs_dtype_under_autocast_too() -> None:
    layer = NF4Linear.of(nn.Linear(24, 7))
    assert layer(_X.bfloat16()).dtype == torch.bfloat16
    x = _X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        want = layer.dense()(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0, atol=0.02)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(5, -1), rtol=0, atol=0.05)


def test_another_dtype_changes_no_code_and_no_scale() -> None:
    model = _model()
    quantise_base(model)
    layer = model[0]
    assert isinstance(layer, NF4Linear)
    want, digest = layer.dense_weight(), {name: t.clone() for name, t in layer.state_dict().items() if name != "bias"}
    model.to(torch.bfloat16)
    assert layer.compute_dtype == torch.bfloat16 and layer.dense_weight().dtype == torch.bfloat16
    assert model(_X.bfloat16()).dtype == torch.bfloat16
    inject(model, create_method("lora", {"rank": 2}))
    start_task(model, "a")
    assert {p.dtype for p in trainable_parameters(model)} == {torch.bfloat16}
    assert model.train()(_X.bfloat16()).dtype == torch.bfloat16
    eject(model)
    model.float()
    assert torch.equal(layer.dense_weight(), want) and all(
        torch.equal(layer.state_dict()[n], digest[n]) for n in digest
    )


def test_a_quantised_model_is_smaller_and_says_by_how_much() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.LayerNorm(512))
    dense = base_footprint(model)
    assert (dense.quantised, dense.quantised_bytes, dense.bits_per_weight) == (0, 0, 0.0)
    assert dense.other_bytes == 4 * (2 * 512 * 513 + 2 * 512)
    assert quantise_base(model) == ["0", "1"]
    found = base_footprint(model)
    blocks = 512 * 512 // 64
    each = 512 * 512 // 2 + blocks + 4 * blocks // GROUP + 4
    assert found.quantised == 2 * 512 * 512 and found.quantised_bytes == 2 * each
    assert found.bits_per_weight == pytest.approx(4.127, abs=1e-3)
    assert found.other_bytes == 4 * 4 * 512
    inject(model, create_method("lora"))
    _train_by_hand(model, "a")
    assert base_footprint(model) == found
    shared = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    shared[1].weight = shared[0].weight
    assert base_footprint(shared).other_bytes == 4 * 36


def test_a_state_dict_goes_to_another_model_of_the_same_shapes() -> None:
    model, other = _model(), _model()
    with torch.no_grad():
        other[0].weight.normal_()
        other[0].bias.normal_()
    quantise_base(model)
    quantise_base(other)
    assert not torch.equal(other(_X), model(_X)) and base_fingerprint(other) != base_fingerprint(model)
    assert other.load_state_dict(model.state_dict()) and torch.equal(other(_X), model(_X))
    assert base_fingerprint(other) == base_fingerprint(model)
    assert list(model[0].state_dict()) == ["bias", "weight", "absmax", "absmax_scale", "absmax_mean"]
    alone = NF4Linear(24, 40)
    assert not alone(_X).any()
    alone.load_state_dict(model[0].state_dict())
    assert torch.equal(alone(_X), model[0](_X))
    with pytest.raises(RuntimeError, match="absmax"):
        NF4Linear(24, 40, block_size=128).load_state_dict(model[0].state_dict())
    with pytest.raises(ConfigurationError, match="backend='gpu'"):
        NF4Linear(2, 2, backend="gpu")


@pytest.mark.parametrize("name", ["lora", "freeze_and_add", "mora", "olora", "brainstacks"])
def test_adapters_act_on_it_as_on_any_linear(name: str, tmp_path: Path) -> None:
    model = _model()
    quantise_base(model)
    layers, want, base = [model[0], model[2]], model(_X), base_fingerprint(model)
    frozen = {key: t.clone() for key, t in model.state_dict().items()}
    inject(model, create_method(name, {"rank": 2}))
    assert torch.equal(model(_X), want) and base_fingerprint(model) == base
    start_task(model, "a")
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    x = _X.clone().requires_grad_()
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
    assert x.grad is not None and bool(x.grad.any())
    finish_task(model)
    model.eval()
    learned = model(_X)
    assert not torch.equal(learned, want) and base_fingerprint(model) == base
    twin = copy.deepcopy(model)
    assert torch.equal(twin(_X), learned)
    save_adapters(model, tmp_path)
    fresh = _model()
    with pytest.raises(ManifestMismatch, match="belong to base weights"):
        load_adapters(fresh, tmp_path)
    quantise_base(fresh)
    load_adapters(fresh, tmp_path)
    assert torch.equal(fresh.eval()(_X), learned)
    eject(model)
    assert [model[0], model[2]] == layers and torch.equal(model(_X), want)
    assert all(torch.equal(t, frozen[key]) for key, t in model.state_dict().items())
    assert torch.equal(twin(_X), learned)  # has codes of its own


def test_merging_is_refused_until_the_base_is_dense_again() -> None:
    model = _model()
    quantise_base(model, exclude=["2"])
    inject(model, create_method("lora", {"rank": 2}))
    _train_by_hand(model, "a")
    want = model(_X)
    with pytest.raises(ConfigurationError, match=r"0 has torch.uint8 weights.*dequantise_base\(model\)"):
        merge(model)
    assert adapters_of(model).tasks == ["a"]
    dequantise_base(model)
    assert isinstance(adapters_of(model).layers["0"].base, nn.Linear)
    torch.testing.assert_close(model(_X), want, rtol=0, atol=1e-5)
    weights = merge(model)
    model.load_state_dict(weights, strict=False)
    torch.testing.assert_close(model(_X), want, rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in model[0].parameters() if p is model[0].weight)
    with pytest.raises(ConfigurationError, match="no layer of this Sequential is quantised"):
        dequantise_base(model)


def test_a_lora_of_peft_goes_from_one_quantised_base_to_another(tmp_path: Path) -> None:
    model, other = _model().to(torch.bfloat16), _model().to(torch.bfloat16)
    for one in (model, other):
        quantise_base(one)
    inject(model, create_method("lora", {"rank": 2}))
    _train_by_hand(model, "a")
    save_peft(model, tmp_path)
    load_peft(other, tmp_path)
    x = _X.bfloat16()
    y = other.eval()(x)
    assert torch.equal(y, model.eval()(x))
    eject(other)
    assert not torch.equal(other(x), y)


def test_activations_that_are_computed_again_give_the_same_gradients() -> None:
    found = []
    for is_checkpointed in (False, True):
        model = Decoder(dataclasses.replace(TINY, activation_checkpointing=is_checkpointed))
        initialise(model, 0)
        quantise_base(model, exclude=["head.output"])
        inject(model, create_method("lora", {"rank": 2}), ["wq", "w_down"])
        start_task(model, "a")
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.fill_(0.01)
        _loss(model.train(), _text("ones", 0)).backward()
        found.append([p.grad for p in trainable_parameters(model)])
    assert all(torch.equal(plain, again) and bool(plain.any()) for plain, again in zip(*found, strict=True))


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_cannot_be_quantised_is_named_and_nothing_is_changed() -> None:
    model = _model()
    quantise_base(model, ["2"])
    with pytest.raises(ConfigurationError, match="2 is quantised already; exclude it"):
        quantise_base(model)
    assert type(model[0]) is nn.Linear
    assert quantise_base(model, exclude=["2"]) == ["0"]
    with torch.no_grad():
        (bad := _model())[2].weight[1, 1] = math.inf
    with pytest.raises(ConfigurationError, match="2: weights that are not finite"):
        quantise_base(bad)
    with pytest.raises(ConfigurationError, match="0: block_size=100"):
        quantise_base(bad, block_size=100)
    strange = nn.Sequential(_Scaled(3, 3), nn.Linear(3, 3))
    strange[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigurationError) as caught:
        quantise_base(strange)
    assert len(caught.value.problems) == 2 and "0 is a _Scaled" in str(caught.value)
    assert "1 has torch.int8 weights" in str(caught.value)
    assert all(type(layer) is not NF4Linear for layer in [*bad, *strange])
    inject(bad, create_method("lora"))
    with pytest.raises(ConfigurationError, match="has adapters already"):
        quantise_base(bad)


# -- Brainstacks ------------------------------------------------------------------------------------------------------


def _text(name: str, seed: int) -> Tensor:
    """Sequences that count upwards, by one or by three."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.arange(12) * {"ones": 1, "threes": 3}[name]
    return torch.randint(97, (8, 1), generator=draw) + steps


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])
    return loss


def test_brainstacks_learn_prefer_replay_and_page_on_a_four_bit_decoder(tmp_path: Path) -> None:
    def decoder() -> Decoder:
        model = Decoder(TINY)
        initialise(model, 0)
        assert len(quantise_base(model, exclude=["head.output"])) == 14
        return model

    def tune(model: nn.Module, _: int) -> None:
        one, three = _text("ones", 7), _text("threes", 7)
        answer = torch.arange(12).expand(8, -1) > 2
        pairs = Pairs(chosen=one, rejected=three, chosen_answer=answer, rejected_answer=answer)
        plan = PreferencePlan(steps=4, evaluate_every=2, lr=1e-2, warmup=0)
        found = tune_preferences(model, Preferences(train=[pairs], validation=[pairs]), plan)
        assert found.loss < found.before

    def domain(name: str, **options: Any) -> Domain:
        def batches(_: int) -> Iterator[Tensor]:
            return (_text(name, seed) for seed in range(99))

        return Domain(name=name, batches=batches, loss=_loss, validation=[_text(name, 999)], **options)

    domains = [domain("ones", tune=tune), domain("threes")]
    model = decoder()
    bare, base = copy.deepcopy(model), base_fingerprint(model)
    inject(model, Brainstacks(rank=2, experts=2), exclude=["head.output"])
    plan = BoostPlan(rounds=2, steps=20, evaluate_every=10, lr=2e-2, warmup=2)
    progress = Curriculum(plan=plan, directions=2, samples=2, library=tmp_path).learn(model, domains)
    check_frozen(model, progress.stacks)
    assert len(progress.stacks) >= 2 and all(stack.loss < stack.before for stack in progress.stacks)
    assert base_fingerprint(model) == base
    for found in domains:
        last = [stack for stack in progress.stacks if stack.domain == found.name][-1]
        assert validate(model, found, prefix(progress.stacks, found.name)) == last.loss
    text = _text("ones", 5)
    with using_tasks(model, first=0):
        assert torch.equal(model(text), bare(text))
    hidden = base_features(model, lambda: model(text), middle="blocks.0", last="blocks.1")
    assert hidden.shape == (8, 12, 16) and bool(hidden.isfinite().all())
    want = model(text)
    other = decoder()
    with page_stacks(other, tmp_path, budget_bytes=2**20):
        assert torch.equal(other(text), want)
