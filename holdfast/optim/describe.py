"""What an optimizer keeps for a parameter, in words that need no knowledge of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from holdfast.optim.optimizer import BlockwiseOptimizer
from holdfast.optim.quantize import codebook_name
from holdfast.optim.state8bit import CODES
from holdfast.types import Quantization

__all__ = ["StateTensor", "describe_state", "load_scalars", "scalars"]


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a parameter's optimizer state, by reference: writing into it changes the state."""

    key: str
    """Its name in the state, for example ``exp_avg_codes``."""
    tensor: Tensor
    quantization: Quantization | None
    """How its bytes become numbers, None for plain numbers. ``absmax`` is the key of a sibling."""


def describe_state(optimizer: torch.optim.Optimizer, param: Tensor) -> list[StateTensor]:
    """The state tensors of ``param``, in the order they are kept; empty for a frozen parameter without state.

    Step counts are in ``scalars``.

    Raises: ConfigurationError for a trainable parameter without state, which ``ensure_state`` allocates, and for an
    optimizer that is not of this package.
    """
    state = _state(optimizer, param)
    quantized = _quantizations(optimizer, param)
    return [StateTensor(key, tensor, quantized.get(key)) for key, tensor in state.items() if key != "step"]


def scalars(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, int]:
    """What the state of ``param`` holds besides tensors, as JSON values: ``{"step": 7}``.

    Raises: ConfigurationError as ``describe_state``.
    """
    state = _state(optimizer, param)
    return {"step": int(state["step"])} if state else {}


def load_scalars(optimizer: torch.optim.Optimizer, param: Tensor, values: Mapping[str, object]) -> None:
    """Put back what ``scalars`` returned, in place.

    Raises: ConfigurationError as ``describe_state``, and when ``values`` has other keys than ``scalars`` has.
    """
    state = _state(optimizer, param)
    have = scalars(optimizer, param)
    if set(values) != set(have):
        raise ConfigurationError(f"optimizer scalars {sorted(values)} do not fit; this state has {sorted(have)}")
    if state:
        state["step"] = int(cast(int, values["step"]))


def _state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any]:
    # .get, because indexing the defaultdict would leave an empty entry behind
    state: dict[str, Any] = optimizer.state.get(param) or {}
    if not state and param.requires_grad:
        raise ConfigurationError(
            f"a parameter of shape {list(param.shape)} has no optimizer state; "
            "call ensure_state(optimizer), with the optimizer that owns it"
        )
    return state


def _quantizations(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Quantization]:
    """How the codes among the state's tensors become numbers."""
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise ConfigurationError(f"{type(optimizer).__name__} is unknown here; use an optimizer of holdfast.optim")
    group = next(group for group in optimizer.param_groups if any(p is param for p in group["params"]))
    return {
        moment + CODES: Quantization(group["block_size"], codebook_name(signed), f"{moment}_absmax")
        for moment, signed in optimizer.rule(group).moments.items()
    }
