"""One loop for one task, whatever the method: adapters of any kind, or the whole model as a control."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import ATTRIBUTE, trainable_parameters
from holdfast.adapters.tasks import penalty
from holdfast.errors import ConfigurationError

__all__ = ["Batches", "Loss", "Optimizers", "TaskPlan", "Trained", "constant", "half_cosine", "train_task"]

Batches = Iterable[Any]
Loss = Callable[[nn.Module, Any], Tensor]
"""Of a batch: a scalar, nats."""
Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""A new one for each task: the last one's moments belong to other tensors."""
Schedule = Callable[[int], float]
"""Factor of the optimizer's learning rates at a step, counted from 0."""


def constant(_: int) -> float:
    """The rate as it is."""
    return 1.0


def half_cosine(steps: int, warmup: int = 0) -> Schedule:
    """Linear warm-up, then half a cosine that reaches 0 at ``steps``. Source: arXiv 1608.03983, equation 5."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))

    return factor


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPlan:
    """How a task is trained."""

    steps: int
    """At most; fewer if the batches end."""
    optimizer: Optimizers
    schedule: Schedule = constant
    clip: float = 1.0
    """Norm to which the gradient is clipped; infinite for none."""
    validate: Callable[[nn.Module], float] | None = None
    """Asked before the first step, then every ``validate_every`` steps and after the last one. The best of these states
    is what the task ends with, the first one if none was better."""
    validate_every: int = 50

    def __post_init__(self) -> None:
        problems = [f"{n}={v} must be at least 1" for n in ("steps", "validate_every") if (v := getattr(self, n)) < 1]
        if not self.clip > 0:
            problems.append(f"clip={self.clip} must be above 0; math.inf does not clip")
        if problems:
            raise ConfigurationError(problems)


@dataclass(slots=True)
class Trained:
    """What training a task was like."""

    losses: list[float] = field(default_factory=list)
    """Of every step's batch before its update, nats, without the method's penalty."""
    validations: list[tuple[int, float]] = field(default_factory=list)
    """Steps made, and the validation loss then."""
    best_step: int | None = None
    """Steps made by the state that was kept; None without validation: the last one."""
    ended: str = "all steps were taken"

    @property
    def steps(self) -> int:
        """That were taken."""
        return len(self.losses)


def train_task(
    model: nn.Module, batches: Batches, loss: Loss, plan: TaskPlan, parameters: Sequence[nn.Parameter] | None = None
) -> Trained:
    """Train the current task's parameters, or the given ones, on the batches in their order.

    The loss of a model with adapters is joined by :func:`~holdfast.adapters.penalty`. A step whose loss or gradient is
    not finite is not taken, and is the last. The model is left in evaluation mode; starting and finishing the task,
    and collecting inputs for the methods that need it, stay with the caller.

    Raises: ConfigurationError if there is nothing to train.
    """
    trained = list(trainable_parameters(model) if parameters is None else parameters)
    if not trained:
        raise ConfigurationError("there is nothing to train: start a task, or name the parameters")
    run = _Run(model, loss, plan, trained)
    run.validate()
    model.train()
    for batch in islice(batches, plan.steps):
        if not run.step(batch):
            break
        if run.report.steps % plan.validate_every == 0:
            run.validate()
    else:
        if run.report.steps < plan.steps:
            run.report.ended = "there were no more batches"
    run.finish()
    return run.report


class _Run:
    """One call of :func:`train_task`."""

    def __init__(self, model: nn.Module, loss: Loss, plan: TaskPlan, parameters: list[nn.Parameter]) -> None:
        self._model, self._loss, self._plan, self._parameters = model, loss, plan, parameters
        self._optimizer = plan.optimizer(parameters)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._has_adapters = hasattr(model, ATTRIBUTE)
        self._best: list[Tensor] | None = None
        self.report = Trained()

    def step(self, batch: Any) -> bool:
        """False if it was not taken."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._plan.schedule(self.report.steps)
        self._optimizer.zero_grad()
        loss = self._loss(self._model, batch)
        total = loss + penalty(self._model) if self._has_adapters else loss
        total.backward()  # type: ignore[no-untyped-call]  # torch: untyped
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._plan.clip))
        if not (math.isfinite(total.item()) and math.isfinite(norm)):
            self.report.ended = f"loss {total.item():.4g} or gradient norm {norm:.4g} was not finite"
            return False
        self._optimizer.step()
        self.report.losses.append(loss.item())
        return True

    def validate(self) -> None:
        """And keep the state if it is the best so far. Nothing without a validation, or twice at the same step."""
        report, steps = self.report, self.report.steps
        if self._plan.validate is None or (report.validations and report.validations[-1][0] == steps):
            return
        was_training = self._model.training
        self._model.eval()
        found = self._plan.validate(self._model)
        self._model.train(was_training)
        if not report.validations or found < min(loss for _, loss in report.validations):
            self._best, report.best_step = [p.detach().clone() for p in self._parameters], steps
        report.validations.append((steps, found))

    @torch.no_grad()
    def finish(self) -> None:
        """Validate what the last step left, and put the best state back."""
        self.validate()
        if self._best is not None:
            for parameter, best in zip(self._parameters, self._best, strict=True):
                parameter.copy_(best)
        self._optimizer.zero_grad()
        self._model.eval()
