"""The loop that trains every method: against a loop written out, and what validation keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adapters import (
    TaskPlan,
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
    inject(model, create_method("lora"))
    with pytest.raises(ConfigurationError, match="nothing to train: start a task"):
        train_task(model, _batches(), _loss, TaskPlan(steps=1, optimizer=_SGD))


def test_half_a_cosine() -> None:
    factor = half_cosine(10, 4)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(7) == pytest.approx(0.5) and factor(10) == pytest.approx(0.0) and factor(12) == pytest.approx(0.0)
