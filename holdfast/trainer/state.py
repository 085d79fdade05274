"""What a rank must not lose between two steps, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from holdfast.types import RankState, SliceSpec, StateSlice

__all__ = ["Best", "StateOwner", "StateView", "TrainState"]


class StateOwner(Protocol):
    """Whoever holds the sharded tensors. Addresses are stable; ``refresh`` is collective."""

    def slices(self) -> Sequence[StateSlice]: ...

    def scalars(self) -> Mapping[str, object]: ...

    def load_scalars(self, scalars: Mapping[str, object]) -> None: ...

    def refresh(self) -> None: ...


class Best(Protocol):
    """What evaluations have kept; see :class:`holdfast.trainer.best.BestState`."""

    @property
    def slices(self) -> Sequence[StateSlice]: ...

    @property
    def ended(self) -> str: ...

    def scalars(self) -> Mapping[str, object]: ...

    def load_scalars(self, scalars: Mapping[str, Any]) -> None: ...


@dataclass(slots=True)
class TrainState:
    """Progress and random state. The data position is not stored: it is a function of ``step``."""

    step: int = 0
    """Optimizer steps finished."""
    tokens: int = 0
    """Tokens trained on, all ranks together."""

    left_out: set[int] = field(default_factory=set)
    """Steps, by how many were finished before, whose update never happens because it was not finite."""

    def advance(self, tokens: int) -> None:
        self.step += 1
        self.tokens += tokens


class StateView:
    """The state of one rank as named slices: the owner's tensors, live, the best ones if such are kept, and the random
    state, copied by value."""

    def __init__(self, train: TrainState, owner: StateOwner, *, rank: int, best: Best | None = None) -> None:
        self.train, self._owner, self._best = train, owner, best
        self._random = [_RandomState(f"rng/rank{rank}/{device}", device) for device in _devices()]
        self._slices = [*owner.slices(), *(best.slices if best else ()), *(r.slice for r in self._random)]

    @property
    def is_over(self) -> bool:
        """Evaluations have ended the training."""
        return self._best is not None and bool(self._best.ended)

    def capture(self) -> RankState:
        """The state as it is now. The tensors stay live: copy them before the next update."""
        self.mark()
        return self.marked()

    def mark(self) -> None:
        """A step begins here: what it draws from the random state can be drawn again."""
        for random in self._random:
            random.read()

    def marked(self) -> RankState:
        """The state as it was when it was marked, anywhere in the step up to the update."""
        return RankState(self._slices, self._scalars())

    def _scalars(self) -> dict[str, object]:
        train = self.train
        scalars = {"step": train.step, "tokens": train.tokens, "owner": dict(self._owner.scalars())}
        if self._best is not None:
            scalars["best"] = dict(self._best.scalars())
        return {**scalars, "left_out": sorted(train.left_out)} if train.left_out else scalars

    def adopt(self, scalars: Mapping[str, object]) -> None:
        """Collective. Make the slices that were just written back, and these scalars, the training state."""
        self.train.step, self.train.tokens = cast(int, scalars["step"]), cast(int, scalars["tokens"])
        self.train.left_out |= set(cast(Sequence[int], scalars.get("left_out", ())))
        self._owner.load_scalars(cast(Mapping[str, object], scalars["owner"]))
        if self._best is not None:
            self._best.load_scalars(cast(Mapping[str, Any], scalars["best"]))
        for random in self._random:
            random.write()
        self._owner.refresh()


class _RandomState:
    """A device's generator state in a tensor whose address never changes."""

    def __init__(self, name: str, device: str) -> None:
        self._device = device
        self._held = self._current().clone()
        self.slice = StateSlice(SliceSpec(name, (self._held.numel(),), 0, self._held.numel(), "uint8"), self._held)

    def _current(self) -> Tensor:
        return torch.get_rng_state() if self._device == "cpu" else torch.cuda.get_rng_state()

    def read(self) -> None:
        self._held.copy_(self._current())

    def write(self) -> None:
        if self._device == "cpu":
            torch.set_rng_state(self._held)
        else:
            torch.cuda.set_rng_state(self._held)


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
