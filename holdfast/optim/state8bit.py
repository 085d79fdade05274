"""What AdamW8bit keeps per parameter: plain tensors and a step count.

===================  ===============================================  =========================================
keys                 8-bit, from ``min_8bit_size`` elements           32-bit, below
===================  ===============================================  =========================================
``step``             Python int: updates made                         the same
first moment         ``exp_avg_codes``, ``exp_avg_absmax``            ``exp_avg``
second moment        ``exp_avg_sq_codes``, ``exp_avg_sq_absmax``      ``exp_avg_sq``
===================  ===============================================  =========================================

Codes are uint8 and shaped like the parameter, absmax is fp32 with one entry per block of the row-major flat
index, 32-bit moments are fp32 and shaped like the parameter. All are contiguous and keep their addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.optim.quantize import block_count, zero_code
from holdfast.optim.update import BlockwiseMoments

__all__ = ["MOMENTS", "ParamState", "blockwise", "copy_state", "is_8bit", "new_state", "state_problems"]

ParamState = dict[str, Any]
"""``step`` is an int, everything else a tensor."""

MOMENTS: Mapping[str, bool] = {"exp_avg": True, "exp_avg_sq": False}
"""Moment -> whether it is signed."""

_Layout = dict[str, tuple[torch.dtype, tuple[int, ...], int]]
"""Key -> dtype, shape and the value that stands for zero."""


def is_8bit(state: Mapping[str, Any]) -> bool:
    """Whether these moments are codes. Decided when the state was made, so that a run never changes its mind."""
    return "exp_avg_codes" in state


def new_state(param: Tensor, group: Mapping[str, Any]) -> ParamState:
    """Zero moments on the parameter's device, in the precision its size and group ask for."""
    layout = _layout(param, param.numel() >= group["min_8bit_size"], group["block_size"])
    state: ParamState = {"step": 0}
    for key, (dtype, shape, zero) in layout.items():
        state[key] = torch.full(shape, zero, dtype=dtype, device=param.device)
    return state


def blockwise(state: ParamState, group: Mapping[str, Any]) -> BlockwiseMoments:
    """The 8-bit moments as flat views of the state's tensors."""
    return BlockwiseMoments(
        state["exp_avg_codes"].view(-1),
        state["exp_avg_absmax"],
        state["exp_avg_sq_codes"].view(-1),
        state["exp_avg_sq_absmax"],
        group["block_size"],
        group["nonzero_second_moment"],
    )


def state_problems(state: Mapping[str, Any], param: Tensor, block_size: int, name: str) -> list[str]:
    """Why a loaded state does not fit the parameter called ``name``; empty when it does."""
    layout = _layout(param, is_8bit(state), block_size)
    if set(state) != {"step", *layout}:
        keys, want = ", ".join(sorted(map(str, state))), ", ".join(sorted(["step", *layout]))
        return [f"the state of {name} has the keys {keys}; AdamW8bit needs {want}"]
    return [
        f"{key} of {name} is {_words(state[key])}; a parameter of shape {list(param.shape)} needs {_kind(dtype, shape)}"
        for key, (dtype, shape, _) in layout.items()
        if _words(state[key]) != _kind(dtype, shape)
    ]


def copy_state(state: Mapping[str, Any], device: torch.device) -> ParamState:
    """Contiguous copies on ``device``; nothing is cast."""
    copied: ParamState = {
        key: value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        for key, value in state.items()
        if key != "step"
    }
    return {"step": int(state["step"]), **copied}


def _layout(param: Tensor, eight_bit: bool, block_size: int) -> _Layout:
    shape, blocks = tuple(param.shape), block_count(param.numel(), block_size)
    if not eight_bit:
        return dict.fromkeys(MOMENTS, (torch.float32, shape, 0))
    layout: _Layout = {}
    for moment, signed in MOMENTS.items():
        layout[f"{moment}_codes"] = (torch.uint8, shape, zero_code(signed))
        layout[f"{moment}_absmax"] = (torch.float32, (blocks,), 0)
    return layout


def _words(value: object) -> str:
    return _kind(value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
