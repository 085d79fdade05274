"""Preference tuning of the stack that is being trained, before it is frozen: DPO on pairs of answers.

Suffixes: B pairs, T tokens of one side, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adapters.adapted import adapters_of
from holdfast.adapters.methods.brainstacks.plan import RoundPlan
from holdfast.adapters.training import Optimizers, train_task
from holdfast.errors import ConfigurationError

__all__ = [
    "Pairs",
    "PreferencePlan",
    "Preferences",
    "Tuned",
    "answer_log_probs",
    "preference_loss",
    "tune_preferences",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Prompts, each followed by an answer that is preferred, and by one that is not. Padding comes at the end, where no
    token of an answer sees it.

    Raises: ConfigurationError for shapes that do not fit, and for a side of a pair without an answer to predict.
    """

    chosen: Tensor
    """int64 [B, T]: prompt, answer, padding."""
    rejected: Tensor
    """The same prompts; its T may be another one."""
    chosen_answer: Tensor
    """bool [B, T]: true at the answer's tokens, false at prompt and padding. A first token has nothing to be predicted
    from, and does not count."""
    rejected_answer: Tensor

    def __post_init__(self) -> None:
        problems = []
        for name in ("chosen", "rejected"):
            ids, answer = getattr(self, name), getattr(self, f"{name}_answer")
            if ids.ndim != 2 or ids.shape != answer.shape or answer.dtype != torch.bool:
                problems.append(
                    f"{name} {[*ids.shape]} must be [B, T], and {name}_answer bool of the same shape; it is "
                    f"{answer.dtype} {[*answer.shape]}"
                )
            elif not answer[:, 1:].any(1).all():
                problems.append(
                    f"{name}_answer marks no token behind the first in some row: there is nothing to prefer"
                )
        if len(self.chosen) != len(self.rejected):
            problems.append(
                f"{len(self.chosen)} chosen answers must be as many as the {len(self.rejected)} rejected ones"
            )
        if problems:
            raise ConfigurationError(problems)


def _call(model: nn.Module, ids_BT: Tensor) -> Tensor:
    found = model(ids_BT)
    logits_BTV: Tensor = getattr(found, "logits", found)
    return logits_BTV


@dataclass(frozen=True, kw_only=True, slots=True)
class Preferences:
    """What is preferred in a domain."""

    train: Sequence[Pairs]
    """Batches, taken in this order, again and again."""
    validation: Sequence[Pairs]
    logits: Callable[[nn.Module, Tensor], Tensor] = _call
    """Of the model for tokens [B, T]: [B, T, V]. By default the model's answer, or the ``logits`` of it."""

    def __post_init__(self) -> None:
        if not self.train or not self.validation:
            raise ConfigurationError("preferences need at least one batch of pairs to train on and one to validate")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePlan(RoundPlan):
    """How a stack is tuned: like a round, with a loss of its own."""

    steps: int = 200
    evaluate_every: int = 20
    lr: float = 2e-5
    warmup: int = 20
    beta: float = 0.1
    """How much a step away from the reference costs; the larger, the nearer the stack stays to it."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be the wrong way round (conservative DPO); below 0.5."""
    is_length_normalised: bool = False
    """Compare means over an answer's tokens instead of sums, which favour long rejected answers."""

    def problems(self) -> list[str]:
        found = RoundPlan.problems(self)
        if not self.beta > 0:
            found.append(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        return found


@dataclass(frozen=True, slots=True)
class Tuned:
    """What has become of it, on the validation pairs, with the stack that is kept."""

    before: float
    """Preference loss, nats: ln 2, since the reference is the stack itself."""
    loss: float
    margin: float
    """Mean of h, see :func:`preference_loss`, nats."""
    accuracy: float
    """Share of the pairs whose h is above 0."""
    steps: int
    """That were trained; the stack that is kept may be of an earlier one."""
    ended: str


def answer_log_probs(logits_BTV: Tensor, ids_BT: Tensor, is_answer_BT: Tensor, *, is_mean: bool = False) -> Tensor:
    """log π(y | x) [B]: the sum over the answer's tokens, or their mean; fp32 at least. Token t is predicted by the
    logits of token t - 1."""
    logits_BTV = logits_BTV[:, :-1].to(torch.promote_types(logits_BTV.dtype, torch.float32))
    counts_BT = is_answer_BT[:, 1:]
    found_BT = -F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    sums_B = found_BT.where(counts_BT, 0.0).sum(1)
    return sums_B / counts_BT.sum(1) if is_mean else sums_B


def preference_loss(margins_B: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - ε) log σ(β h) - ε log σ(-β h) [B], nats, with ε the label smoothing.

    ``margins_B``: h = log π(y_w | x) / π_ref(y_w | x) - log π(y_l | x) / π_ref(y_l | x).
    Source: arXiv 2305.18290, equation 7.
    """
    right_B, wrong_B = F.logsigmoid(beta * margins_B), F.logsigmoid(-beta * margins_B)
    return -(1 - label_smoothing) * right_B - label_smoothing * wrong_B


def tune_preferences(
    model: nn.Module,
    preferences: Preferences,
    plan: PreferencePlan,
    *,
    watch: Callable[[], float] | None = None,
    optimizers: Optimizers | None = None,
) -> Tuned:
    """Train the current task's tensors, and nothing else, to prefer the chosen answers; the best on the validation
    pairs stay, and the task stays current, so that it can be frozen or trained on.

    The reference is the model as it is now, with the current stack: what it says of every pair is computed once, and
    no second model is held. Policy and reference are both without the router's noise and dropout (evaluation mode), so
    that h is 0 at the start; the load balance, which belongs to training mode, is left out with them. ``watch``: a loss
    of the domain, in nats, that ends the tuning when it rises by more than the plan's ``spike``, for instance
    ``lambda: validate(model, domain)``. The preference loss alone does not tell: a stack that has gone off may well
    prefer what it should, ever more.

    Raises: ConfigurationError without a current task, or if it does not act. Source: arXiv 2305.18290; that it has to
    act on a stack that is not yet frozen, arXiv 2604.01152.
    """
    _take_part(model)
    tuning = _Tuning(model, preferences, plan)
    task_plan = plan.task_plan(
        lambda _: tuning.validate(),
        watch=(lambda _: watch()) if watch else None,
        optimizers=optimizers,
        is_training=False,
    )
    trained = train_task(model, cycle(tuning.train), lambda _, batch: tuning.loss(batch), task_plan)
    margins = tuning.margins()
    accuracy = float((margins > 0).double().mean())
    found = Tuned(trained.before, trained.best, float(margins.mean()), accuracy, trained.steps, trained.ended)
    _log.info(
        "%s: preference %.4f to %.4f, accuracy %.2f, in %d steps; %s",
        *(adapters_of(model).current, found.before, found.loss, accuracy, found.steps, found.ended),
    )
    return found


def _take_part(model: nn.Module) -> None:
    """Raises as :func:`tune_preferences`."""
    adapters = adapters_of(model)
    if adapters.current is None:
        raise ConfigurationError(
            f"no task is being trained, and finished ones ({adapters.tasks}) are frozen: tune before finish_task, or "
            "start a task"
        )
    model.eval()
    for layer in adapters.layers.values():
        layer.count_untrained()
    if not any(part.is_current for layer in adapters.layers.values() for part in layer.parts()):
        raise ConfigurationError(f"task {adapters.current!r} is not among those in use; show it: use_tasks(model)")


class _Tuning:
    """Batches of pairs, each with what the reference says of it."""

    def __init__(self, model: nn.Module, preferences: Preferences, plan: PreferencePlan) -> None:
        self._model, self._preferences, self._plan = model, preferences, plan
        with torch.no_grad():
            self.train = [(pairs, self._gaps(pairs)) for pairs in preferences.train]
            self._validation = [(pairs, self._gaps(pairs)) for pairs in preferences.validation]

    def loss(self, batch: tuple[Pairs, Tensor]) -> Tensor:
        pairs, reference_B = batch
        return self._losses(self._gaps(pairs) - reference_B).mean()

    def validate(self) -> float:
        return float(self._losses(self.margins()).mean())

    @torch.no_grad()
    def margins(self) -> Tensor:
        """h of every validation pair."""
        return torch.cat([self._gaps(pairs) - reference_B for pairs, reference_B in self._validation])

    def _losses(self, margins_B: Tensor) -> Tensor:
        return preference_loss(margins_B, beta=self._plan.beta, label_smoothing=self._plan.label_smoothing)

    def _gaps(self, pairs: Pairs) -> Tensor:
        """log π(y_w | x) - log π(y_l | x), [B]."""
        sides = (pairs.chosen, pairs.chosen_answer), (pairs.rejected, pairs.rejected_answer)
        chosen_B, rejected_B = (
            answer_log_probs(
                self._preferences.logits(self._model, ids_BT),
                ids_BT,
                answer_BT,
                is_mean=self._plan.is_length_normalised,
            )
            for ids_BT, answer_BT in sides
        )
        return chosen_B - rejected_B
