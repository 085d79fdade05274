"""What an optimizer keeps for a parameter, in words that need no knowledge of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from holdfast.optim.quantize import codebook_name
from holdfast.optim.state8bit import MOMENTS
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

    Works for AdamW8bit and ``torch.optim.AdamW``. Step counts are in ``scalars``.

    Raises: ConfigurationError for a trainable parameter without state; ``ensure_state`` allocates it.
    """
    block_sizes = {id(p): group.get("block_size") for group in optimizer.param_groups for p in group["params"]}
    return [
        StateTensor(key, tensor, _quantization(key, block_sizes.get(id(param))))
        for key, tensor in _state(optimizer, param).items()
        if key != "step"
    ]


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
    if not state:
        return
    step = int(cast(int, values["step"]))
    if isinstance(state["step"], Tensor):
        state["step"].fill_(step)
    else:
        state["step"] = step


def _state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any]:
    # .get, because indexing the defaultdict would leave an empty entry behind
    state: dict[str, Any] = optimizer.state.get(param) or {}
    if not state and param.requires_grad:
        raise ConfigurationError(
            f"a parameter of shape {list(param.shape)} has no optimizer state; "
            "call ensure_state(optimizer), with the optimizer that owns it"
        )
    return state


def _quantization(key: str, block_size: int | None) -> Quantization | None:
    moment = key.removesuffix("_codes")
    if moment == key or block_size is None:
        return None
    return Quantization(block_size, codebook_name(MOMENTS[moment]), f"{moment}_absmax")
