"""Lost stages rebuilt tensor by tensor, against the paper's formula in fp64."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.errors import ConfigurationError, Fault, ManifestMismatch
from holdfast.fault_tolerance.stage_policy import MomentRepair, Repair, plan_repair
from holdfast.fault_tolerance.stage_repair import (
    CODE_WEIGHTING,
    PAPER_WEIGHTING,
    GradientNorms,
    Weighting,
    average,
    previous_share,
    rebuild,
    rebuild_moments,
    share_across,
)

_SHAPES = {"0.attention.wo.weight": (6, 4), "0.norm.weight": (4,), "1.attention.wo.weight": (6, 4), "1.bias": ()}
_OUTPUTS = ("attention.wo.weight",)

_norms = st.floats(min_value=0.0, max_value=1e6, allow_subnormal=False)


def _stage(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in _SHAPES.items()}


def _poisoned(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.full(shape, math.nan, dtype=dtype) for name, shape in _SHAPES.items()}


def _filled(value: float) -> dict[str, Tensor]:
    return {name: torch.full(shape, value) for name, shape in _SHAPES.items()}


def _initial(name: str, shape: Sequence[int]) -> Tensor:
    return torch.full(tuple(shape), float(len(name)))


def _formula(previous: Tensor, following: Tensor, a: float, b: float) -> Tensor:
    """arXiv 2506.15461, section 4.2: (a W(i-1) + b W(i+1)) / (a + b), in fp64."""
    return (a * previous.double() + b * following.double()) / (a + b)


def _assert_equal(rebuilt: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert rebuilt.keys() == wanted.keys()
    for name in wanted:
        assert rebuilt[name].dtype == wanted[name].dtype
        assert torch.equal(rebuilt[name], wanted[name]), name


@given(_norms, _norms, st.sampled_from([1, 2]), st.sampled_from([0.0, 1e-4]))
def test_a_share_is_the_papers_quotient(previous: float, following: float, exponent: int, offset: float) -> None:
    a, b = (previous + offset) ** exponent, (following + offset) ** exponent
    share = previous_share(previous, following, Weighting(exponent, offset=offset))
    assert 0.0 <= share <= 1.0
    if a + b > 1e-290:  # a naive quotient of squares underflows below
        assert share == pytest.approx(a / (a + b), rel=1e-9, abs=1e-300)
    assert share + previous_share(following, previous, Weighting(exponent, offset=offset)) == pytest.approx(1.0)


def test_the_stage_with_the_larger_gradient_weighs_more() -> None:
    """Section 4.2's reason: it has converged less."""
    assert previous_share(3.0, 1.0, PAPER_WEIGHTING) == pytest.approx(0.9)
    assert previous_share(3.0, 1.0, Weighting(exponent=1)) == pytest.approx(0.75)
    assert previous_share(0.0, 1.0, CODE_WEIGHTING) == pytest.approx(1e-4 / 1.0002)


@pytest.mark.parametrize("weighting", [PAPER_WEIGHTING, CODE_WEIGHTING, Weighting(exponent=1)])
def test_zero_gradients_weigh_the_same(weighting: Weighting) -> None:
    assert previous_share(0.0, 0.0, weighting) == 0.5


def test_norms_whose_squares_leave_the_range_of_floats_still_weigh() -> None:
    assert previous_share(3e200, 1e200) == pytest.approx(0.9)
    assert previous_share(3e-200, 1e-200) == pytest.approx(0.9)


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_norms_that_cannot_weigh_are_refused(norm: float) -> None:
    for pair in ((norm, 1.0), (1.0, norm)):
        with pytest.raises(Fault, match="use UNIFORM or another source"):
            previous_share(*pair)


def test_a_weighting_that_nobody_published_is_refused() -> None:
    with pytest.raises(ConfigurationError) as raised:
        Weighting(exponent=3, offset=-1.0)
    assert len(raised.value.problems) == 2


@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_checkfree_is_the_papers_formula_and_reads_nothing_of_the_dead(exponent: int, dtype: torch.dtype) -> None:
    previous, following, norms = _stage(1, dtype), _stage(2, dtype), (0.7, 1.9)
    share = previous_share(*norms, Weighting(exponent))
    rebuilt = rebuild(Repair.CHECKFREE, _poisoned(dtype), [previous, following], share=share)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8}[dtype]
    for name in _SHAPES:
        wanted = _formula(previous[name], following[name], norms[0] ** exponent, norms[1] ** exponent)
        assert rebuilt[name].dtype == dtype
        torch.testing.assert_close(rebuilt[name].double(), wanted, rtol=tolerance, atol=tolerance)


def test_averages_of_bf16_are_rounded_once() -> None:
    """Products rounded to bf16 before they are added would differ in most elements."""
    previous, following = _stage(1, torch.bfloat16), _stage(2, torch.bfloat16)
    made = average(previous, following, 0.3)
    for name in _SHAPES:
        wanted = (previous[name].float() * 0.3 + following[name].float() * 0.7).bfloat16()
        assert torch.equal(made[name], wanted)


@pytest.mark.parametrize(
    ("repair", "stages"), [(Repair.COPY_PREVIOUS, [1]), (Repair.COPY_NEXT, [2]), (Repair.EXACT, [3])]
)
def test_a_copy_has_the_bits_and_not_the_memory_of_its_source(repair: Repair, stages: list[int]) -> None:
    (source,) = (_stage(seed) for seed in stages)
    rebuilt = rebuild(repair, _poisoned(), [source])
    _assert_equal(rebuilt, source)
    for name in _SHAPES:
        assert rebuilt[name].data_ptr() != source[name].data_ptr()


def test_uniform_is_the_plain_average_and_across_a_gap_two_thirds_and_one() -> None:
    rebuilt = [
        rebuild(Repair.UNIFORM, _poisoned(), [_filled(1.0), _filled(4.0)], **options)
        for options in ({}, *({"share": share_across(0.5, stage, (1, 4))} for stage in (2, 3)))
    ]
    _assert_equal(rebuilt[0], _filled(2.5))
    for made, value in zip(rebuilt[1:], (2.0, 3.0), strict=True):
        assert all(torch.allclose(made[name], tensor) for name, tensor in _filled(value).items())


@given(st.floats(0, 1), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_weights_across_a_gap_fall_with_the_distance(share: float, before: int, d: int, e: int) -> None:
    """Against weights share / d and (1 - share) / e, made to add up to 1 in fractions."""
    own, other = Fraction(share) / d, (1 - Fraction(share)) / e
    found = share_across(share, before + d, (before, before + d + e))
    assert found == pytest.approx(float(own / (own + other)), rel=1e-12, abs=1e-300)
    if d == e:
        assert found == pytest.approx(share, rel=1e-12, abs=1e-300)


def test_random_weights_are_what_the_initialiser_makes_of_name_and_shape() -> None:
    rebuilt = rebuild(Repair.RANDOM, _poisoned(torch.bfloat16), [], initial=_initial)
    _assert_equal(rebuilt, {name: _initial(name, shape).bfloat16() for name, shape in _SHAPES.items()})


@pytest.mark.parametrize("has_source", [True, False])
def test_an_identity_zeroes_its_outputs_and_nothing_else(has_source: bool) -> None:
    source = _stage(1)
    source["0.attention.wo.weight"].fill_(math.nan)  # zero is zero, whatever it replaces
    sources = [source] if has_source else []
    rebuilt = rebuild(Repair.IDENTITY, _poisoned(), sources, initial=_initial, output_suffixes=_OUTPUTS)
    for name, shape in _SHAPES.items():
        inside = source[name] if has_source else _initial(name, shape)
        assert torch.equal(rebuilt[name], torch.zeros(shape) if name.endswith(_OUTPUTS) else inside)


@pytest.mark.parametrize("repair", [each for each in Repair if each is not Repair.CHECKFREE_PLUS])
def test_the_dead_stage_may_be_on_meta(repair: Repair) -> None:
    """Not even by accident can values be read there; no repair computes with the poisoned ones either."""
    n_sources = {Repair.CHECKFREE: 2, Repair.UNIFORM: 2, Repair.RANDOM: 0}.get(repair, 1)
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in _SHAPES.items()}
    made = [
        rebuild(repair, like, [_stage(1), _stage(2)][:n_sources], initial=_initial, output_suffixes=_OUTPUTS)
        for like in (on_meta, _poisoned())
    ]
    _assert_equal(made[0], made[1])
    assert all(torch.isfinite(tensor).all() for tensor in made[0].values())


def test_a_plan_for_a_whole_pipeline_is_carried_out() -> None:
    """CheckFree+ with stages 0 and 2 of 4 dead and poisoned, as a caller would."""
    stages = [_poisoned(), _filled(2.0), _poisoned(), _filled(6.0)]
    plan = plan_repair((2,) * 4, {0, 2}, wish=Repair.CHECKFREE_PLUS)
    for step in plan.repairs:
        share = previous_share(1.0, math.sqrt(3.0)) if len(step.sources) == 2 else 0.5
        stages[step.stage] = rebuild(step.repair, stages[step.stage], [stages[s] for s in step.sources], share=share)
    _assert_equal(stages[0], _filled(2.0))
    for tensor in stages[2].values():  # (1 * 2 + 3 * 6) / 4
        torch.testing.assert_close(tensor, torch.full_like(tensor, 5.0))


def test_a_wish_for_a_pipeline_is_no_algebra() -> None:
    with pytest.raises(ConfigurationError, match="plan_repair"):
        rebuild(Repair.CHECKFREE_PLUS, _poisoned(), [_stage(1), _stage(2)])


def test_a_damaged_neighbour_is_refused_but_a_replica_is_copied_as_it_is() -> None:
    damaged = _stage(2)
    damaged["1.bias"].fill_(math.inf)
    with pytest.raises(Fault, match=r"UNIFORM .* 1\.bias"):
        rebuild(Repair.UNIFORM, _poisoned(), [_stage(1), damaged])
    _assert_equal(rebuild(Repair.EXACT, _poisoned(), [damaged]), damaged)


def test_stages_that_do_not_match_are_refused_by_name() -> None:
    other = _stage(1)
    other["2.extra"] = other.pop("1.bias")
    other["0.norm.weight"] = torch.ones(1)  # would broadcast
    with pytest.raises(ConfigurationError) as raised:
        rebuild(Repair.COPY_NEXT, _poisoned(), [other])
    assert raised.value.problems == (
        "0.norm.weight of source 0 has the shape [1]; the lost stage has [4]",
        "source 0 has 2.extra, which the lost stage has not",
        "source 0 has no 1.bias",
    )


def test_an_initialiser_is_held_to_the_shape_it_was_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="the initialiser has the shape"):
        rebuild(Repair.RANDOM, _poisoned(), [], initial=lambda name, shape: torch.ones(1))


@pytest.mark.parametrize(
    ("repair", "n_sources", "options", "words"),
    [
        (Repair.CHECKFREE, 1, {}, "reads 2 other stages; 1 were given"),
        (Repair.RANDOM, 1, {"initial": _initial}, "reads 0 other stages"),
        (Repair.CHECKFREE, 2, {"share": math.nan}, "share=nan"),
        (Repair.CHECKFREE, 2, {"share": 1.5}, "share=1.5"),
        (Repair.RANDOM, 0, {}, "initial="),
        (Repair.IDENTITY, 0, {"output_suffixes": _OUTPUTS}, "initial="),
        (Repair.IDENTITY, 1, {}, "zeroes nothing"),
        (Repair.IDENTITY, 1, {"output_suffixes": ("wo.wieght",)}, "ends in 'wo.wieght'"),
    ],
)
def test_what_does_not_make_sense_is_refused(
    repair: Repair, n_sources: int, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        rebuild(repair, _poisoned(), [_stage(1), _stage(2)][:n_sources], **options)  # type: ignore[arg-type]


def test_integers_are_kept_where_equal_and_refused_where_not() -> None:
    made = average({"n": torch.tensor([3])}, {"n": torch.tensor([3])}, 0.5)
    assert made["n"].tolist() == [3]
    with pytest.raises(ConfigurationError, match="no average"):
        average({"n": torch.tensor([3])}, {"n": torch.tensor([4])}, 0.5)


def _moments(seed: int, step: int) -> dict[str, dict[str, object]]:
    weights = _stage(seed)
    return {
        name: {"step": step, "exp_avg": tensor, "exp_avg_sq": tensor.square() * 1e-9}
        for name, tensor in weights.items()
    }


def test_reset_moments_are_no_state_at_all() -> None:
    assert rebuild_moments(MomentRepair.RESET, []) == {}
    assert rebuild_moments(MomentRepair.RESET, [_moments(1, 5), _moments(2, 5)]) == {}


@given(st.floats(0.0, 1.0))
def test_averaged_moments_have_the_weights_of_the_stages(share: float) -> None:
    previous, following = _moments(1, 70), _moments(2, 50)
    made = rebuild_moments(MomentRepair.AVERAGED, [previous, following], share=share)
    for name in _SHAPES:
        assert made[name]["step"] == 50
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = _formula(previous[name][key], following[name][key], share, 1.0 - share)  # type: ignore[arg-type]
            torch.testing.assert_close(made[name][key].double(), wanted, rtol=1e-6, atol=1e-7 * wanted.abs().max())
        assert (made[name]["exp_avg_sq"] >= 0).all()


def test_averaged_moments_fit_torchs_adam() -> None:
    """Whose step is a tensor; an update from the average moves the weights and stays finite."""
    states = []
    for seed in (1, 2):
        param = torch.nn.Parameter(torch.ones(5))
        adam = torch.optim.Adam([param])
        param.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        for _ in range(seed):
            adam.step()
        states.append({"w": adam.state[param]})
    made = rebuild_moments(MomentRepair.AVERAGED, states, share=0.25)
    assert float(made["w"]["step"]) == 1.0 and made["w"]["step"] is not states[0]["w"]["step"]
    fresh = torch.nn.Parameter(torch.ones(5))
    adam = torch.optim.Adam([fresh])
    adam.state[fresh] = made["w"]
    fresh.grad = torch.ones(5)
    adam.step()
    assert torch.isfinite(fresh).all() and not torch.equal(fresh, torch.ones(5))


def test_exact_moments_keep_bits_of_any_kind_in_memory_of_their_own() -> None:
    source = {"w": {"step": 9, "exp_avg_codes": torch.arange(4, dtype=torch.uint8), "exp_avg_absmax": torch.ones(1)}}
    made = rebuild_moments(MomentRepair.EXACT, [source])["w"]
    assert made["step"] == 9 and torch.equal(made["exp_avg_codes"], source["w"]["exp_avg_codes"])  # type: ignore[arg-type]
    assert made["exp_avg_codes"].data_ptr() != source["w"]["exp_avg_codes"].data_ptr()  # type: ignore[attr-defined]


def test_8_bit_moments_are_refused_with_the_way_out() -> None:
    state = {"w": {"step": 9, "exp_avg_codes": torch.zeros(4, dtype=torch.uint8), "exp_avg_absmax": torch.ones(1)}}
    with pytest.raises(ConfigurationError, match=r"w/exp_avg_codes .* dequantise 8-bit state first, or use RESET"):
        rebuild_moments(MomentRepair.AVERAGED, [state, state])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_numbers_that_an_average_would_spoil_are_refused(dtype: torch.dtype) -> None:
    state = {"w": {"exp_avg": torch.ones(4).to(dtype)}}
    with pytest.raises(ConfigurationError, match="has no average"):
        rebuild_moments(MomentRepair.AVERAGED, [state, state])


def test_moments_that_do_not_fit_are_refused() -> None:
    good, negative, short, other = (_moments(1, 5) for _ in range(4))
    negative["1.bias"]["exp_avg_sq"] = torch.tensor(-1.0)
    short["1.bias"].pop("exp_avg")
    other.pop("1.bias")
    for bad, words in ((negative, "negative"), (short, "have the keys"), (other, "different parameters")):
        with pytest.raises(ConfigurationError, match=words):
            rebuild_moments(MomentRepair.AVERAGED, [good, bad])
    with pytest.raises(ConfigurationError, match="need 1 source"):
        rebuild_moments(MomentRepair.EXACT, [])
    with pytest.raises(ConfigurationError, match="share=-1"):
        rebuild_moments(MomentRepair.AVERAGED, [good, good], share=-1.0)


def test_norms_before_and_after_clipping_are_those_of_torch() -> None:
    norms = GradientNorms(max_norm=1.0)
    for stage, scale in enumerate((0.01, 10.0)):
        param = torch.nn.Parameter(torch.zeros(8))
        param.grad = torch.full((8,), scale)
        before = torch.nn.utils.clip_grad_norm_([param], 1.0)
        norms.record(stage, float(before))
        assert norms.get(stage, PAPER_WEIGHTING) == pytest.approx(float(before))
        assert norms.get(stage, CODE_WEIGHTING) == pytest.approx(float(param.grad.norm()), rel=1e-5)


def test_clipping_by_the_norm_of_the_whole_model_scales_every_stage_alike() -> None:
    norms = GradientNorms(max_norm=1.0)
    for stage, norm in enumerate((3.0, 0.5)):  # one of them below the bound itself
        norms.record(stage, norm, clipped_by=5.0)
    assert [norms.get(stage, CODE_WEIGHTING) for stage in (0, 1)] == pytest.approx([0.6, 0.1])


def test_without_a_bound_nothing_is_clipped() -> None:
    norms = GradientNorms()
    norms.record(0, 50.0)
    assert norms.get(0, CODE_WEIGHTING) == 50.0


def test_a_step_that_was_not_applied_leaves_the_norm_of_the_one_before() -> None:
    norms = GradientNorms(1.0)
    norms.record(0, 0.5)
    norms.record(0, math.nan)
    norms.record(0, 2.0, clipped_by=math.inf)
    assert norms.get(0) == 0.5
    assert norms.get(7) == 1.0  # never fed


def test_norms_survive_a_snapshot() -> None:
    norms, restored = GradientNorms(1.0), GradientNorms(1.0)
    for stage, norm in enumerate((0.1, 7.3)):
        norms.record(stage, norm)
    restored.record(5, 2.0)
    restored.load(json.loads(json.dumps(norms.state())))
    assert restored.state() == norms.state() == {"0": [0.1, 0.1], "1": [7.3, 1.0]}
    with pytest.raises(ManifestMismatch):
        restored.load({"0": [1.0]})
    with pytest.raises(ConfigurationError):
        GradientNorms(-1.0)
