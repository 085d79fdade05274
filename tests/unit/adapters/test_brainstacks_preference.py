"""Preferences of a domain: the loss against its formula and against two real models, and what they leave alone."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from holdfast.adapters import (
    abandon_task,
    adapters_of,
    base_fingerprint,
    finish_task,
    inject,
    start_task,
    trainable_parameters,
    use_tasks,
)
from holdfast.adapters.methods.brainstacks import (
    BoostPlan,
    Brainstacks,
    Domain,
    Pairs,
    PreferencePlan,
    Preferences,
    boost,
    check_frozen,
    preference_loss,
    replay,
    stack_digest,
    tune_preferences,
    validate,
)
from holdfast.adapters.methods.brainstacks.preference import _Tuning, answer_log_probs
from holdfast.errors import ConfigurationError

_V = 11
_PLAN = PreferencePlan(steps=40, evaluate_every=5, lr=1e-2, warmup=0, beta=0.5, spike=0.3)
_LM = BoostPlan(rounds=1, steps=30, evaluate_every=10, lr=2e-2, warmup=2, spike=0.5)


def _model() -> nn.Sequential:
    """Tokens of a clock of eleven hours -> logits of the next one, with the method and no task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(_V, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, _V))
    inject(model, Brainstacks(rank=2, experts=2))
    return model


def _walk(count: int, step: int, seed: int, length: int = 7) -> Tensor:
    start = torch.randint(_V, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (start + step * torch.arange(length)) % _V


def _lm_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _domain(name: str = "walks", **options: Any) -> Domain:
    """Steps of one up or down, as often; of three for another name."""
    by = 1 if name == "walks" else 3
    ids = torch.cat([_walk(16, by, 0), _walk(16, -by, 0)])
    return Domain(name=name, batches=lambda _: (ids for _ in range(99)), loss=_lm_loss, validation=[ids], **options)


def _pairs(seed: int, count: int = 8) -> Pairs:
    """Up is preferred to down. The first two tokens are the prompt; the rejected side is longer and padded."""
    up, down = _walk(count, 1, seed), _walk(count, -1, seed, length=9)
    chosen_answer, rejected_answer = torch.ones_like(up, dtype=torch.bool), torch.ones_like(down, dtype=torch.bool)
    chosen_answer[:, :2] = rejected_answer[:, :2] = False
    rejected_answer[:, 7:] = False
    return Pairs(chosen=up, rejected=down, chosen_answer=chosen_answer, rejected_answer=rejected_answer)


_UP = Preferences(train=[_pairs(1), _pairs(2, 5)], validation=[_pairs(3), _pairs(4, 3)])


def _active(model: nn.Module, *finished: str) -> None:
    """A finished task for each name, and a trained current one."""
    for name in (*finished, "now"):
        start_task(model, name)
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter) / 5)
        if name != "now":
            finish_task(model)


# -- the loss ---------------------------------------------------------------------------------------------------------


def dpo_reference(gap: float, reference: float, beta: float, smoothing: float) -> float:
    """Equation 7, with a share of the pairs turned around."""

    def of(h: float) -> float:
        return math.log1p(math.exp(-beta * h))

    h = gap - reference
    return (1 - smoothing) * of(h) + smoothing * of(-h)


@given(
    gaps=st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=5),
    beta=st.floats(0.01, 2),
    smoothing=st.floats(0, 0.49),
)
def test_the_loss_is_equation_7_of_the_paper(gaps: list[tuple[float, float]], beta: float, smoothing: float) -> None:
    margins = torch.tensor([a - b for a, b in gaps], dtype=torch.float64, requires_grad=True)
    got = preference_loss(margins, beta=beta, label_smoothing=smoothing)
    want = [dpo_reference(a, b, beta, smoothing) for a, b in gaps]
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert torch.autograd.gradcheck(lambda m: preference_loss(m, beta=beta, label_smoothing=smoothing), (margins,))


def test_a_large_margin_overflows_nowhere_and_smoothing_has_its_minimum_inside() -> None:
    margins = torch.tensor([-1e4, 1e4])
    assert preference_loss(margins, beta=1.0).tolist() == [1e4, 0.0]
    h = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    best = h[preference_loss(h, beta=1.0, label_smoothing=0.1).argmin()]
    assert float(best) == pytest.approx(math.log(9), abs=0.01)  # σ(h) = 0.9


@pytest.mark.parametrize("is_mean", [False, True])
def test_an_answers_log_probability_is_summed_over_its_own_tokens(is_mean: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, dtype=torch.float64, generator=draw)
    ids = torch.randint(5, (3, 6), generator=draw)
    answer = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0]], dtype=torch.bool)
    want = []
    for row in range(3):
        places = [t for t in range(1, 6) if answer[row, t]]  # the first token has nothing before it
        logs = [
            math.log(math.exp(logits[row, t - 1, ids[row, t]]) / float(logits[row, t - 1].exp().sum())) for t in places
        ]
        want.append(sum(logs) / (len(places) if is_mean else 1))
    got = answer_log_probs(logits, ids, answer, is_mean=is_mean)
    assert got.tolist() == pytest.approx(want, rel=1e-12)
    logits[0, 4], logits[0, 0, :] = math.inf, -3.0  # of padding and of a token of the prompt
    logits[0, 5] = math.nan
    assert answer_log_probs(logits, ids, answer, is_mean=is_mean)[0].item() == pytest.approx(want[0], rel=1e-12)
    half = answer_log_probs(logits[1:].bfloat16(), ids[1:], answer[1:])
    assert half.dtype == torch.float32


def _two_models(policy: nn.Module, reference: nn.Module, pairs: Pairs, plan: PreferencePlan) -> list[float]:
    """The loss of each pair, from two models in memory and one token after the other."""

    def log_prob(model: nn.Module, ids: Tensor, answer: Tensor) -> float:
        logs = model(ids[None])[0].log_softmax(-1)
        terms = [float(logs[t - 1, ids[t]]) for t in range(1, len(ids)) if answer[t]]
        return sum(terms) / (len(terms) if plan.is_length_normalised else 1)

    found = []
    for row in range(len(pairs.chosen)):
        chosen, rejected = (
            (pairs.chosen[row], pairs.chosen_answer[row]),
            (pairs.rejected[row], pairs.rejected_answer[row]),
        )
        gap, reference_gap = (log_prob(m, *chosen) - log_prob(m, *rejected) for m in (policy, reference))
        found.append(dpo_reference(gap, reference_gap, plan.beta, plan.label_smoothing))
    return found


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"is_length_normalised": True, "beta": 1.5}])
def test_the_cached_reference_is_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = _model().double()
    _active(model, "old")
    model.eval()(torch.zeros(1, 1, dtype=torch.long))
    for layer in adapters_of(model).layers.values():
        layer.count_untrained()
    before = copy.deepcopy(model)
    plan = dataclasses.replace(_PLAN, **options)
    found = tune_preferences(model, _UP, plan)
    assert found.before == pytest.approx(math.log(2), abs=1e-12) and found.loss < found.before
    with torch.no_grad():
        losses = [loss for pairs in _UP.validation for loss in _two_models(model, before, pairs, plan)]
        assert not torch.equal(model(_pairs(3).chosen), before(_pairs(3).chosen))
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)  # every pair counts as much


def test_gradients_are_those_of_finite_differences() -> None:
    model = _model().double()
    _active(model)
    model.eval()
    for layer in adapters_of(model).layers.values():
        layer.count_untrained()
    tuning = _Tuning(model, _UP, _PLAN)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) / 10)  # away from h = 0
    parameters = trainable_parameters(model)
    grads = torch.autograd.grad(tuning.loss(tuning.train[0]), parameters, allow_unused=True)
    checked = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:  # of the noise, which does not act
            continue
        for at in range(0, parameter.numel(), 7):
            flat, sides = parameter.data.view(-1), []
            for step in (1e-5, -2e-5):
                flat[at] += step
                sides.append(tuning.loss(tuning.train[0]).item())
            flat[at] += 1e-5
            assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(float(grad.view(-1)[at]), rel=1e-4, abs=1e-8)
            checked += 1
    assert checked > 20


# -- the model --------------------------------------------------------------------------------------------------------


def test_margins_grow_and_all_that_is_frozen_keeps_its_bits() -> None:
    model = _model()
    _active(model, "old", "older")
    use_tasks(model)
    base, frozen = base_fingerprint(model), {name: stack_digest(model, name) for name in ("old", "older")}
    current = [p.detach().clone() for p in trainable_parameters(model)]
    noise = [layer.current["noise"].detach().clone() for layer in adapters_of(model).layers.values()]
    found = tune_preferences(model, _UP, _PLAN)
    assert found.margin > 1 and found.accuracy == 1.0 and found.loss < 0.5 and found.steps == _PLAN.steps
    assert base_fingerprint(model) == base
    assert {name: stack_digest(model, name) for name in frozen} == frozen
    assert any(not torch.equal(p, old) for p, old in zip(trainable_parameters(model), current, strict=True))
    assert all(
        torch.equal(layer.current["noise"], old)
        for layer, old in zip(adapters_of(model).layers.values(), noise, strict=True)
    )
    assert adapters_of(model).current == "now" and not model.training
    # Held-out pairs, from the model itself.
    held_out = _pairs(9)
    with torch.no_grad():
        up, down = (
            answer_log_probs(model(i), i, a)
            for i, a in ((held_out.chosen, held_out.chosen_answer), (held_out.rejected, held_out.rejected_answer))
        )
    assert bool((up > down).all())
    finish_task(model)
    assert {name: stack_digest(model, name) for name in frozen} == frozen


def test_an_untrained_stack_can_be_tuned_and_the_reference_is_asked_once() -> None:
    model = _model()
    start_task(model, "now")
    calls = list[int]()

    def logits(model: nn.Module, ids: Tensor) -> Tensor:
        calls.append(len(ids))
        return SimpleNamespace(logits=model(ids)).logits

    plan = dataclasses.replace(_PLAN, steps=4, evaluate_every=2)
    found = tune_preferences(model, dataclasses.replace(_UP, logits=logits), plan)
    assert found.before == pytest.approx(math.log(2), rel=1e-6) and found.loss < found.before
    reference, validation, steps = [8, 8, 5, 5, 8, 8, 3, 3], [8, 8, 3, 3], [8, 8, 5, 5]
    assert calls == reference + validation + 2 * (steps + validation) + validation

    class Named(nn.Module):
        def forward(self, ids: Tensor) -> Any:
            return SimpleNamespace(logits=model(ids))

    assert torch.equal(_UP.logits(Named(), _pairs(1).chosen), model(_pairs(1).chosen))


class _Spiking(torch.optim.AdamW):
    """A thousand times the rate for ten steps."""

    def __init__(self, parameters: Any, first: int) -> None:
        super().__init__(parameters, lr=_PLAN.lr)
        self._first, self._taken = first, 0

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        lr = group["lr"]
        group["lr"] = lr * (1000 if self._first <= self._taken < self._first + 10 else 1)
        super().step(closure)
        group["lr"] = lr
        self._taken += 1


class _Steady(PreferencePlan):
    """With a rate that does not know how many steps there will be."""

    def rate(self, step: int) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("smoothing", "is_watched", "reason"), [(0.2, False, "above the best"), (0.0, True, "the watched loss")]
)
def test_a_spike_freezes_the_best_stack_before_it_and_later_domains_are_as_without_it(
    smoothing: float, is_watched: bool, reason: str
) -> None:
    """Experiment 9 on a tuned stack. Without smoothing a stack that has gone off still prefers what it should, ever
    more, and only the domain's own loss tells."""
    found = []
    for spikes in (True, False):
        steps = 100 if spikes else 20  # without a spike it ends where the spike would have begun
        plan = _Steady(
            **dataclasses.asdict(dataclasses.replace(_PLAN, steps=steps, spike=2.0, label_smoothing=smoothing))
        )
        model, told = _model(), []

        def tune(model: nn.Module, _: int, *, plan: PreferencePlan = plan, told: list[Any] = told) -> None:
            watch = (lambda: validate(model, _domain())) if is_watched else None
            told.append(tune_preferences(model, _UP, plan, watch=watch, optimizers=lambda p: _Spiking(p, 20)))

        first = boost(model, _domain(tune=tune), _LM)
        use_tasks(model)
        after = boost(model, _domain("strides"), _LM)
        check_frozen(model, first + after)
        found.append((told[0], first[0], after[0], model(_walk(4, 1, 5)).detach()))
    (spiked, stack, later, y), (calm, calm_stack, calm_later, calm_y) = found
    assert reason in spiked.ended and 20 < spiked.steps <= 30 and calm.steps == 20
    assert (spiked.loss, spiked.margin) == (calm.loss, calm.margin) and spiked.loss < spiked.before
    assert (stack.digest, stack.loss) == (calm_stack.digest, calm_stack.loss)
    assert (later.digest, later.loss) == (calm_later.digest, calm_later.loss)
    assert torch.equal(y, calm_y)


def test_a_watched_loss_ends_it_before_the_domain_is_lost() -> None:
    model, domain = _model(), _domain()
    start_task(model, "now")
    plan = dataclasses.replace(_PLAN, steps=200, spike=0.05)
    free = tune_preferences(model, _UP, plan)
    damage = validate(model, domain)
    abandon_task(model)
    start_task(model, "now")
    first = validate(model, domain)
    assert damage > first + 0.05  # preferring one way unlearns the other
    found = tune_preferences(model, _UP, plan, watch=lambda: validate(model, domain))
    assert "the watched loss" in found.ended and found.steps < free.steps
    assert validate(model, domain) <= first + 0.05 and found.loss < found.before


def test_a_domain_is_tuned_before_its_stack_is_frozen_and_its_loss_is_that_of_what_is_frozen() -> None:
    rounds = list[int]()

    def tune(model: nn.Module, number: int) -> None:
        assert adapters_of(model).current == f"walks/{number}"
        rounds.append(number)
        tune_preferences(model, _UP, _PLAN)

    plan = dataclasses.replace(_LM, rounds=2, least_improvement=-9.0)
    plain, tuned = _model(), _model()
    (without, *_), stacks = boost(plain, _domain(), plan), boost(tuned, _domain(tune=tune), plan)
    assert rounds[0] == 1 and len(rounds) == len(stacks)
    assert stacks[0].digest != without.digest and stacks[0].before == without.before
    for stack in stacks:
        assert validate(tuned, _domain(), replay(stacks, stack)) == stack.loss
    pairs = _pairs(9)
    up = answer_log_probs(tuned(pairs.chosen), pairs.chosen, pairs.chosen_answer)
    assert bool((up > answer_log_probs(plain(pairs.chosen), pairs.chosen, pairs.chosen_answer)).all())


def test_a_tuning_that_is_interrupted_takes_its_round_along() -> None:
    def broken(model: nn.Module, number: int) -> None:
        raise KeyboardInterrupt

    model = _model()
    with pytest.raises(KeyboardInterrupt):
        boost(model, _domain(tune=broken), _LM)
    assert adapters_of(model).tasks == [] and trainable_parameters(model) == []


def test_interrupted_tuning_leaves_the_best_so_far() -> None:
    model = _model()
    _active(model)
    asked = [None] * 18  # enough for the reference, the first validation and some steps

    def breaking(model: nn.Module, ids: Tensor) -> Tensor:
        if len(asked) == 0:
            raise KeyboardInterrupt
        asked.pop()
        logits: Tensor = model(ids)
        return logits

    before = [p.detach().clone() for p in trainable_parameters(model)]
    with pytest.raises(KeyboardInterrupt):
        tune_preferences(
            model, dataclasses.replace(_UP, logits=breaking), dataclasses.replace(_PLAN, evaluate_every=40)
        )
    assert all(torch.equal(p, old) for p, old in zip(trainable_parameters(model), before, strict=True))


def test_what_cannot_be_tuned_is_refused() -> None:
    pairs, ids = _pairs(1), _walk(2, 1, 0)
    none = torch.zeros_like(ids, dtype=torch.bool)
    first_only = none.clone()
    first_only[:, 0] = True
    with pytest.raises(ConfigurationError) as caught:
        Pairs(chosen=ids, rejected=ids[:1], chosen_answer=first_only, rejected_answer=none)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigurationError, match=r"chosen_answer bool of the same shape; it is torch\.int64"):
        dataclasses.replace(pairs, chosen_answer=pairs.chosen)
    with pytest.raises(ConfigurationError, match="at least one batch"):
        Preferences(train=[], validation=[pairs])
    with pytest.raises(ConfigurationError) as caught:
        PreferencePlan(beta=0.0, label_smoothing=0.5, steps=0)
    assert len(caught.value.problems) == 3
    model = _model()
    with pytest.raises(ConfigurationError, match="no task is being trained"):
        tune_preferences(model, _UP, _PLAN)
    _active(model, "old")
    use_tasks(model, only="old")
    with pytest.raises(ConfigurationError, match="'now' is not among those in use"):
        tune_preferences(model, _UP, _PLAN)
