"""What becomes of pieces of text under each choice of domains, and which choice a search finds best.

Suffixes: N windows, T tokens, P tokens of the prompt, H width of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import adapters
from holdfast.adapters.methods.brainstacks import Found, base_features, exhaustive, greedy
from holdfast.adapters.methods.brainstacks.search import Loss
from holdfast.launch.adapt_choices import Choices

__all__ = ["PROMPT_TOKENS", "Outcomes", "features_of", "search"]

PROMPT_TOKENS = 256
"""At most so many tokens are looked at by a router."""
_EXHAUSTIVE = 4
"""Up to so many domains all 2^T choices are tried."""


def search(choices: Choices, loss: Loss) -> Found:
    """The best choice of domains that the method can carry out: all are tried for one task at a time and for few
    domains; of more the search is greedy."""
    domains = choices.domains
    if choices.method.acts_apart:
        return exhaustive(loss, domains) if len(domains) <= _EXHAUSTIVE else greedy(loss, domains)
    losses: dict[tuple[str, ...], float] = {(): loss({})}
    losses |= {(domain,): loss({domain: 1.0}) for domain in domains}
    best = min(losses, key=losses.__getitem__)
    return Found(best, losses[best], losses)


@torch.no_grad()
def features_of(model: nn.Module, prompt_NP: Tensor) -> Tensor:
    """What a router sees of prompts, [N, P, H] on the CPU: of the last tokens, at most :data:`PROMPT_TOKENS`."""
    blocks = [name for name, _ in model.named_modules() if name.startswith("blocks.") and name.count(".") == 1]
    tokens = prompt_NP[:, -PROMPT_TOKENS:].to(next(model.parameters()).device)
    return base_features(
        model, lambda: model(tokens), middle=blocks[(len(blocks) - 1) // 2], last=blocks[-1], max_tokens=PROMPT_TOKENS
    ).cpu()


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Windows of text, each a prompt and what follows it. A choice is measured, on all of them, when somebody asks."""

    model: nn.Module
    choices: Choices
    windows: Sequence[tuple[Tensor, Tensor]]
    """Tokens and targets, int64 [B, T]."""
    _losses: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(tokens) for tokens, _ in self.windows)

    def losses(self, domains: Sequence[str]) -> Tensor:
        """[N]: nats per token behind the prompt when these domains act."""
        key = tuple(domain for domain in self.choices.domains if domain in domains)
        if key not in self._losses:
            with adapters.using_tasks(self.model, **self.choices.of(dict.fromkeys(key, 1.0))):
                self._losses[key] = torch.cat([self._measure(*window) for window in self.windows])
        return self._losses[key]

    def found(self) -> list[Found]:
        """What a search finds, for each window."""

        def loss_of(number: int) -> Loss:
            def loss(weights: Mapping[str, float]) -> float:
                return float(self.losses(list(weights))[number])

            return loss

        return [search(self.choices, loss_of(number)) for number in range(len(self))]

    def features(self) -> Tensor:
        """[N, P, H]."""
        return torch.cat([features_of(self.model, tokens[:, : _cut(tokens)]) for tokens, _ in self.windows])

    @torch.no_grad()
    def _measure(self, tokens: Tensor, targets: Tensor) -> Tensor:
        device, cut = next(self.model.parameters()).device, _cut(tokens)
        logits = self.model(tokens.to(device))[:, cut - 1 :].float()
        nats = F.cross_entropy(logits.flatten(0, 1), targets[:, cut - 1 :].to(device).flatten(), reduction="none")
        return nats.view(len(tokens), -1).mean(1).cpu()


def _cut(tokens: Tensor) -> int:
    """How long the prompt is."""
    return max(1, min(tokens.shape[1] // 2, PROMPT_TOKENS))
