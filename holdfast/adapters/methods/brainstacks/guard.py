"""Training the current stack such that nothing that happens later spoils the best one that was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import trainable_parameters
from holdfast.errors import ConfigurationError

__all__ = ["Guarded", "Optimizers", "RoundPlan", "plan_optimizer"]

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPlan:
    """How a stack is trained, and when that ends. The defaults are those of the paper's smaller model."""

    steps: int = 400
    """At most."""
    evaluate_every: int = 50
    """Steps; the last one is evaluated in any case."""
    lr: float = 2e-4
    warmup: int = 40
    """Steps of linear warm-up, before half a cosine to zero."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Norm to which the gradient is clipped."""
    spike: float = 0.1
    """Nats above the best validation loss at which training ends; or above what a watched loss was at first."""
    patience: int = 4
    """Evaluations in a row without improvement after which training ends."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ConfigurationError(problems)

    def problems(self) -> list[str]:
        """One sentence for every value that breaks a rule."""
        least = {"steps": 1, "evaluate_every": 1, "warmup": 0, "weight_decay": 0, "patience": 1}
        found = [f"{n}={getattr(self, n)} must be at least {low}" for n, low in least.items() if getattr(self, n) < low]
        above = [name for name in ("lr", "clip", "spike") if not getattr(self, name) > 0]
        return found + [f"{name}={getattr(self, name)} must be above 0" for name in above]

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup))


def plan_optimizer(plan: RoundPlan) -> Optimizers:
    """AdamW by the plan."""
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=plan.lr, betas=(0.9, 0.95), weight_decay=plan.weight_decay
    )


class Guarded:
    """Trains the current task's tensors, nothing else, and leaves the best that ``validate`` has seen, to the bit.

    ``loss``: of a batch, a scalar with a gradient. ``validate``: in nats, asked before the first step too. ``watch``:
    another loss, in nats, that must not rise by more than the plan's ``spike`` over what it is now; what was validated
    when it had is not kept.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: RoundPlan,
        loss: Callable[[Any], Tensor],
        validate: Callable[[], float],
        *,
        watch: Callable[[], float] | None = None,
        optimizers: Optimizers | None = None,
    ) -> None:
        self._model, self._plan = model, plan
        self._loss, self._validate, self._watch = loss, validate, watch
        self._parameters = trainable_parameters(model)
        self._optimizer = (optimizers or plan_optimizer(plan))(self._parameters)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self.before = self.best = validate()
        self._watched = watch() if watch else 0.0
        self.steps, self.ended = 0, "all steps were taken"
        self._worse = 0
        self._snapshot = [parameter.detach().clone() for parameter in self._parameters]

    def run(self, batches: Iterable[Any], *, is_training: bool = True) -> Guarded:
        """Until the batches or the plan's steps are over, or a guard ends it. The model is in training mode meanwhile,
        if it ``is_training``, and afterwards in evaluation mode, with the best snapshot, whatever is raised."""
        self._model.train(is_training)
        try:
            for batch in batches:
                if not self._step(batch) or (self._is_due() and not self._evaluate()) or self.steps == self._plan.steps:
                    break
            else:
                self.ended = "there were no more batches"
                if not self._is_due():
                    self._evaluate()
        finally:
            with torch.no_grad():
                for parameter, best in zip(self._parameters, self._snapshot, strict=True):
                    parameter.copy_(best)
            self._model.eval()
        return self

    def _step(self, batch: Any) -> bool:
        """False if the loss or its gradient is not finite; the step is then not taken."""
        for group, lr in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * self._plan.rate(self.steps)
        self._optimizer.zero_grad()
        loss = self._loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
        norm = nn.utils.clip_grad_norm_(self._parameters, self._plan.clip)
        if not (math.isfinite(loss.item()) and math.isfinite(float(norm))):
            self.ended = f"loss {loss.item():.4g} or gradient norm {float(norm):.4g} was not finite"
            return False
        self._optimizer.step()
        self.steps += 1
        return True

    def _is_due(self) -> bool:
        return self.steps % self._plan.evaluate_every == 0 or self.steps == self._plan.steps

    def _evaluate(self) -> bool:
        """False if it is over."""
        loss = self._validate()
        if problem := self._spike(loss):
            self.ended = problem
            return False
        if loss < self.best:
            self.best, self._worse = loss, 0
            self._snapshot = [parameter.detach().clone() for parameter in self._parameters]
            return True
        self._worse += 1
        if self._worse >= self._plan.patience:
            self.ended = f"{self._worse} evaluations brought no improvement"
        return self._worse < self._plan.patience

    def _spike(self, loss: float) -> str:
        """Which loss is too high, if one is; one that is no number is."""
        spike = self._plan.spike
        if not loss <= self.best + spike:
            return f"validation loss {loss:.4g} was more than {spike} above the best, {self.best:.4g}"
        watched = self._watch() if self._watch else self._watched
        if not watched <= self._watched + spike:
            return f"the watched loss {watched:.4g} was more than {spike} above what it had been, {self._watched:.4g}"
        return ""
