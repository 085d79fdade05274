"""The inner loop: rounds of one domain, each a new stack on top of all that came before it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import adapters_of
from holdfast.adapters.forgetting import mean_loss
from holdfast.adapters.methods.brainstacks.plan import RoundPlan
from holdfast.adapters.methods.brainstacks.projection import protect
from holdfast.adapters.methods.brainstacks.stacks import Stack, stack_digest, task_name
from holdfast.adapters.tasks import abandon_task, finish_task, seed_of, start_task, use_tasks, using_tasks
from holdfast.adapters.training import Batches, Loss, Optimizers, Trained, train_task

__all__ = ["BoostPlan", "Domain", "boost", "validate"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """What there is to learn."""

    name: str
    batches: Callable[[int], Batches]
    """Training batches of a round, from its first step on; the round ends where they end."""
    loss: Loss
    validation: Sequence[Any]
    """Batches of the same loss, unseen in training."""
    tune: Callable[[nn.Module, int], object] | None = None
    """What else is done to the stack of a round that is kept, while it is the current task, before it is frozen:
    :func:`~holdfast.adapters.methods.brainstacks.tune_preferences`, for one. Of the model and the round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoostPlan(RoundPlan):
    """How a domain is learned: rounds, each as a :class:`RoundPlan` says."""

    rounds: int = 3
    """At most."""
    least_improvement: float = 0.002
    """Nats; a round that gains less is the last."""

    def problems(self) -> list[str]:
        few = [f"rounds={self.rounds} must be at least 1"] * (self.rounds < 1)
        return few + RoundPlan.problems(self)  # super() would not find the class that slots=True has replaced


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
    rounds = _Rounds(model, domain, plan, bases or {}, optimizers, seed)
    kept = list[Stack]()
    for number in range(1, plan.rounds + 1):
        stack = rounds.learn(number, lineage)
        if stack is None:
            break
        kept.append(stack)
        lineage[stack.task] = stack.digest
        if stack.before - stack.loss < plan.least_improvement:
            break
    use_tasks(model)
    return kept


def validate(model: nn.Module, domain: Domain, weights: Mapping[str, float] | None = None) -> float:
    """Mean of the domain's loss over its validation batches, in evaluation mode, with these tasks or those in use.

    Raises: ConfigurationError without such batches, and as ``use_tasks``.
    """
    with nullcontext() if weights is None else using_tasks(model, weights=weights):
        return mean_loss(model, domain.validation, domain.loss)


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The rounds of one domain."""

    model: nn.Module
    domain: Domain
    plan: BoostPlan
    bases: Mapping[str, Tensor]
    optimizers: Optimizers | None
    seed: int

    def learn(self, number: int, lineage: Mapping[str, str]) -> Stack | None:
        """Train one and freeze it; None if nothing was gained, and the model is as before."""
        task = task_name(self.domain.name, number)
        start_task(self.model, task, seed=self.seed)
        started = time.perf_counter()
        try:
            protect(self.model, self.bases)
            use_tasks(self.model, weights=dict.fromkeys([*lineage, task], 1.0))
            trained = self._train(number, task)
            loss = self._tune(number, trained.best) if trained.best < trained.before else None
        except BaseException:
            abandon_task(self.model)
            use_tasks(self.model)
            raise
        _log.info("%s: %.4f to %.4f in %d steps; %s", task, trained.before, trained.best, trained.steps, trained.ended)
        if loss is None:
            abandon_task(self.model)
            return None
        finish_task(self.model)
        seconds, digest = time.perf_counter() - started, stack_digest(self.model, task)
        told = (trained.before, loss, trained.steps, seconds, trained.ended)
        return Stack(self.domain.name, number, dict(lineage), digest, *told)

    def _train(self, number: int, task: str) -> Trained:
        plan = self.plan.task_plan(partial(validate, domain=self.domain), optimizers=self.optimizers)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed_of(f"{self.seed}/{task}"))
            return train_task(self.model, self.domain.batches(number), self.domain.loss, plan)

    def _tune(self, number: int, loss: float) -> float:
        """The validation loss of what is frozen."""
        if self.domain.tune is None:
            return loss
        self.domain.tune(self.model, number)
        return validate(self.model, self.domain)
