"""The meta-router: which domains' stacks an input gets, from what the bare base makes of it.

Suffixes: B inputs, T tokens, H width of the base, W width of the router, Q domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adapters.tasks import using_tasks
from holdfast.adapters.training import TaskPlan, half_cosine, train_task
from holdfast.errors import ConfigurationError

__all__ = ["Examples", "MetaRouter", "RouterPlan", "base_features", "choose", "router_loss", "train_router"]

_MIDDLE_SHARE = 0.45
_TEMPERATURES = (0.3, 3.0)


class MetaRouter(nn.Module):
    """A probability for every domain, each by itself: they need not sum to 1, and all may be low.

    One query for all and one for each domain attend over the tokens; a domain's context and the common one become a
    logit. A query is added to what it found: the head is the same for all domains, and where tokens are alike it could
    not tell otherwise which one it is asked about. Five domains and a base of width 3840 make 2.76 million parameters.

    Source: arXiv 2604.01152, without that sum.
    """

    def __init__(self, features: int, domains: Sequence[str], *, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.domains = tuple(domains)
        self.tokens = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.Dropout(dropout))
        self.queries = nn.Parameter(torch.randn(1 + len(self.domains), width))
        self.head = nn.Sequential(
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 1),
        )
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, h_BTH: Tensor, is_token_BT: Tensor | None = None) -> Tensor:
        """Logits [B, Q] of features [B, T, H]. ``is_token_BT``: False for padding, which then counts for nothing."""
        x_BTW = self.tokens(h_BTH)
        scores_BQT = self.queries @ x_BTW.transpose(1, 2) / math.sqrt(x_BTW.shape[-1])
        if is_token_BT is not None:
            scores_BQT = scores_BQT.masked_fill(~is_token_BT[:, None], -math.inf)
        context_BQW = scores_BQT.softmax(-1) @ x_BTW + self.queries
        common_BQW = context_BQW[:, :1].expand(-1, len(self.domains), -1)
        logits_BQ: Tensor = self.head(torch.cat([context_BQW[:, 1:], common_BQW], -1)).squeeze(-1)
        return logits_BQ / self.temperature.clamp(*_TEMPERATURES)


@torch.no_grad()
def base_features(
    model: nn.Module, call: Callable[[], object], *, middle: str, last: str, max_tokens: int = 256
) -> Tensor:
    """0.45 of the hidden states behind the module ``middle`` and 0.55 of those behind ``last``, [B, T, H], of the base
    with all stacks off, when ``call()`` runs the model, in the mode the model is in. At most the first ``max_tokens``
    tokens: as many in use as in training.

    Raises: ConfigurationError for a module that is not there, or did not run.
    """
    seen = dict[str, Tensor]()
    handles = []
    modules = dict(model.named_modules())
    if unknown := [name for name in (middle, last) if name not in modules]:
        raise ConfigurationError(f"the model has no modules {unknown}, behind which hidden states could be taken")
    for name in (middle, last):
        handles.append(modules[name].register_forward_hook(_keep(seen, name)))
    try:
        with using_tasks(model, first=0):
            call()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in (middle, last) if name not in seen]:
        raise ConfigurationError(f"modules {missing} did not run, so that there are no hidden states")
    mixed = _MIDDLE_SHARE * seen[middle].float() + (1 - _MIDDLE_SHARE) * seen[last].float()
    return mixed[:, :max_tokens]


def choose(
    router: MetaRouter,
    h_BTH: Tensor,
    is_token_BT: Tensor | None = None,
    *,
    threshold: float = 0.5,
    is_soft: bool = False,
) -> list[dict[str, float]]:
    """For each input the domains above ``threshold``, each with weight 1, or ``is_soft`` with its probability, as the
    authors' code has it. None above is an abstention: the base answers alone."""
    router.eval()
    with torch.no_grad():
        probabilities_BQ = router(h_BTH, is_token_BT).sigmoid()
    return [
        {d: p if is_soft else 1.0 for d, p in zip(router.domains, row, strict=True) if p > threshold}
        for row in probabilities_BQ.tolist()
    ]


def router_loss(logits_BQ: Tensor, targets_BQ: Tensor, *, margin: float = 0.3, margin_weight: float = 0.05) -> Tensor:
    """Cross-entropy of every domain, and a small price for probabilities closer than ``margin`` to 0.5. A scalar."""
    undecided = (margin - (logits_BQ.sigmoid() - 0.5).abs()).clamp_min(0)
    return F.binary_cross_entropy_with_logits(logits_BQ, targets_BQ) + margin_weight * undecided.mean()


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs whose outcomes have been searched."""

    features: Tensor
    """[B, T, H]."""
    targets: Tensor
    """[B, Q] in [0, 1]."""
    is_token: Tensor | None = None
    """bool [B, T]."""

    def take(self, index: Tensor) -> Examples:
        """Some of them."""
        is_token = None if self.is_token is None else self.is_token[index]
        return Examples(self.features[index], self.targets[index], is_token)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterPlan:
    """How a router is trained; the paper's numbers."""

    epochs: int = 8
    batch: int = 16
    lr: float = 8e-4
    weight_decay: float = 0.01
    clip: float = 1.0


def train_router(
    router: MetaRouter, examples: Examples, held_out: Examples, plan: RouterPlan | None = None, *, seed: int = 0
) -> list[float]:
    """The held-out cross-entropy before the first epoch and after each; the router is left as it was at the best one.

    ``held_out`` has to share no prompt with ``examples``. Cosine to zero over all steps. Dropout draws from torch's
    generator.
    """
    plan = plan or RouterPlan()
    per_epoch = math.ceil(len(examples.targets) / plan.batch)
    steps = plan.epochs * per_epoch
    task = TaskPlan(
        steps=steps,
        optimizer=partial(torch.optim.AdamW, lr=plan.lr, weight_decay=plan.weight_decay),
        schedule=half_cosine(steps),
        clip=plan.clip,
        validate=partial(_held_out_loss, held_out=held_out),
        validate_every=per_epoch,
    )
    trained = train_task(router, _epochs(examples, plan, seed), _loss, task, list(router.parameters()))
    return [loss for _, loss in trained.validations]


def _epochs(examples: Examples, plan: RouterPlan, seed: int) -> Iterator[Examples]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(plan.epochs):
        order = torch.randperm(len(examples.targets), generator=draw)
        for start in range(0, len(order), plan.batch):
            yield examples.take(order[start : start + plan.batch])


def _loss(router: nn.Module, batch: Examples) -> Tensor:
    return router_loss(router(batch.features, batch.is_token), batch.targets)


def _held_out_loss(router: nn.Module, held_out: Examples) -> float:
    logits_BQ = router(held_out.features, held_out.is_token)
    return float(F.binary_cross_entropy_with_logits(logits_BQ, held_out.targets))


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    return hook
