"""What crossed the boundaries of a stage, and stages fitted to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.boundary_log import BoundaryLog, Pair, angular_distance, fit_gain, heal, pairs

_D = 8


def _block() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(_D), nn.Linear(_D, 2 * _D), nn.Tanh(), nn.Dropout(0.5), nn.Linear(2 * _D, _D))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _block()

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = x_BTD + self.inner(x_BTD)
        return out_BTD


def _residual(seed: int) -> _Residual:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _Residual()


def _answers(stage: nn.Module, n: int, dtype: torch.dtype = torch.float32) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 16, _D, generator=generator).to(dtype) for _ in range(n)]
    right = copy.deepcopy(stage).eval()
    with torch.no_grad():
        return [Pair((1, i), x, right(x)) for i, x in enumerate(inputs)]


def _state(stage: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.state_dict().items()}


def _is_same(stage: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in stage.state_dict().items())


def test_what_was_recorded_comes_back_after_the_original_has_changed() -> None:
    log, x = BoundaryLog(10_000), torch.arange(6.0, requires_grad=True)
    log.record(3, 1, x)
    with torch.no_grad():
        x.zero_()
    assert log.get(3, 1).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert not log.get(3, 1).requires_grad


def test_bf16_halves_the_bytes_and_comes_back_in_the_dtype_of_the_original() -> None:
    log, x = BoundaryLog(10_000, torch.bfloat16), torch.randn(64)
    log.record(0, 0, x)
    log.record(0, 1, tokens := torch.arange(64))
    assert torch.equal(log.get(0, 0), x.bfloat16().float()) and log.get(0, 0).dtype == torch.float32
    assert torch.equal(log.get(0, 1), tokens)
    assert log.size_bytes == 64 * 2 + 64 * 8


@given(st.integers(16, 200), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), max_size=40))
def test_a_log_holds_the_newest_that_fit_in_its_bytes(limit: int, records: Sequence[tuple[int, int, int]]) -> None:
    """Against a list searched from its end; tensors of up to 16 bytes."""
    log = BoundaryLog(limit)
    for number, (step, microbatch, size) in enumerate(records):
        log.record(step, microbatch, torch.full((size,), float(number)))
        assert log.size_bytes <= limit
    wanted: list[tuple[tuple[int, int], float, int]] = []
    room, seen = limit, set()
    for number, (step, microbatch, size) in reversed(list(enumerate(records))):
        if (step, microbatch) in seen:
            continue
        if (room := room - 4 * size) < 0:
            break
        seen.add((step, microbatch))
        wanted.insert(0, ((step, microbatch), float(number), size))
    held = [(key, log.get(*key).tolist()) for key in log]
    # An entry made again took room while it was held, so that the log may have dropped more than it had to.
    assert held == [(key, [number] * size) for key, number, size in wanted][len(wanted) - len(held) :]
    if len({record[:2] for record in records}) == len(records):
        assert len(held) == len(wanted)


def test_a_full_log_of_equal_tensors_allocates_nothing() -> None:
    log = BoundaryLog(3 * 40)
    addresses = []
    for step in range(9):
        log.record(step, 0, torch.full((10,), float(step)))
        addresses.append(log.get(step, 0).data_ptr())
    assert len(set(addresses)) == 3
    assert [log.get(*key)[0].item() for key in log] == [6.0, 7.0, 8.0]


def test_memory_of_another_kind_is_not_used_again() -> None:
    log, tokens = BoundaryLog(40), torch.full((10,), 2**24 + 1, dtype=torch.int32)  # no fp32 number
    log.record(0, 0, torch.ones(10))
    log.record(1, 0, tokens)
    assert torch.equal(log.get(1, 0), tokens)


def test_a_step_made_again_replaces_what_it_left_before() -> None:
    log = BoundaryLog(1000)
    for value in (1.0, 2.0):
        log.record(5, 0, torch.tensor([value]))
    assert list(log) == [(5, 0)] and log.get(5, 0).item() == 2.0 and log.size_bytes == 4
    log.clear()
    assert (len(log), log.size_bytes) == (0, 0)


def test_a_tensor_larger_than_the_log_is_refused_and_nothing_is_lost_for_it() -> None:
    log = BoundaryLog(100)
    log.record(0, 0, torch.ones(10))
    with pytest.raises(ConfigurationError, match="needs 104 bytes, the log has 100"):
        log.record(0, 1, torch.ones(26))
    assert list(log) == [(0, 0)]


@pytest.mark.parametrize("options", [{"limit_bytes": 0}, {"limit_bytes": 10, "dtype": torch.uint8}])
def test_a_log_that_can_hold_nothing_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        BoundaryLog(**options)  # type: ignore[arg-type]


def test_pairs_are_what_both_sides_hold() -> None:
    inputs, outputs = BoundaryLog(1000), BoundaryLog(1000)
    for step, microbatch in ((2, 1), (1, 0), (2, 0)):
        inputs.record(step, microbatch, torch.tensor([step + microbatch / 10]))
    for step, microbatch in ((2, 0), (2, 1), (3, 0)):
        outputs.record(step, microbatch, torch.tensor([-step - microbatch / 10]))
    joined = pairs(inputs, outputs)
    assert [each.key for each in joined] == [(2, 0), (2, 1)]
    assert all(each.inputs.item() == -each.outputs.item() for each in joined)


def test_healing_brings_a_wrong_stage_near_to_the_lost_one() -> None:
    answers, stage = _answers(_residual(1), 16), _residual(2)
    healing = heal(stage, answers, steps=300, lr=1e-2)
    assert healing.is_kept and healing.steps == 300
    assert healing.after == healing.fitted < 0.05 * healing.before
    fresh = _answers(_residual(1), 17)[-1]  # never seen
    with torch.no_grad():
        error = (stage.eval()(fresh.inputs) - fresh.outputs).square().mean() / fresh.outputs.var(correction=0)
    assert error < 0.05 * healing.before


def test_the_loss_is_the_squared_error_over_the_variance_of_what_was_held_out() -> None:
    stage = _residual(2)
    twice = [Pair((0, i), each.inputs, each.outputs) for i, each in enumerate(_answers(_residual(1), 1) * 2)]
    with torch.no_grad():
        out = copy.deepcopy(stage).eval()(twice[0].inputs).double()
    y = twice[0].outputs.double()
    wanted = ((out - y) ** 2).mean() / ((y - y.mean()) ** 2).mean()
    assert heal(stage, twice, steps=1, lr=1e-9).before == pytest.approx(wanted.item(), rel=1e-5)


def test_a_stage_that_is_right_stays_as_it_is() -> None:
    stage = _residual(1)
    answers, state = _answers(stage, 4), _state(stage)
    healing = heal(stage, answers, steps=5, lr=1e-2)
    assert (healing.before, healing.after, healing.is_kept) == (0.0, 0.0, False)
    assert _is_same(stage, state)


def test_a_fit_that_makes_it_worse_is_thrown_away() -> None:
    stage = _residual(2)
    answers, state = _answers(_residual(1), 4), _state(stage)
    healing = heal(stage, answers, steps=3, lr=30.0)
    assert healing.fitted > healing.before == healing.after and not healing.is_kept
    assert _is_same(stage, state)


def test_pairs_held_out_decide_and_are_not_trained_on() -> None:
    """Each pair in turn is what no stage can learn; only where it is the judge can it spoil the verdict."""
    answers = _answers(_residual(1), 4)
    verdicts = []
    for bad in range(4):
        spoilt = [Pair(p.key, p.inputs, p.outputs * (math.nan if i == bad else 1)) for i, p in enumerate(answers)]
        healing = heal(_residual(2), spoilt, steps=12, lr=1e-2)
        verdicts.append((math.isnan(healing.before), healing.steps == 12, healing.is_kept))
    assert sorted(verdicts) == [(False, False, False)] * 3 + [(True, True, False)]


@pytest.mark.parametrize("where", ["input", "weight"])
def test_a_loss_that_is_not_finite_ends_the_fit_and_changes_nothing(where: str) -> None:
    stage, answers = _residual(2), _answers(_residual(1), 4)
    if where == "weight":
        with torch.no_grad():
            next(stage.parameters()).fill_(math.nan)
    else:
        answers = [Pair(p.key, p.inputs * math.inf, p.outputs) for p in answers]
    before = [p.detach().clone() for p in stage.parameters()]
    healing = heal(stage, answers, steps=5, lr=1e-2)
    assert not healing.is_kept and healing.steps == 0 and "not finite at update 1 of 5" in healing.reason
    assert all(torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(stage.parameters(), before, strict=True))


def test_healing_is_a_function_of_its_seed_and_of_no_global_state() -> None:
    answers, made = _answers(_residual(1), 6), []
    for seed, unrelated in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(unrelated)
        state = torch.get_rng_state()
        stage = _residual(2)
        healing = heal(stage, answers, steps=7, lr=1e-2, pairs_per_step=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        made.append((healing, _state(stage)))
    assert made[0][0] == made[1][0] and made[0][0] != made[2][0]
    assert all(torch.equal(tensor, made[1][1][name]) for name, tensor in made[0][1].items())


def test_healing_leaves_no_gradient_no_mode_and_nothing_outside_the_stage_changed() -> None:
    outside = nn.Linear(_D, _D)

    class _Borrower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = _residual(2)
            self.borrowed = [outside]  # a list hides it from nn.Module

        def forward(self, x_BTD: Tensor) -> Tensor:
            out_BTD: Tensor = self.own(x_BTD) + 0.1 * self.borrowed[0](x_BTD)
            return out_BTD

    stage = _Borrower()
    stage.own.inner.eval()
    frozen = next(stage.own.inner.parameters()).requires_grad_(False)
    was, kept = _state(outside), frozen.clone()
    with torch.no_grad():  # as between two steps
        healing = heal(stage, _answers(_residual(1), 8), steps=60, lr=1e-2)
    assert healing.is_kept
    assert _is_same(outside, was) and torch.equal(frozen, kept)
    assert all(p.grad is None for p in (*stage.parameters(), *outside.parameters()))
    assert stage.training and not stage.own.inner.training


def test_gradients_that_are_there_stay_there() -> None:
    stage = _residual(2)
    for p in stage.parameters():
        p.grad = torch.full_like(p, 3.0)
    heal(stage, _answers(_residual(1), 4), steps=3, lr=1e-3)
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in stage.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in stage.parameters())


def test_adjacent_lost_stages_heal_together_between_the_outer_boundaries() -> None:
    lost = nn.Sequential(_residual(1), _residual(2))
    rebuilt = nn.Sequential(_residual(3), _residual(4))
    state = _state(rebuilt)
    healing = heal(rebuilt, _answers(lost, 16), steps=300, lr=1e-2)
    assert healing.after < 0.1 * healing.before
    assert all(not torch.equal(p, state[name]) for name, p in rebuilt.named_parameters())


def test_a_joint_fit_reaches_the_best_that_two_linear_stages_can_do() -> None:
    """A narrow boundary between them: no product of 8×3 and 3×8 matrices is nearer than what is left of the singular
    values (Eckart and Young), for inputs that are the unit vectors."""
    generator = torch.Generator().manual_seed(0)
    wanted, unit = torch.randn(_D, _D, generator=generator), torch.eye(_D)
    answers = [Pair((0, i), unit[None], (unit @ wanted.T)[None]) for i in range(3)]
    chain = nn.Sequential(nn.Linear(_D, 3, bias=False), nn.Linear(3, _D, bias=False))
    with torch.no_grad():
        for layer in chain:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 3)
    healing = heal(chain, answers, steps=2000, lr=2e-2)
    y = answers[0].outputs.double()
    least = torch.linalg.svdvals(wanted.double())[3:].square().sum() / y.numel() / y.var(correction=0)
    assert healing.after == pytest.approx(float(least), rel=1e-3)


class _Scaled(nn.Module):
    """Adds ``scale`` times a linear map of its input."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.out = nn.Linear(_D, _D, bias=False)
        with torch.no_grad():
            self.out.weight.copy_(scale * torch.randn(_D, _D, generator=torch.Generator().manual_seed(3)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = x_BTD + self.out(x_BTD)
        return out_BTD


@pytest.mark.parametrize(("true", "found"), [(0.37, 0.37), (2.5, 2.5), (-1.0, 0.0)])
def test_a_gain_is_found_to_the_last_digits_and_is_never_negative(true: float, found: float) -> None:
    stage, answers = _Scaled(1.0), _answers(_Scaled(true), 6)
    healing = fit_gain(stage, answers, output_suffixes=["out.weight"])
    torch.testing.assert_close(stage.out.weight, _Scaled(found).out.weight, rtol=1e-5, atol=1e-6)
    assert healing.is_kept and healing.steps == 1
    assert healing.after < (1e-9 if true > 0 else healing.before)


def test_a_gain_is_the_least_squares_one() -> None:
    """Of answers that no gain gives, against a solver in fp64."""
    stage, (pair,) = _Scaled(1.0), _answers(_residual(1), 1)
    pair = Pair(pair.key, pair.inputs, pair.inputs + 0.6 * stage(pair.inputs).detach() + 0.1 * pair.outputs)
    added = (stage(pair.inputs) - pair.inputs).detach().double().reshape(-1, 1)
    wanted = torch.linalg.lstsq(added, (pair.outputs - pair.inputs).double().reshape(-1, 1)).solution.item()
    assert wanted > 0.1
    assert fit_gain(stage, [pair, Pair((9, 9), pair.inputs, pair.outputs)], output_suffixes=["out.weight"]).is_kept
    torch.testing.assert_close(stage.out.weight, _Scaled(wanted).out.weight, rtol=1e-5, atol=1e-6)


def test_a_gain_that_the_pairs_held_out_do_not_confirm_is_thrown_away() -> None:
    """One pair says 0 and the other 2: whichever teaches, the other is farther off than before."""
    (silent,), (loud,) = (_answers(_Scaled(scale), 1) for scale in (0.0, 2.5))
    stage = _Scaled(1.0)
    state = _state(stage)
    healing = fit_gain(stage, [silent, Pair((9, 9), loud.inputs, loud.outputs)], output_suffixes=["out.weight"])
    assert not healing.is_kept and healing.fitted > healing.before == healing.after
    assert _is_same(stage, state) and stage.training


def test_a_stage_that_adds_nothing_or_no_number_keeps_its_gain() -> None:
    stage = _Scaled(0.0)
    assert not fit_gain(stage, _answers(_Scaled(1.0), 3), output_suffixes=["out.weight"]).is_kept
    spoilt = [Pair(p.key, p.inputs * math.inf, p.outputs) for p in _answers(_Scaled(1.0), 3)]
    assert "not finite" in fit_gain(_Scaled(1.0), spoilt, output_suffixes=["out.weight"]).reason


def test_a_gain_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"ends in \['wo.weight'\]: nothing to scale"):
        fit_gain(_Scaled(1.0), _answers(_Scaled(0.5), 3), output_suffixes=["wo.weight"])
    with pytest.raises(ConfigurationError, match="1 pair"):
        fit_gain(_Scaled(1.0), _answers(_Scaled(0.5), 1), output_suffixes=["out.weight"])


def test_a_tied_matrix_stays_tied() -> None:
    def tied(seed: int) -> nn.Sequential:
        first, second = _residual(seed), _residual(seed)
        second.inner = first.inner
        return nn.Sequential(first, second)

    stage = tied(2)
    assert heal(stage, _answers(tied(1), 8), steps=100, lr=1e-2).after < 1.0
    assert stage[0].inner[1].weight is stage[1].inner[1].weight


class _Scale(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((_D,), value, dtype=dtype))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.weight


def test_a_bf16_stage_heals_in_fp32_and_is_judged_as_it_is_stored() -> None:
    """The bf16 number behind 1 is 1 + 2**-7: it would not notice updates of 1e-3 one by one."""
    stage = _Scale(1.0, torch.bfloat16)
    answers = _answers(_Scale(1.0625, torch.bfloat16), 8, torch.bfloat16)
    healing = heal(stage, answers, steps=200, lr=1e-3)
    assert stage.weight.dtype == torch.bfloat16 and healing.after < 0.1 * healing.before
    again = heal(stage, answers, steps=1, lr=1e-12)
    assert again.before == healing.after


def test_the_rate_falls_linearly_to_zero() -> None:
    """Adam moves by its rate while the gradient hardly changes: in all by lr (1 + 3/4 + 2/4 + 1/4)."""
    stage = _Scale(1.0)
    heal(stage, _answers(_Scale(1000.0), 8), steps=4, lr=0.01)
    assert (stage.weight - 1.0).tolist() == pytest.approx([0.025] * _D, rel=0.05)


def test_constant_outputs_are_no_division_by_zero() -> None:
    stage = nn.Linear(_D, _D)
    answers = [Pair((0, i), torch.randn(4, _D), torch.zeros(4, _D)) for i in range(3)]
    healing = heal(stage, answers, steps=50, lr=1e-2)
    assert math.isfinite(healing.before) and healing.after < healing.before


@pytest.mark.parametrize(
    ("n_pairs", "options", "words"),
    [
        (1, {}, "1 pair"),
        (4, {"steps": 0}, "steps=0"),
        (4, {"pairs_per_step": 0}, "pairs_per_step=0"),
        (4, {"lr": math.nan}, "lr=nan"),
        (4, {"held_out": 1.0}, "held_out=1.0"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(n_pairs: int, options: dict[str, float], words: str) -> None:
    settings = {"steps": 2, "lr": 1e-3, **options}
    with pytest.raises(ConfigurationError, match=words):
        heal(_residual(2), _answers(_residual(1), n_pairs), **settings)  # type: ignore[arg-type]


def test_logs_of_another_stage_and_stages_without_weights_are_refused() -> None:
    answers = [Pair(p.key, p.inputs, p.outputs[:1]) for p in _answers(_residual(1), 2)]  # would broadcast
    stage = _residual(2)
    with pytest.raises(ConfigurationError, match="not of this stage"):
        heal(stage, answers, steps=2, lr=1e-3)
    assert stage.training
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        heal(nn.Identity(), answers, steps=2, lr=1e-3)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_the_angular_distance_is_the_papers(seed: int, b: int, t: int, d: int, is_last: bool) -> None:
    """arXiv 2403.17887, section 3.2, equation 7, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(b, t, d, generator=generator) for _ in range(2))
    cosines = torch.cosine_similarity(x.double(), y.double(), dim=-1)
    angles = torch.arccos(cosines.clamp(-1.0, 1.0)) / math.pi
    wanted = (angles[:, -1] if is_last else angles).mean().item()
    distance = angular_distance(x, y, is_last_token_only=is_last)
    assert 0.0 <= distance <= 1.0
    assert distance == pytest.approx(wanted, abs=1e-6)


def test_the_angular_distance_of_nearly_parallel_states_keeps_its_digits() -> None:
    """arccos of an fp32 cosine gives 0 here, or 1e-4."""
    x = torch.zeros(1, 1, 2)
    x[..., 0] = 1.0
    y = x.clone()
    y[..., 1] = 1e-5
    assert angular_distance(x, y) == pytest.approx(1e-5 / math.pi, rel=1e-3)


def test_the_ends_of_the_angular_distance() -> None:
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert angular_distance(x, 3.0 * x) == pytest.approx(0.0, abs=1e-7)
    assert angular_distance(x, x) == 0.0
    assert angular_distance(x.bfloat16(), -x.bfloat16()) == 1.0
    assert angular_distance(x, torch.zeros_like(x)) == pytest.approx(0.5)
    with pytest.raises(ConfigurationError, match="one shape"):
        angular_distance(x, x[:1])
