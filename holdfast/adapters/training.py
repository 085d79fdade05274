"""One loop for one task, whatever the method and the loss: adapters of any kind, stacks and what they are to prefer, or
the whole model as a control."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import ATTRIBUTE, trainable_parameters
from holdfast.adapters.forgetting import evaluating
from holdfast.adapters.tasks import penalty
from holdfast.errors import ConfigurationError

__all__ = [
    "Batches",
    "Loss",
    "Optimizers",
    "TaskPlan",
    "Trained",
    "adamw",
    "constant",
    "half_cosine",
    "snapshot",
    "train_task",
]

Batches = Iterable[Any]
Loss = Callable[[nn.Module, Any], Tensor]
"""Of a batch: a scalar, nats."""
Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""A new one for each task: the last one's moments belong to other tensors."""
Schedule = Callable[[int], float]
"""Factor of the optimizer's learning rates at a step, counted from 0."""
Validation = Callable[[nn.Module], float]
"""Of the model, which is in evaluation mode, without gradients: nats."""


def adamw(lr: float, *, weight_decay: float = 0.0, fused: bool | None = None) -> Optimizers:
    """AdamW with the betas of language models; ``fused`` as torch has it."""
    return partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)


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


def snapshot(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of them as they are now."""
    return [parameter.detach().clone() for parameter in parameters]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPlan:
    """How a task is trained, and when that ends."""

    steps: int
    """At most; fewer if the batches end."""
    optimizer: Optimizers
    schedule: Schedule = constant
    clip: float = 1.0
    """Norm to which the gradient is clipped; infinite for none."""
    is_training: bool = True
    """Whether the model is in training mode. In evaluation mode there is no dropout and no noise, and the method's
    penalty, some of which is known in training mode only, is left out."""
    validate: Validation | None = None
    """Asked before the first step, then every ``validate_every`` steps and after the last one. The best of these states
    is what the task ends with, the first one if none was better."""
    validate_every: int = 50
    spike: float = math.inf
    """Nats above the best validation loss at which training ends; or above what ``watch`` was at first. Whatever it is,
    a loss that is no number ends it."""
    patience: float = math.inf
    """Validations in a row without improvement after which training ends."""
    watch: Validation | None = None
    """Another loss, asked with ``validate``, that must not rise by more than ``spike``; a state with which it has is
    not kept."""

    def __post_init__(self) -> None:
        least_one = ("steps", "validate_every", "patience")
        problems = [f"{name}={v} must be at least 1" for name in least_one if not (v := getattr(self, name)) >= 1]
        if not self.clip > 0:
            problems.append(f"clip={self.clip} must be above 0; math.inf does not clip")
        if not self.spike > 0:
            problems.append(f"spike={self.spike} must be above 0; math.inf lets a loss rise")
        if self.validate is None and (self.watch or min(self.spike, self.patience) < math.inf):
            problems.append("spike, patience and watch need validate, where they are looked at")
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

    @property
    def before(self) -> float:
        """Validation loss before the first step; NaN without validation."""
        return self.validations[0][1] if self.validations else math.nan

    @property
    def best(self) -> float:
        """Validation loss of the state that was kept; NaN without validation."""
        return math.nan if self.best_step is None else dict(self.validations)[self.best_step]


def train_task(
    model: nn.Module, batches: Batches, loss: Loss, plan: TaskPlan, parameters: Sequence[nn.Parameter] | None = None
) -> Trained:
    """Train the current task's parameters, or the given ones, on the batches in their order.

    The loss of a model with adapters is joined by :func:`~holdfast.adapters.penalty`. A step whose loss or gradient is
    not finite is not taken, and is the last; nothing is validated after it, since what led there should not be kept for
    a validation that missed it. The model is left in evaluation mode and, with validation, in the best state, to the
    bit, whatever is raised meanwhile. Starting and finishing the task, and collecting inputs for the methods that need
    it, stay with the caller.

    Raises: ConfigurationError if there is nothing to train.
    """
    trained = list(trainable_parameters(model) if parameters is None else parameters)
    if not trained:
        raise ConfigurationError("there is nothing to train: start a task, or name the parameters")
    run = _Run(model, loss, plan, trained)
    run.look_first()
    try:
        run.train(batches)
    finally:
        run.finish()
    return run.report


class _Run:
    """One call of :func:`train_task`."""

    def __init__(self, model: nn.Module, loss: Loss, plan: TaskPlan, parameters: list[nn.Parameter]) -> None:
        self._model, self._loss, self._plan, self._parameters = model, loss, plan, parameters
        self._optimizer = plan.optimizer(parameters)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._has_penalty = plan.is_training and hasattr(model, ATTRIBUTE)
        self._best: list[Tensor] | None = None
        self._watched, self._worse = 0.0, 0
        self.report = Trained()

    def look_first(self) -> None:
        """What is there before the first step is the best so far."""
        if self._plan.validate is None:
            return
        with evaluating(self._model):
            self.report.validations.append((0, self._plan.validate(self._model)))
            self._watched = self._plan.watch(self._model) if self._plan.watch else 0.0
        self._keep()

    def train(self, batches: Batches) -> None:
        """Until the batches or the plan's steps are over, or something else ends it."""
        self._model.train(self._plan.is_training)
        for batch in islice(batches, self._plan.steps):
            if not self._step(batch) or (self._is_due() and not self._validate()):
                return
        if self.report.steps < self._plan.steps:
            self.report.ended = "there were no more batches"
            if not self._is_due():
                self._validate()

    def _step(self, batch: Any) -> bool:
        """False if it was not taken."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._plan.schedule(self.report.steps)
        self._optimizer.zero_grad()
        loss = self._loss(self._model, batch)
        total = loss + penalty(self._model) if self._has_penalty else loss
        total.backward()  # type: ignore[no-untyped-call]  # torch: untyped
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._plan.clip))
        if not (math.isfinite(total.item()) and math.isfinite(norm)):
            self.report.ended = f"loss {total.item():.4g} or gradient norm {norm:.4g} was not finite"
            return False
        self._optimizer.step()
        self.report.losses.append(loss.item())
        return True

    def _is_due(self) -> bool:
        return self.report.steps % self._plan.validate_every == 0 or self.report.steps == self._plan.steps

    def _validate(self) -> bool:
        """Keep the state if it is the best so far. False if training is to end."""
        if self._plan.validate is None:
            return True
        with evaluating(self._model):
            found = self._plan.validate(self._model)
            problem = self._spike(found)
        is_better = not problem and found < self.report.best
        self.report.validations.append((self.report.steps, found))
        self._worse = 0 if is_better else self._worse + 1
        if is_better:
            self._keep()
        elif problem or self._worse >= self._plan.patience:
            self.report.ended = problem or f"{self._worse} evaluations brought no improvement"
            return False
        return True

    def _spike(self, found: float) -> str:
        """Which loss is too high, if one is; one that is no number is."""
        best, spike = self.report.best, self._plan.spike
        if not found <= best + spike:
            return f"validation loss {found:.4g} was more than {spike} above the best, {best:.4g}"
        watched = self._plan.watch(self._model) if self._plan.watch else self._watched
        if not watched <= self._watched + spike:
            return f"the watched loss {watched:.4g} was more than {spike} above what it had been, {self._watched:.4g}"
        return ""

    def _keep(self) -> None:
        self._best, self.report.best_step = snapshot(self._parameters), self.report.steps

    @torch.no_grad()
    def finish(self) -> None:
        """Put the best state back."""
        if self._best is not None:
            for parameter, best in zip(self._parameters, self._best, strict=True):
                parameter.copy_(best)
        self._optimizer.zero_grad()
        self._model.eval()
