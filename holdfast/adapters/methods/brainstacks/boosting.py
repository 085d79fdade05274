"""The inner loop: rounds of one domain, each a new stack on top of all that came before it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import adapters_of, trainable_parameters
from holdfast.adapters.methods.brainstacks.projection import protect
from holdfast.adapters.methods.brainstacks.stacks import Stack, stack_digest, task_name
from holdfast.adapters.tasks import abandon_task, finish_task, penalty, seed_of, start_task, use_tasks, using_tasks
from holdfast.errors import ConfigurationError

__all__ = ["BoostPlan", "Domain", "boost", "validate"]

_log = logging.getLogger(__name__)

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """What there is to learn."""

    name: str
    batches: Callable[[int], Iterable[Any]]
    """Training batches of a round, from its first step on; the round ends where they end."""
    loss: Callable[[nn.Module, Any], Tensor]
    """Of a batch: a scalar, nats."""
    validation: Sequence[Any]
    """Batches of the same loss, unseen in training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoostPlan:
    """How a domain is learned. The defaults are those of the paper's smaller model."""

    rounds: int = 3
    """At most."""
    steps: int = 400
    """Per round, at most."""
    evaluate_every: int = 50
    """Steps; the last one is evaluated in any case."""
    lr: float = 2e-4
    warmup: int = 40
    """Steps of linear warm-up, before half a cosine to zero."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Norm to which the gradient is clipped."""
    least_improvement: float = 0.002
    """Nats; a round that gains less is the last."""
    spike: float = 0.1
    """Nats above the best validation loss at which a round ends."""
    patience: int = 4
    """Evaluations in a row without improvement after which a round ends."""

    def __post_init__(self) -> None:
        least = {"rounds": 1, "steps": 1, "evaluate_every": 1, "warmup": 0, "weight_decay": 0, "patience": 1}
        problems = [
            f"{n}={getattr(self, n)} must be at least {low}" for n, low in least.items() if getattr(self, n) < low
        ]
        above = [name for name in ("lr", "clip", "spike") if not getattr(self, name) > 0]
        problems += [f"{name}={getattr(self, name)} must be above 0" for name in above]
        if problems:
            raise ConfigurationError(problems)

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup))


def boost(
    model: nn.Module,
    domain: Domain,
    plan: BoostPlan,
    *,
    bases: Mapping[str, Tensor] | None = None,
    after: Sequence[str] | None = None,
    optimizers: Optimizers | None = None,
    seed: int = 0,
) -> list[Stack]:
    """Train and freeze the rounds of one domain; those that are kept, oldest first.

    Every round is trained by the same loss on a zero-effect stack over ``after``, all finished tasks by default, and
    over the domain's own earlier rounds; nothing is reweighted. Its best validation snapshot is frozen, which a spike
    afterwards does not touch; a round that never beats what was there is dropped. What is random depends on ``seed``,
    the domain and the round only. ``bases``: what to protect, by layer.

    Raises: ConfigurationError as ``start_task``. If anything raises, the finished rounds stay and the current one goes.
    Source: arXiv 2604.01152.
    """
    lineage = {name: stack_digest(model, name) for name in (adapters_of(model).tasks if after is None else after)}
    kept = list[Stack]()
    for number in range(1, plan.rounds + 1):
        task = task_name(domain.name, number)
        start_task(model, task, seed=seed)
        try:
            protect(model, bases or {})
            use_tasks(model, weights=dict.fromkeys([*lineage, task], 1.0))
            started = time.perf_counter()
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                torch.manual_seed(seed_of(f"{seed}/{task}"))
                outcome = _Round(model, domain, plan, optimizers or plan_optimizer(plan)).run(number)
        except BaseException:
            abandon_task(model)
            use_tasks(model)
            raise
        _log.info("%s: %.4f to %.4f in %d steps; %s", task, outcome.before, outcome.best, outcome.steps, outcome.ended)
        if not outcome.best < outcome.before:
            abandon_task(model)
            break
        finish_task(model)
        seconds, digest = time.perf_counter() - started, stack_digest(model, task)
        told = (outcome.before, outcome.best, outcome.steps, seconds, outcome.ended)
        kept.append(Stack(domain.name, number, dict(lineage), digest, *told))
        lineage[task] = digest
        if outcome.before - outcome.best < plan.least_improvement:
            break
    use_tasks(model)
    return kept


@torch.no_grad()
def validate(model: nn.Module, domain: Domain, weights: Mapping[str, float] | None = None) -> float:
    """Mean of the domain's loss over its validation batches, in evaluation mode, with these tasks or those in use."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if weights is None:
            losses = [float(domain.loss(model, batch)) for batch in domain.validation]
        else:
            with using_tasks(model, weights=weights):
                losses = [float(domain.loss(model, batch)) for batch in domain.validation]
    finally:
        for module, mode in modes:
            module.training = mode
    return sum(losses) / len(losses)


def plan_optimizer(plan: BoostPlan) -> Optimizers:
    """AdamW by the plan."""
    return lambda parameters: torch.optim.AdamW(
        parameters, lr=plan.lr, betas=(0.9, 0.95), weight_decay=plan.weight_decay
    )


class _Round:
    """One stack's training."""

    def __init__(self, model: nn.Module, domain: Domain, plan: BoostPlan, optimizers: Optimizers) -> None:
        self._model, self._domain, self._plan = model, domain, plan
        self._parameters = trainable_parameters(model)
        self._optimizer = optimizers(self._parameters)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self.before = self.best = validate(model, domain)
        self.steps, self.ended = 0, "all steps were taken"
        self._worse = 0
        self._snapshot = [parameter.detach().clone() for parameter in self._parameters]

    def run(self, number: int) -> _Round:
        """Afterwards the model has the best snapshot."""
        self._model.train()
        for batch in self._domain.batches(number):
            if not self._step(batch) or (self._is_due() and not self._evaluate()) or self.steps == self._plan.steps:
                break
        else:
            self.ended = "there were no more batches"
            if not self._is_due():
                self._evaluate()
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
        loss = self._domain.loss(self._model, batch)
        (loss + penalty(self._model)).backward()  # type: ignore[no-untyped-call]  # torch: untyped
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
        """False if the round is over."""
        loss = validate(self._model, self._domain)
        if loss < self.best:
            self.best, self._worse = loss, 0
            self._snapshot = [parameter.detach().clone() for parameter in self._parameters]
            return True
        self._worse += 1
        if not loss <= self.best + self._plan.spike:
            self.ended = f"validation loss {loss:.4g} was more than {self._plan.spike} above the best, {self.best:.4g}"
            return False
        if self._worse >= self._plan.patience:
            self.ended = f"{self._worse} evaluations brought no improvement"
        return self._worse < self._plan.patience
