"""The best weights that an evaluation has seen, kept as part of what a rank must not lose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from holdfast.trainer.state import StateOwner
from holdfast.types import StateSlice

__all__ = ["BestState", "EndRules"]

_MASTER, _BEST = "/master", "/best"


class _Rules(Protocol):
    """Options of a task that say when it ends."""

    spike: float
    patience: int


@dataclass(frozen=True, slots=True)
class EndRules:
    """When evaluations end the training."""

    spike: float = math.inf
    """Bits per byte above the best; a loss that is no number is above it anyway."""
    patience: int = 0
    """Evaluations in a row without improvement; 0 waits for ever."""

    @classmethod
    def of(cls, options: _Rules) -> EndRules:
        """From options where 0 turns the spike off."""
        return cls(options.spike or math.inf, options.patience)


class BestState:
    """A second tensor beside each master weight of this rank, ``<parameter>/best``, and what was measured with it.

    They are slices of the state like all others, so that snapshots, parity, checkpoints and other numbers of ranks
    treat them alike, and a version holds what was best until its step. Every rank is told the same bits per byte and
    so comes to the same verdict, without a word.
    """

    def __init__(self, owner: StateOwner, rules: EndRules) -> None:
        self._owner, self._rules = owner, rules
        self._masters = [held for held in owner.slices() if held.spec.name.endswith(_MASTER)]
        self.slices = [_twin(held) for held in self._masters]
        self.step = -1
        """Of the state that is kept; -1 before the first evaluation."""
        self.bits = math.inf
        """Bits per byte of it."""
        self.ended = ""
        """Why training is over; empty if it is not."""
        self._worse = 0

    @torch.no_grad()
    def judge(self, step: int, bits: float) -> None:
        """Keep the live weights if they are the best so far; else see whether that ends the training.

        Only while the state may change: a copy of the last version may still be under way otherwise.
        """
        if bits < self.bits:
            for best, master in zip(self.slices, self._masters, strict=True):
                best.tensor.copy_(master.tensor)
            self.step, self.bits, self._worse = step, bits, 0
            return
        self._worse += 1
        self.ended = self._verdict(step, bits)

    def _verdict(self, step: int, bits: float) -> str:
        best = f"the best, {self.bits:.3f} at step {self.step}"
        if not bits <= self.bits + self._rules.spike:
            return f"step {step} with {bits:.3f} bits per byte was more than {self._rules.spike:g} above {best}"
        if self._rules.patience and self._worse >= self._rules.patience:
            return f"{self._worse} evaluations until step {step} were no better than {best}"
        return ""

    @torch.no_grad()
    def put_back(self) -> None:
        """Collective. Make the best weights, if there are some, those that live."""
        if self.step < 0:
            return
        for best, master in zip(self.slices, self._masters, strict=True):
            master.tensor.copy_(best.tensor)
        self._owner.refresh()

    def scalars(self) -> dict[str, object]:
        """JSON values, the same on every rank."""
        found = {"step": self.step, "worse": self._worse, "ended": self.ended}
        return {**found, "bits": self.bits} if self.step >= 0 else found

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Put back what :meth:`scalars` returned; the slices have been written before."""
        self.step, self._worse, self.ended = scalars["step"], scalars["worse"], scalars["ended"]
        self.bits = scalars.get("bits", math.inf)


def _twin(master: StateSlice) -> StateSlice:
    name = master.spec.name.removesuffix(_MASTER) + _BEST
    return StateSlice(replace(master.spec, name=name), torch.zeros_like(master.tensor))
