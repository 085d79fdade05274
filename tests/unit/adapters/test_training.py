"""The loop that trains every method: against a loop written out, and what validation keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adapters import (
    TaskPlan,
    adapters_of,
    create_method,
    finish_task,
    inject,
    penalty,
    start_task,
    train_task,
    trainable_parameters,
)
from holdfast.adapters.training import half_cosine
from holdfast.errors import ConfigurationError

_SGD = partial(torch.optim.SGD, lr=0.1)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def _batches(steps: int = 8) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 5, generator=draw, dtype=torch.float64),
            torch.randn(4, 3, generator=draw, dtype=torch.float64),
        )
        for _ in range(steps)
    ]


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", ["lora", "olora", "mora", "brainstacks"])
def test_the_loop_is_the_one_written_out(name: str) -> None:
    """With a second task, so that O-LoRA and Brainstacks have something to add to the loss."""
    models = []
    for is_ours in (True, False):
        model = _model()
        inject(model, create_method(name, {"rank": 2, **({"is_noisy": False} if name == "brainstacks" else {})}))
        for task in ("first", "second"):
            start_task(model, task)
            schedule = half_cosine(8, 2)
            if is_ours:
                train_task(model, _batches(), _loss, TaskPlan(steps=8, optimizer=_SGD, schedule=schedule, clip=0.01))
            else:
                _written_out(model)
            finish_task(model)
        models.append(model)
    ours, other = (
        {name: tensor for name, tensor in model.state_dict().items() if "sealed" in name} for model in models
    )
    assert ours and all(torch.equal(rows, other[key]) for key, rows in ours.items())


def _written_out(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    factors = [0.5, 1.0, *(0.5 + 0.5 * math.cos(math.pi * step / 6) for step in range(6))]
    for batch, factor in zip(_batches(), factors, strict=True):
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        optimizer.zero_grad()
        loss = _loss(model, batch)
        (loss + penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(trainable_parameters(model), 0.01)
        optimizer.step()


def test_a_whole_model_is_trained_by_the_same_loop() -> None:
    ours, other = _model(), _model()
    report = train_task(ours, _batches(), _loss, TaskPlan(steps=5, optimizer=_SGD, clip=math.inf), [*ours.parameters()])
    optimizer, losses = torch.optim.SGD(other.parameters(), lr=0.1), []
    for batch in _batches(5):
        optimizer.zero_grad()
        losses.append(_loss(other, batch))
        losses[-1].backward()
        optimizer.step()
    assert report.losses == [loss.item() for loss in losses] and report.ended == "all steps were taken"
    assert report.validations == [] and report.best_step is None and not ours.training
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))


def test_the_state_with_the_best_validation_stays() -> None:
    model, seen = _model(), list[list[Tensor]]()
    answers = iter([3.0, 1.0, 2.0, 1.5])

    def validate(model: nn.Module) -> float:
        assert not model.training
        seen.append([p.detach().clone() for p in model.parameters()])
        return next(answers)

    plan = TaskPlan(steps=7, optimizer=_SGD, validate=validate, validate_every=3)
    report = train_task(model, _batches(), _loss, plan, [*model.parameters()])
    assert report.validations == [(0, 3.0), (3, 1.0), (6, 2.0), (7, 1.5)]
    assert (report.best_step, report.steps) == (3, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))


def test_a_task_that_only_gets_worse_ends_as_it_began() -> None:
    model, before = _model(), _model()
    rising = count()
    plan = TaskPlan(steps=4, optimizer=_SGD, validate=lambda _: float(next(rising)), validate_every=2)
    report = train_task(model, _batches(), _loss, plan, [*model.parameters()])
    assert report.best_step == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("guard", "answers", "made", "best", "reason"),
    [
        ({"spike": 0.5}, [3.0, 1.0, 1.5, 1.6, 0.0], 3, 1, "validation loss 1.6 was more than 0.5 above the best, 1"),
        ({"patience": 2}, [3.0, 1.0, 1.5, 1.0, 0.0], 3, 1, "2 evaluations brought no improvement"),
        ({"patience": 2}, [3.0, 3.0, 1.0, 1.0, 0.5], 4, 4, "all steps were taken"),
        ({}, [3.0, 1.0, math.nan, 0.0], 2, 1, "validation loss nan was more than inf above the best, 1"),
        ({}, [math.nan, 1.0], 1, 0, "validation loss 1 was more than inf above the best, nan"),
        ({}, [math.inf, math.inf, 9.0, 8.0, math.inf], 4, 3, "all steps were taken"),
    ],
)
def test_a_guard_ends_it_in_the_best_state(
    guard: dict[str, float], answers: list[float], made: int, best: int, reason: str
) -> None:
    model, states = _model(), list[list[Tensor]]()
    said = iter(answers)

    def validate(model: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        states.append([p.detach().clone() for p in model.parameters()])
        return next(said)

    plan = TaskPlan(steps=4, optimizer=_SGD, validate=validate, validate_every=1, **guard)
    report = train_task(model, _batches(), _loss, plan, [*model.parameters()])
    assert (report.steps, report.best_step, report.ended) == (made, best, reason)
    assert [step for step, _ in report.validations] == list(range(made + 1))
    assert [report.before, report.best] == pytest.approx([answers[0], answers[best]], nan_ok=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), states[best], strict=True))


def test_a_state_that_a_watched_loss_forbids_is_not_kept() -> None:
    model, watched = _model(), iter([0.0, 0.2, 0.4])
    falling = count()
    plan = TaskPlan(
        steps=4,
        optimizer=_SGD,
        validate=lambda _: -float(next(falling)),
        validate_every=1,
        spike=0.3,
        watch=lambda model: next(watched) + model.training,
    )
    report = train_task(model, _batches(), _loss, plan, [*model.parameters()])
    assert report.ended == "the watched loss 0.4 was more than 0.3 above what it had been, 0"
    assert (report.steps, report.best_step, report.best) == (2, 1, -1.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_a_task_that_breaks_leaves_the_best_state_and_is_not_validated_again(error: type[BaseException] | None) -> None:
    """By what the batches raise, or by a loss that is not finite."""
    model, falling = _model(), count()

    def breaking() -> Iterator[tuple[Tensor, Tensor]]:
        yield from _batches(3)
        if error is not None:
            raise error
        yield _batches(1)[0][0], torch.full((4, 3), math.inf, dtype=torch.float64)

    plan = TaskPlan(steps=9, optimizer=_SGD, validate=lambda _: -float(next(falling)), validate_every=2)
    with pytest.raises(error) if error else nullcontext():
        train_task(model, breaking(), _loss, plan, [*model.parameters()])
    assert next(falling) == 2  # at the start and after two steps
    other = _model()
    train_task(other, _batches(2), _loss, TaskPlan(steps=2, optimizer=_SGD), [*other.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_in_evaluation_mode_there_is_neither_dropout_nor_a_penalty() -> None:
    models = []
    for dropout, weight, is_training in ((0.5, 9.0, False), (0.0, 0.0, True)):
        model = _model()
        inject(model, create_method("olora", {"rank": 2, "dropout": dropout, "orthogonality": weight}))
        for task in ("first", "second"):
            start_task(model, task)
            with torch.no_grad():
                for rows in trainable_parameters(model):
                    rows.fill_(0.1)
            for layer in adapters_of(model).layers.values():
                layer.count_untrained()
            if task == "first":
                finish_task(model)
        train_task(model, _batches(), _loss, TaskPlan(steps=8, optimizer=_SGD, is_training=is_training))
        models.append(model)
    ours, other = (trainable_parameters(model) for model in models)
    assert all(
        torch.equal(a, b) and not torch.equal(a, a.new_full(a.shape, 0.1)) for a, b in zip(ours, other, strict=True)
    )


def test_a_step_that_is_not_finite_is_not_taken_and_the_last() -> None:
    model = _model()
    batches = _batches(6)
    batches[3] = (batches[3][0], batches[3][1] * math.nan)
    report = train_task(model, batches, _loss, TaskPlan(steps=6, optimizer=_SGD), [*model.parameters()])
    assert report.steps == 3 and "not finite" in report.ended
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_batches_may_end_early_and_are_not_drawn_for_nothing() -> None:
    drawn = list[int]()

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(_batches(20)):
            drawn.append(number)
            yield batch

    model = _model()
    plan = TaskPlan(steps=6, optimizer=_SGD)
    assert train_task(model, endless(), _loss, plan, [*model.parameters()]).steps == 6 and drawn == list(range(6))
    report = train_task(model, _batches(2), _loss, plan, [*model.parameters()])
    assert report.steps == 2 and report.ended == "there were no more batches"


def test_what_cannot_be_trained_is_refused() -> None:
    model = _model()
    with pytest.raises(ConfigurationError, match="steps=0 must be at least 1") as refused:
        TaskPlan(steps=0, optimizer=_SGD, clip=0.0)
    assert len(refused.value.problems) == 2
    with pytest.raises(ConfigurationError, match="spike=nan must be above 0") as refused:
        TaskPlan(steps=1, optimizer=_SGD, spike=math.nan, patience=0, validate=lambda _: 0.0)
    assert len(refused.value.problems) == 2
    for guard in ({"spike": 0.1}, {"patience": 3}, {"watch": lambda _: 0.0}):
        with pytest.raises(ConfigurationError, match="need validate"):
            TaskPlan(steps=1, optimizer=_SGD, **guard)
    inject(model, create_method("lora"))
    with pytest.raises(ConfigurationError, match="nothing to train: start a task"):
        train_task(model, _batches(), _loss, TaskPlan(steps=1, optimizer=_SGD))


def test_half_a_cosine() -> None:
    factor = half_cosine(10, 4)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(7) == pytest.approx(0.5) and factor(10) == pytest.approx(0.0) and factor(12) == pytest.approx(0.0)
