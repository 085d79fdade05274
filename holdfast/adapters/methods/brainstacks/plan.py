"""Numbers that say how the current stack is trained, by its own loss or by preferences."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.adapters.training import Optimizers, TaskPlan, Validation, adamw, half_cosine
from holdfast.errors import ConfigurationError

__all__ = ["RoundPlan", "plan_optimizer"]


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
        return half_cosine(self.steps, self.warmup)(step)

    def task_plan(
        self,
        validate: Validation,
        *,
        watch: Validation | None = None,
        optimizers: Optimizers | None = None,
        is_training: bool = True,
    ) -> TaskPlan:
        """What :func:`~holdfast.adapters.train_task` takes; the rest as there."""
        return TaskPlan(
            steps=self.steps,
            optimizer=optimizers or plan_optimizer(self),
            schedule=self.rate,
            clip=self.clip,
            is_training=is_training,
            validate=validate,
            validate_every=self.evaluate_every,
            spike=self.spike,
            patience=self.patience,
            watch=watch,
        )


def plan_optimizer(plan: RoundPlan) -> Optimizers:
    """AdamW by the plan."""
    return adamw(plan.lr, weight_decay=plan.weight_decay)
