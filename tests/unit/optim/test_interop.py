"""Moving a run over from torch.optim, bitsandbytes and torchao, and back, with every moment as it was.

The formats of bitsandbytes 0.50 and torchao 0.18 are built by hand here, after state dicts that they wrote; the last
section does the same with the packages themselves, where they are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast import optim
from holdfast.errors import ConfigurationError
from holdfast.optim import codebook, dequantize_blockwise, quantize_blockwise
from holdfast.optim.interop import from_bitsandbytes, from_torch, from_torchao, to_bitsandbytes, to_torch, to_torchao
from holdfast.optim.optimizer import BlockwiseOptimizer

_EVEN, _RAGGED, _SMALL = (32, 144), (71, 83), (33,)
_NESTED = "__bnb_optimizer_quant_state__"

StateDict = dict[str, Any]


def _params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes or (_EVEN, _RAGGED, _SMALL)]


def _train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)
        optimizer.step()


def _ours(name: str, params: list[nn.Parameter], **options: Any) -> BlockwiseOptimizer:
    made: BlockwiseOptimizer = getattr(optim, name)(params, **options)
    return made


def _moment(optimizer: BlockwiseOptimizer, param: Tensor, name: str) -> Tensor:
    """Decoded."""
    state, group = optimizer.state[param], optimizer.param_groups[0]
    if name in state:
        return torch.as_tensor(state[name])
    signed = optimizer.rule(group).moments[name]
    return dequantize_blockwise(state[f"{name}_codes"], state[f"{name}_absmax"], signed, group["block_size"])


def _flat(value: Any) -> Iterator[Any]:
    """What a state dict holds, leaf by leaf; tensors as bytes, torchao's by their parts."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield key
            yield from _flat(value[key])
    elif hasattr(value, "codes"):
        yield from _flat([value.codes, value.scale, value.qmap, value.signed])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, Tensor):
        yield value.dtype, tuple(value.shape), bytes(value.detach().contiguous().view(-1).view(torch.uint8).tolist())
    else:
        yield value


def _same(one: Any, other: Any) -> bool:
    return list(_flat(one)) == list(_flat(other))


def _problems(caught: pytest.ExceptionInfo[ConfigurationError]) -> tuple[str, ...]:
    return caught.value.problems


# --- torch.optim -------------------------------------------------------------------------------------------------

_TORCH = [
    ("AdamW", {"lr": 2e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    ("Adam", {"lr": 2e-3, "eps": 1e-6, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.5}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    ("RMSprop", {"alpha": 0.9}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
]
_STRUCTURE = ("momentum", "centered")


@pytest.mark.parametrize(("name", "options"), _TORCH)
def test_a_run_of_torch_goes_on_here_and_back_there(name: str, options: dict[str, Any]) -> None:
    params = _params()
    theirs = getattr(torch.optim, name)(params, **options, maximize=True)
    _train(params, theirs, 3)
    mine = _params()
    optimizer = _ours(name, mine, **{k: v for k, v in options.items() if k in _STRUCTURE})
    optimizer.load_state_dict(from_torch(theirs.state_dict(), optimizer))
    for param, their_param in zip(mine, params, strict=True):
        for key in optimizer.rule(optimizer.param_groups[0]).moments:
            assert torch.equal(optimizer.state[param][key], theirs.state[their_param][key])
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in (*options, "maximize")} == {**options, "maximize": True}
    back = to_torch(optimizer)
    assert _same(back, theirs.state_dict())

    again = _params()
    returned = getattr(torch.optim, name)(again)
    returned.load_state_dict(back)
    for copies in zip(params, mine, again, strict=True):
        for copy in copies[1:]:
            copy.data.copy_(copies[0].data)
    for some, run in ((params, theirs), (mine, optimizer), (again, returned)):
        _train(some, run, 2, seed=2)
    for param, here, there in zip(params, mine, again, strict=True):
        assert torch.equal(there, param)
        torch.testing.assert_close(here, param, rtol=2e-6, atol=2e-6)


def test_state_that_sgd_does_not_keep_is_not_made_up() -> None:
    params = _params(_SMALL)
    plain, fresh = torch.optim.SGD(params, lr=0.1), torch.optim.SGD(params, lr=0.1, momentum=0.9)
    _train(params, plain, 2)
    assert from_torch(plain.state_dict(), _ours("SGD", params))["state"] == {}
    optimizer = _ours("SGD", params, momentum=0.9)
    assert from_torch(fresh.state_dict(), optimizer)["state"] == {}
    optimizer.ensure_state()
    assert to_torch(optimizer)["state"] == {}


def test_the_base_rate_of_a_schedule_goes_along() -> None:
    params = _params(_SMALL)
    theirs = torch.optim.AdamW(params, lr=torch.tensor(1e-3))
    torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 0.5)
    optimizer = _ours("AdamW", params)
    optimizer.load_state_dict(from_torch(theirs.state_dict(), optimizer))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"]) == pytest.approx((5e-4, 1e-3)) and type(group["lr"]) is float
    assert to_torch(optimizer)["param_groups"][0]["initial_lr"] == pytest.approx(1e-3)


def test_32_bit_moments_become_8_bit_ones_only_when_asked() -> None:
    params = _params()
    theirs = torch.optim.AdamW(params)
    _train(params, theirs, 2)
    theirs.state[params[0]]["exp_avg_sq"][0, 0] = 1e-12  # so small that it would become 0
    optimizer = _ours("AdamW8bit", params)
    with pytest.raises(ConfigurationError) as caught:
        from_torch(theirs.state_dict(), optimizer)
    assert _problems(caught) == tuple(
        f"the state of parameter {number} of group 0 is in 32 bits; pass lossy=True to quantise it, or set the "
        "group's bits=32"
        for number in (0, 1)
    )
    optimizer.load_state_dict(from_torch(theirs.state_dict(), optimizer, lossy=True))
    codes, absmax = quantize_blockwise(theirs.state[params[0]]["exp_avg_sq"], False, 256, nonzero=True)
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq_codes"], codes) and codes[0, 0] == 1
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq_absmax"], absmax)
    assert "exp_avg" in optimizer.state[params[2]]


def test_8_bit_moments_go_to_torch_decoded() -> None:
    params = _params()
    optimizer = _ours("AdamW8bit", params)
    _train(params, optimizer, 2)
    state = to_torch(optimizer)["state"]
    for number, param in enumerate(params):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[number][key], _moment(optimizer, param, key))


def test_moments_that_torch_would_round_to_bfloat16_stay_here_unless_asked() -> None:
    params = _params(_SMALL, dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(params)
    _train(params, theirs, 2)
    optimizer = _ours("AdamW", params)
    optimizer.load_state_dict(from_torch(theirs.state_dict(), optimizer))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    assert _same(to_torch(optimizer)["state"], theirs.state_dict()["state"])
    _train(params, optimizer, 1)
    with pytest.raises(ConfigurationError, match=r"exp_avg .* is fp32, and torch keeps it in the parameter's torch.bf"):
        to_torch(optimizer)
    rounded = to_torch(optimizer, lossy=True)["state"][0]["exp_avg"]
    assert torch.equal(rounded, optimizer.state[params[0]]["exp_avg"].bfloat16())


def test_what_does_not_fit_torch_or_us_is_refused() -> None:
    params = _params(_SMALL)
    amsgrad, centered = torch.optim.AdamW(params, amsgrad=True), torch.optim.RMSprop(params, centered=True)
    with pytest.raises(ConfigurationError, match="amsgrad=True keeps a third moment"):
        from_torch(amsgrad.state_dict(), _ours("AdamW", params))
    with pytest.raises(ConfigurationError, match="decoupled_weight_decay=True, as AdamW has it here"):
        from_torch(torch.optim.AdamW(params).state_dict(), _ours("Adam", params))
    with pytest.raises(ConfigurationError, match=r"group 0 of the state dict has centered=True \(here False\)"):
        from_torch(centered.state_dict(), _ours("RMSprop", params))
    with pytest.raises(ConfigurationError, match=r"no momentum, dampening, nesterov: SGD did not write it"):
        from_torch(torch.optim.AdamW(params).state_dict(), _ours("SGD", params))
    with pytest.raises(ConfigurationError, match=r"torch\.optim has no Lion; it shares AdamW, Adam, SGD, RMSprop"):
        to_torch(_ours("Lion", params))
    with pytest.raises(ConfigurationError, match=r"torch\.optim has no LARS"):
        to_torch(_ours("LARS", params))
    with pytest.raises(ConfigurationError, match="AdamW is no optimizer of holdfast"):
        from_torch(amsgrad.state_dict(), torch.optim.AdamW(params))  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ConfigurationError, match=r"groups of \[1\] parameters, this optimizer has groups of \[3\]"):
        from_torch(amsgrad.state_dict(), _ours("AdamW", _params()))


def test_state_of_another_shape_or_rule_is_refused_by_the_name_of_its_parameter() -> None:
    params = _params(_SMALL)
    theirs = torch.optim.AdamW([("layer.weight", params[0])])
    _train(params, theirs, 1)
    saved = theirs.state_dict()
    optimizer = _ours("AdamW", [("layer.weight", _params((5,))[0])])  # type: ignore[list-item]  # named, as torch allows
    with pytest.raises(ConfigurationError, match=r"exp_avg of parameter 'layer.weight' is \[33\]; .* the shape \[5\]"):
        from_torch(saved, optimizer)
    del saved["state"][0]["exp_avg_sq"]
    with pytest.raises(
        ConfigurationError, match=r"has \['exp_avg'\], this optimizer keeps \['exp_avg', 'exp_avg_sq'\]"
    ):
        from_torch(saved, optimizer)


def test_histories_of_percentile_clipping_do_not_travel() -> None:
    params = _params(_SMALL)
    optimizer = _ours("AdamW", params, percentile_clipping=5)
    _train(params, optimizer, 1)
    with pytest.raises(ConfigurationError, match=r"grad_norms .* is ours alone; lossy=True drops it"):
        to_torch(optimizer)
    assert set(to_torch(optimizer, lossy=True)["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(ConfigurationError, match="percentile_clipping=5, and the state dict no history"):
        from_torch(torch.optim.AdamW(params).state_dict(), optimizer)


@pytest.mark.usefixtures("_torchao_module")
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_state_that_was_given_away_shares_no_memory_with_the_optimizer(name: str) -> None:
    params = _params()
    optimizer = _ours(name, params)
    _train(params, optimizer, 1)
    before = list(_flat(optimizer.state_dict()))
    for made in (to_torch(optimizer), to_bitsandbytes(optimizer), to_torchao(optimizer)):
        for entry in made["state"].values():
            for value in entry.get(_NESTED, entry).values():
                for tensor in (getattr(value, "codes", value), getattr(value, "scale", value)):
                    torch.as_tensor(tensor).zero_()
    assert list(_flat(optimizer.state_dict())) == before


# --- bitsandbytes ------------------------------------------------------------------------------------------------


def _bnb_moments(shape: tuple[int, ...], block_size: int = 256, *, eight_bit: bool = True) -> dict[str, Tensor]:
    """What a two-state optimizer of bitsandbytes keeps for one parameter."""
    draw = torch.Generator().manual_seed(3)
    first = torch.randn(shape, generator=draw)
    second = torch.randn(shape, generator=draw).square()
    if not eight_bit:
        return {"state1": first, "state2": second}
    (codes1, absmax1), (codes2, absmax2) = (
        quantize_blockwise(first, True, block_size),
        quantize_blockwise(second, False, block_size),
    )
    tables = {"qmap1": codebook(True), "qmap2": codebook(False)}
    return {"state1": codes1, "absmax1": absmax1, "state2": codes2, "absmax2": absmax2, **tables}


def _bnb(*states: dict[str, Tensor], nested: bool = True, **options: Any) -> StateDict:
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "params": list(range(len(states)))}
    two = {} if "state2" not in states[0] else {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    entries = [{"step": 7, _NESTED: state} if nested else {"step": 7, **state} for state in states]
    return {"state": dict(enumerate(entries)), "param_groups": [{**group, **two, **options}]}


def _one_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.endswith("1")}


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit"])
def test_8_bit_moments_of_bitsandbytes_go_over_and_back_byte_for_byte(name: str) -> None:
    params = _params()
    saved = _bnb(*(_bnb_moments(shape, eight_bit=shape != _SMALL) for shape in (_EVEN, _RAGGED, _SMALL)))
    optimizer = _ours(name, params)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    for number, param in enumerate(params):
        theirs = saved["state"][number][_NESTED]
        for key, slot in (("exp_avg", 1), ("exp_avg_sq", 2)):
            want = theirs[f"state{slot}"]
            if f"qmap{slot}" in theirs:
                scale = theirs[f"absmax{slot}"].repeat_interleave(256)[: want.numel()].view(want.shape)
                want = theirs[f"qmap{slot}"][want.int()] * scale
            assert torch.equal(_moment(optimizer, param, key), want)
        assert optimizer.state[param]["step"] == 7
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95) and optimizer.param_groups[0]["weight_decay"] == 0.01
    back = to_bitsandbytes(optimizer)
    if name == "LAMB8bit":  # a scalar of scratch memory that its step wants to find
        assert all(torch.equal(back["state"][n][_NESTED].pop("unorm_vec"), torch.zeros(1)) for n in range(3))
    assert _same(back, saved)


@pytest.mark.parametrize(
    ("name", "betas", "eps", "expected"),
    [
        ("SGD8bit", (0.9, 0.3), 0.0, {"momentum": 0.9, "dampening": 0.0, "nesterov": False}),
        ("Lion8bit", (0.9, 0.3), 0.0, {"betas": (0.9, 0.3)}),
        ("SGD", (0.9, 0.3), 0.0, {"momentum": 0.9}),
        ("RMSprop", (0.9, 0.3), 1e-8, {"alpha": 0.9, "momentum": 0.0, "centered": False, "eps": 1e-8}),
        ("Adagrad", (0.0, 0.0), 1e-8, {"lr_decay": 0.0, "eps": 1e-8}),
    ],
)
def test_single_states_of_bitsandbytes_go_over_and_back(
    name: str, betas: tuple[float, float], eps: float, expected: dict[str, Any]
) -> None:
    """Its SGD and RMSprop take dampening, Nesterov and a momentum, and use none of them."""
    saved = _bnb(_one_state(_bnb_moments(_EVEN, eight_bit=name.endswith("8bit"))), betas=betas, eps=eps)
    others = {"momentum": 0.5, "dampening": 0.5} if "SGD" in name else {}
    optimizer = _ours(name, _params(_EVEN), **others)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected
    back = to_bitsandbytes(optimizer)
    assert _same(back["state"], saved["state"])
    assert back["param_groups"][0]["betas"][0] == betas[0] and back["param_groups"][0]["eps"] == eps


def test_the_stacked_moments_of_ademamix_are_told_apart() -> None:
    one, other = _bnb_moments(_EVEN), _bnb_moments((_EVEN[1], _EVEN[0]))
    stacked = {key: torch.stack([one[key], other[key].view(one[key].shape).flip(0)]) for key in ("state1", "absmax1")}
    options = {"betas": (0.9, 0.95, 0.999), "alpha": 5.0, "t_alpha": 100}
    saved = _bnb({**one, **stacked}, **options)
    optimizer = _ours("AdEMAMix8bit", _params(_EVEN))
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    (state,) = optimizer.state.values()
    assert torch.equal(state["exp_avg_codes"], one["state1"]) and torch.equal(
        state["exp_avg_slow_codes"], other["state1"].view(_EVEN).flip(0)
    )
    assert {key: optimizer.param_groups[0][key] for key in options} == options
    assert _same(to_bitsandbytes(optimizer), saved)


def test_stacked_moments_whose_blocks_share_a_scale_are_refused() -> None:
    optimizer = _ours("AdEMAMix8bit", _params(_RAGGED))
    optimizer.ensure_state()
    with pytest.raises(ConfigurationError, match=r"5893 elements, no multiple of 256: .* share a scale"):
        to_bitsandbytes(optimizer)
    saved = to_bitsandbytes(optimizer, lossy=True)
    with pytest.raises(ConfigurationError, match=r"5893 elements, no multiple of 256: .* share a scale"):
        from_bitsandbytes(saved, optimizer)
    assert _same(from_bitsandbytes(saved, optimizer, lossy=True)["state"], optimizer.state_dict()["state"])


def test_older_state_dicts_without_nesting_and_with_blocks_of_2048_are_read() -> None:
    saved = _bnb(_bnb_moments(_RAGGED, 2048), nested=False)
    optimizer = _ours("AdamW8bit", _params(_RAGGED), block_size=2048)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    (state,) = optimizer.state.values()
    assert torch.equal(state["exp_avg_absmax"], saved["state"][0]["absmax1"])


def test_another_block_size_is_refused_with_two_ways_out() -> None:
    saved, params = _bnb(_bnb_moments(_RAGGED, 2048)), _params(_RAGGED)
    optimizer = _ours("AdamW8bit", params)
    with pytest.raises(ConfigurationError) as caught:
        from_bitsandbytes(saved, optimizer)
    (problem,) = _problems(caught)
    assert problem == (
        "exp_avg of parameter 0 of group 0 is kept as dynamic-signed codes in blocks of 2048 and needs dynamic-signed "
        "codes in blocks of 256; quantising it anew is lossy: pass lossy=True to do it, or use block_size=2048"
    )
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer, lossy=True))
    theirs = saved["state"][0][_NESTED]
    decoded = dequantize_blockwise(theirs["state1"], theirs["absmax1"], True, 2048)
    assert torch.equal(optimizer.state[params[0]]["exp_avg_codes"], quantize_blockwise(decoded, True, 256)[0])
    larger = _ours("AdamW8bit", params, block_size=512)
    larger.ensure_state()
    with pytest.raises(ConfigurationError, match=r"blocks of 512 and needs .* blocks of 256"):
        to_bitsandbytes(larger)


@pytest.mark.parametrize(("name", "moment"), [("RMSprop8bit", "square_avg"), ("Adagrad8bit", "sum")])
def test_squares_under_the_signed_codebook_are_requantised_only_when_asked(name: str, moment: str) -> None:
    state = _one_state(_bnb_moments(_EVEN))
    state["state1"] = state["state1"].clamp(min=127)
    saved, params = _bnb(state), _params(_EVEN)
    optimizer = _ours(name, params)
    with pytest.raises(ConfigurationError, match=rf"{moment} .* dynamic-signed codes .* needs dynamic-unsigned codes"):
        from_bitsandbytes(saved, optimizer)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer, lossy=True))
    decoded = dequantize_blockwise(state["state1"], state["absmax1"], True, 256)
    codes, absmax = quantize_blockwise(decoded, False, 256, nonzero=True)
    assert _same(optimizer.state[params[0]], {"step": 7, f"{moment}_codes": codes, f"{moment}_absmax": absmax})
    with pytest.raises(ConfigurationError, match=rf"{moment} .* dynamic-unsigned codes .* needs dynamic-signed codes"):
        to_bitsandbytes(optimizer)
    assert "qmap2" not in to_bitsandbytes(optimizer, lossy=True)["state"][0][_NESTED]


def test_a_codebook_that_is_not_ours_is_refused_with_both_digests() -> None:
    state = _bnb_moments(_EVEN)
    state["qmap1"][200] += 1e-6
    with pytest.raises(ConfigurationError, match=r"qmap1 of parameter 0 .* SHA-256 [0-9a-f]{16}; .* e732639a65f497b4"):
        from_bitsandbytes(_bnb(state), _ours("AdamW8bit", _params(_EVEN)))
    state = _bnb_moments(_EVEN)
    del state["qmap2"]
    with pytest.raises(ConfigurationError, match=r"qmap2 .* has no codebook; dynamic-unsigned is 305f002cc11278fb"):
        from_bitsandbytes(_bnb(state), _ours("AdamW8bit", _params(_EVEN)), lossy=True)


def test_tensors_that_were_kept_in_32_bits_stay_so_and_8_bits_decode_where_32_are_asked_for() -> None:
    exact, coded = _bnb_moments(_EVEN, eight_bit=False), _bnb_moments(_EVEN)
    optimizer = _ours("AdamW8bit", _params(_EVEN))
    optimizer.load_state_dict(from_bitsandbytes(_bnb(exact), optimizer))
    (state,) = optimizer.state.values()
    assert torch.equal(state["exp_avg"], exact["state1"])
    _train(list(optimizer.param_groups[0]["params"]), optimizer, 1)
    assert "exp_avg_codes" in from_bitsandbytes(_bnb(exact), optimizer, lossy=True)["state"][0]
    made = from_bitsandbytes(_bnb(coded), _ours("AdamW", _params(_EVEN)))["state"][0]
    assert torch.equal(made["exp_avg"], dequantize_blockwise(coded["state1"], coded["absmax1"], True, 256))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"absmax1": None}, "absmax1 of parameter 0 of group 0 is missing"),
        ({"max1": torch.zeros(1)}, "one scale per tensor, not per block"),
        ({"gnorm_vec": torch.zeros(100)}, "gnorm_vec .* pass lossy=True to begin a new one"),
        ({"state2": None}, r"has \['state1'\]; this optimizer has the moments \['exp_avg', 'exp_avg_sq'\]"),
        ({"absmax2": torch.zeros(6)}, "absmax2 .* has 6 entries for 4608 codes: no block size explains that"),
        ({"state1": torch.zeros(_EVEN[::-1], dtype=torch.uint8).T}, r"shape \[32, 144\] with strides \[1, 32\]"),
        ({"state1": torch.zeros(7, dtype=torch.uint8)}, r"shape \[7\] .* the parameter needs \[32, 144\], contiguous"),
    ],
)
def test_state_of_bitsandbytes_that_means_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    state = {key: value for key, value in {**_bnb_moments(_EVEN), **change}.items() if value is not None}
    with pytest.raises(ConfigurationError, match=message):
        from_bitsandbytes(_bnb(state), _ours("AdamW8bit", _params(_EVEN)))


def test_rules_that_differ_under_one_name_are_refused() -> None:
    params = _params(_EVEN)
    saved = _bnb(_bnb_moments(_EVEN))
    with pytest.raises(ConfigurationError, match=r"Adam decouples weight_decay=0.01, .*; build AdamW"):
        from_bitsandbytes(saved, _ours("Adam8bit", params))
    with pytest.raises(ConfigurationError, match=r"LARS sums gradients up, .* is SGD8bit: build that"):
        from_bitsandbytes(saved, _ours("LARS8bit", params))
    with pytest.raises(ConfigurationError, match=r"betas=\(0.9, 0.95\), which are not those of AdEMAMix"):
        from_bitsandbytes(saved, _ours("AdEMAMix8bit", params))
    from_bitsandbytes(_bnb(_bnb_moments(_EVEN), weight_decay=0.0), _ours("Adam8bit", params))


def test_state_dicts_of_somebody_else_are_refused() -> None:
    saved, params = _bnb(_bnb_moments(_EVEN)), _params(_EVEN)
    with pytest.raises(ConfigurationError, match="groups have no betas, eps: Lion did not write it"):
        from_bitsandbytes(torch.optim.SGD(params).state_dict(), _ours("Lion8bit", params))
    with pytest.raises(ConfigurationError, match="parameter 5, which no group has"):
        from_bitsandbytes({**saved, "state": {5: saved["state"][0]}}, _ours("AdamW8bit", params))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SGD8bit", {"momentum": 0.9, "nesterov": True}, "nesterov=True of SGD is not known to bitsandbytes"),
        ("SGD8bit", {"momentum": 0.9, "dampening": 0.5}, "dampening=0.5 .* would go on with 0.0"),
        ("SGD", {}, "momentum=0 has no state"),
        ("RMSprop8bit", {"momentum": 0.9, "centered": True}, "centered=True .*\nmomentum=0.9 of RMSprop"),
        ("Adagrad8bit", {"lr_decay": 0.1}, "lr_decay=0.1"),
        ("Adam8bit", {"weight_decay": 0.1}, "weight_decay=0.1 of Adam"),
        ("AdamW8bit", {"maximize": True}, "maximize=True"),
    ],
)
def test_options_that_bitsandbytes_does_not_know_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        to_bitsandbytes(_ours(name, _params(_EVEN), **options))


# --- torchao -----------------------------------------------------------------------------------------------------


@dataclass
class _OptimState8bit:
    """torchao's tensor subclass, as far as anything here looks at it."""

    codes: Tensor
    scale: Tensor
    qmap: Tensor
    signed: bool
    dtype: torch.dtype | None = None


def _torchao(**options: Any) -> StateDict:
    def entry(shape: tuple[int, ...]) -> dict[str, Any]:
        theirs = _bnb_moments(shape, eight_bit=shape == _EVEN)
        first, second = theirs["state1"], theirs["state2"]
        if shape != _EVEN:
            return {"step": torch.tensor(7.0), "exp_avg": first, "exp_avg_sq": second}
        coded1 = _OptimState8bit(first, theirs["absmax1"], theirs["qmap1"], True)
        coded2 = _OptimState8bit(second, theirs["absmax2"], theirs["qmap2"], False)
        return {"step": torch.tensor(7.0), "exp_avg": coded1, "exp_avg_sq": coded2}

    group = {"lr": torch.tensor(0.25), "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}
    state = {number: entry(shape) for number, shape in enumerate((_EVEN, _RAGGED, _SMALL))}
    return {"state": state, "param_groups": [{**group, **options, "params": [0, 1, 2]}]}


@pytest.fixture
def _torchao_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchao.optim", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", SimpleNamespace(OptimState8bit=_OptimState8bit))


@pytest.mark.usefixtures("_torchao_module")
@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit"])
def test_moments_of_torchao_go_over_and_back_byte_for_byte(name: str) -> None:
    """It keeps tensors that are small or no multiple of 256 as they are, and so do we."""
    params, saved = _params(), _torchao()
    optimizer = _ours(name, params)
    optimizer.load_state_dict(from_torchao(saved, optimizer))
    assert ["exp_avg_codes" in optimizer.state[param] for param in params] == [True, False, False]
    theirs = saved["state"][0]["exp_avg"]
    assert torch.equal(optimizer.state[params[0]]["exp_avg_codes"], theirs.codes)
    assert (optimizer.state[params[0]]["step"], optimizer.param_groups[0]["lr"]) == (7, 0.25)
    assert _same(to_torchao(optimizer), saved)


@pytest.mark.usefixtures("_torchao_module")
def test_what_torchao_would_keep_unquantised_goes_over_decoded() -> None:
    params = _params()
    optimizer = _ours("AdamW8bit", params)
    _train(params, optimizer, 2)
    state = to_torchao(optimizer)["state"]
    assert isinstance(state[0]["exp_avg"], _OptimState8bit)
    assert torch.equal(state[1]["exp_avg"], _moment(optimizer, params[1], "exp_avg"))


def test_state_of_torchao_that_means_something_else_is_refused() -> None:
    optimizer = _ours("AdamW8bit", _params())
    saved = _torchao()
    saved["state"][0]["exp_avg"].qmap = torch.linspace(-1, 1, 16)  # 4 bits
    saved["state"][0]["exp_avg_sq"].scale = torch.zeros(13)
    saved["state"][1]["exp_avg"] = SimpleNamespace(device_mesh=None)
    saved["state"][2]["exp_avg"] = SimpleNamespace(codes=torch.zeros(_SMALL, dtype=torch.float8_e4m3fn), scale=1)
    with pytest.raises(ConfigurationError) as caught:
        from_torchao(saved, optimizer)
    codes, gather, fp8 = _problems(caught)
    assert codes.startswith("exp_avg of parameter 0 of group 0 has a codebook with SHA-256")
    assert gather.startswith("exp_avg of parameter 1 of group 0 is a DTensor; gather it first")
    assert fp8.startswith("exp_avg of parameter 2 of group 0 has no codebook")
    saved = _torchao()
    saved["state"][0]["exp_avg_sq"].scale = torch.zeros(13)
    with pytest.raises(ConfigurationError, match="has 13 scales for 4608 codes: no whole blocks"):
        from_torchao(saved, optimizer)
    with pytest.raises(ConfigurationError, match="amsgrad=True"):
        from_torchao(_torchao(amsgrad=True), optimizer)
    with pytest.raises(ConfigurationError, match=r"torchao\.optim has no SGD"):
        from_torchao(saved, _ours("SGD8bit", _params(), momentum=0.9))


def test_going_to_torchao_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    params = _params()
    optimizer = _ours("AdamW8bit", params)
    optimizer.ensure_state()
    with pytest.raises(ConfigurationError, match="to_torchao needs torchao, for its tensor class: pip install torchao"):
        to_torchao(optimizer)
    with pytest.raises(ConfigurationError, match=r"maximize=True is not known to torchao\.optim"):
        to_torchao(_ours("AdamW8bit", params, maximize=True))


# --- the packages themselves -------------------------------------------------------------------------------------

_BNB = [
    ("AdamW", {"weight_decay": 0.1}),
    ("Adam", {}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    ("Lion", {"weight_decay": 0.1}),
    ("AdEMAMix", {"t_alpha": 10, "t_beta3": 10}),
]


def _check_against(theirs: torch.optim.Optimizer, params: list[nn.Parameter], to: Any, back: Any, name: str) -> None:
    """Train there, go on here and again there: the other way round must end in the same bits."""
    _train(params, theirs, 3)
    mine, again = ([nn.Parameter(p.detach().clone()) for p in params] for _ in range(2))
    optimizer = _ours(name, mine, **({"momentum": 0.5} if "SGD" in name else {}))
    optimizer.load_state_dict(to(theirs.state_dict(), optimizer))
    saved = back(optimizer)
    assert _same(saved["state"], theirs.state_dict()["state"])
    returned = type(theirs)(again, **({"lr": 1.0, "momentum": 0.5} if "SGD" in name else {}))
    returned.load_state_dict(saved)
    for some, run in ((params, theirs), (mine, optimizer), (again, returned)):
        _train(some, run, 1, seed=2)
    for param, here, there in zip(params, mine, again, strict=True):
        assert torch.equal(there, param)
        torch.testing.assert_close(here, param, rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore")  # its own business
@pytest.mark.parametrize("suffix", ["8bit", ""])
@pytest.mark.parametrize(("name", "options"), _BNB)
def test_a_run_of_bitsandbytes_itself_goes_on_here_and_back_there(
    name: str, options: dict[str, Any], suffix: str
) -> None:
    peer = pytest.importorskip("bitsandbytes")
    params = _params(_EVEN, *([] if name == "AdEMAMix" else [_RAGGED]), _SMALL)
    theirs = getattr(peer.optim, name + suffix)(params, **options)
    _check_against(theirs, params, from_bitsandbytes, to_bitsandbytes, name + suffix)


@pytest.mark.slow  # compiles
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # its own business
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit"])
def test_a_run_of_torchao_itself_goes_on_here_and_back_there(name: str, dtype: torch.dtype) -> None:
    peer = pytest.importorskip("torchao.optim")
    params = _params(_EVEN, _RAGGED, _SMALL, dtype=dtype)
    theirs = getattr(peer, name)(params, weight_decay=0.1)
    _check_against(theirs, params, from_torchao, to_torchao, name)
