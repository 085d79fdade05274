"""Other people's modules in the shape in which the engines take a model: tokens -> logits, or the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import InvariantViolation

__all__ = ["Wrapped", "answers", "fill", "seeded"]

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_KEPT = "inv_freq"
"""Ends the names of rotary frequencies. Rounded to bf16 they would turn by other angles."""


class Wrapped(nn.Module):
    """``inner`` under another ``forward``: parameters, buffers and modules are its own, and keep their names.

    ``call`` takes ``inner`` and tokens and gives logits [B, T, V], and takes targets besides if ``gives_loss``; then it
    gives the mean loss, a scalar.
    """

    def __init__(self, inner: nn.Module, call: Callable[..., Tensor], *, gives_loss: bool = False) -> None:
        super().__init__()
        self.__dict__.update({name: inner.__dict__[name] for name in _SHARED})
        self._inner = (inner,)  # a tuple, or it would be a module of its own and stand before every name
        self._call, self._gives_loss = call, gives_loss

    @property
    def inner(self) -> nn.Module:
        """What is wrapped."""
        return self._inner[0]

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with targets, int64 [B, T], the mean negative log-likelihood, nats, an fp32 scalar."""
        if targets_BT is None:
            return self._call(self.inner, tokens_BT)
        if self._gives_loss:
            return self._call(self.inner, tokens_BT, targets_BT).float()
        logits_BTV = self._call(self.inner, tokens_BT)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    def train(self, mode: bool = True) -> Wrapped:
        self.inner.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Wrapped:
        kept = [(name, buffer) for name, buffer in self.named_buffers() if name.endswith(_KEPT)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch: untyped
        for name, buffer in kept:
            owner, _, last = name.rpartition(".")
            module = self.get_submodule(owner)
            module._buffers[last] = buffer.to(self.get_buffer(name).device)
        return self


def answers(model: nn.Module) -> bool:
    """Whether a model gives logits when it is called without targets."""
    if not isinstance(model, Wrapped):
        return True
    targets = inspect.signature(model.inner.forward).parameters.get("targets")
    return targets is None or targets.default is not inspect.Parameter.empty


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's default generator begins at ``seed``; outside, nothing has been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write ``weights``, whole and by the names of parameters, into ``model``: a tied table is there once."""
    own: dict[str, Any] = {name: own for name, own in model.named_parameters() if own.requires_grad}
    if own.keys() != weights.keys():
        raise InvariantViolation(f"weights of another model: {sorted(own.keys() ^ weights.keys())[:5]}")
    for name, tensor in weights.items():
        own[name].copy_(tensor)
