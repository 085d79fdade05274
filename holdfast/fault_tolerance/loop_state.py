"""The state of somebody else's loop: whatever has ``state_dict`` and ``load_state_dict``, and random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.manifest import Manifest
from holdfast.fault_tolerance.state_tree import Leaves, put_together, take_apart
from holdfast.types import RankState, SliceSpec, StateSlice

__all__ = ["LoopState", "Stateful"]

_RANDOM = "random"
_STEP, _PARTS = "step", "parts"
"""Names of the scalars of a version."""


class Stateful(Protocol):
    """A module, an optimizer, a scheduler, a scaler, or an object of the user's own."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class LoopState:
    """The parts by their names.

    What an optimizer owns (its parameters and its own state) changes in its ``step`` only, so these tensors are
    captured where they are. Everything else may change at any time, as the running averages of a normalization do in
    forward, and is copied at once.
    """

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self._parts = dict(parts)
        problems = list(_problems(self._parts))
        if problems:
            raise ConfigurationError(problems)
        self._slices: list[StateSlice] = []
        self._seen: dict[str, StateSlice] = {}
        self._copies: dict[str, StateSlice] = {}

    @property
    def optimizers(self) -> list[Optimizer]:
        return [part for part in self._parts.values() if isinstance(part, Optimizer)]

    def capture(self, step: int) -> RankState:
        """The state after ``step`` steps. Between this and the next update nothing may write to what optimizers own."""
        leaves: Leaves = {}
        told = {name: take_apart(part.state_dict(), name, leaves) for name, part in self._parts.items()}
        told[_RANDOM] = take_apart(_random_state(), _RANDOM, leaves)
        still = {tensor.data_ptr() for optimizer in self.optimizers for tensor in _owned(optimizer)}
        slices = [
            self._in_place(name, tensor) if _lies_still(tensor, still) else self._copy(name, tensor)
            for name, tensor in leaves.items()
        ]
        if len(slices) != len(self._slices) or any(a is not b for a, b in zip(slices, self._slices, strict=True)):
            self._slices = slices
        return RankState(self._slices, {_STEP: step, _PARTS: told})

    def adopt(self, manifest: Manifest, data: Bytes) -> int:
        """Load a verified version into the parts and the random generators; the step.

        Raises: ManifestMismatch when it was taken of something else.
        """
        told = cast(Mapping[str, object], manifest.scalars.get(_PARTS, {}))
        want, have = {*self._parts, _RANDOM}, set(told)
        if want != have:
            raise ManifestMismatch(f"it holds {sorted(have)}, this Snapshotter was given {sorted(self._parts)}")
        tensors = [_tensor(entry.spec, data[entry.offset : entry.offset + entry.length]) for entry in manifest.entries]
        for name, part in self._parts.items():
            try:
                part.load_state_dict(put_together(told[name], tensors))
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise ManifestMismatch(f"{name} does not take the state that is stored: {error}") from error
        _set_random_state(cast(dict[str, Any], put_together(told[_RANDOM], tensors)))
        return int(cast(int, manifest.scalars[_STEP]))

    def _in_place(self, name: str, tensor: Tensor) -> StateSlice:
        known, spec = self._seen.get(name), _spec(name, tensor)
        if known is None or known.spec != spec or known.tensor.data_ptr() != tensor.data_ptr():
            known = self._seen[name] = StateSlice(spec, tensor.view(-1))
        return known

    def _copy(self, name: str, tensor: Tensor) -> StateSlice:
        known, spec = self._copies.get(name), _spec(name, tensor)
        if known is not None and known.spec == spec and known.tensor.device == tensor.device:
            known.tensor.copy_(tensor.reshape(-1))
            return known
        copy = self._copies[name] = StateSlice(spec, tensor.reshape(-1).clone())
        return copy


def _spec(name: str, tensor: Tensor) -> SliceSpec:
    return SliceSpec(name, tuple(tensor.shape), 0, tensor.numel(), str(tensor.dtype).removeprefix("torch."))


def _lies_still(tensor: Tensor, still: set[int]) -> bool:
    return tensor.numel() > 0 and tensor.is_contiguous() and tensor.data_ptr() in still


def _problems(parts: Mapping[str, object]) -> Iterator[str]:
    if not parts:
        yield "a Snapshotter needs something to keep: Snapshotter(WHERE, model=model, optimizer=optimizer)"
    for name, part in parts.items():
        if not all(callable(getattr(part, method, None)) for method in ("state_dict", "load_state_dict")):
            yield f"{name}={type(part).__name__} must have state_dict and load_state_dict"
        if name == _RANDOM:
            yield f"{name} is the name of the random state, which is kept anyway; give the part another name"


def _owned(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _tensor(spec: SliceSpec, data: Bytes) -> Tensor:
    """A copy, because not everybody who loads a state dict makes one."""
    flat = torch.from_numpy(data.copy())
    return flat.view(getattr(torch, spec.dtype)).view(spec.shape)


# -- random numbers ---------------------------------------------------------------------------------------------------


def _random_state() -> dict[str, object]:
    version, words, gauss = random.getstate()
    state: dict[str, object] = {
        "python": [version, np.array(words, dtype=np.uint32), gauss],
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(map(int, words)), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    cuda: Sequence[Tensor] = state.get("cuda", ())
    if len(cuda) == (torch.cuda.device_count() if cuda else 0):
        _each(torch.cuda.set_rng_state, cuda)


def _each(put: Callable[[Tensor, int], None], states: Sequence[Tensor]) -> None:
    for device, state in enumerate(states):
        put(state, device)
