"""What an optimizer keeps per parameter: plain tensors and a step count.

A moment ``M`` is kept in 32 bits as ``M``, fp32 and shaped like the parameter, or in 8 bits as ``M_codes``, uint8 and
shaped like the parameter, with ``M_absmax``, fp32 with one entry per block of the row-major flat index, shaped like
``sharded.block_grid``: ``[d0, d1 / block_size]`` for a matrix whose rows are whole blocks, flat for one whose are not.
``step`` is a Python int, the number of updates made. Percentile clipping adds ``grad_norms``, fp32 [100]. All tensors
are contiguous and keep their addresses. State of a ``DTensor`` consists of them: moments and codes are placed like the
parameter, and so is absmax where shards hold whole blocks; all else is the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.optim.quantize import zero_code
from holdfast.optim.sharded import Per, block_grid, local, new_like, placed_like

__all__ = [
    "CODES",
    "HISTORY",
    "ParamState",
    "copy_state",
    "is_8bit",
    "moment_tensors",
    "new_state",
    "option_problems",
    "state_names",
    "state_problems",
]

ParamState = dict[str, Any]
"""``step`` is an int, everything else a tensor."""

CODES, _ABSMAX = "_codes", "_absmax"
"""Suffixes of the two tensors of an 8-bit moment."""
HISTORY = 100
"""Gradient norms that percentile clipping remembers."""

_Layout = dict[str, tuple[torch.dtype, tuple[int, ...], int, Per]]
"""Key -> dtype, shape, the value that stands for zero, and what each number belongs to."""


def is_8bit(state: Mapping[str, Any]) -> bool:
    """Whether these moments are codes. Decided when the state was made, so that a run never changes its mind."""
    return any(key.endswith(CODES) for key in state)


def new_state(param: Tensor, moments: Mapping[str, bool], group: Mapping[str, Any]) -> ParamState:
    """Zero moments on the parameter's device, in the precision its size and group ask for."""
    eight_bit = group["bits"] == 8 and param.numel() >= group["min_8bit_size"]
    state: ParamState = {"step": 0}
    for key, (dtype, shape, zero, per) in _layout(param, moments, eight_bit, group).items():
        state[key] = new_like(param, per, shape, dtype, zero, group["block_size"])
    return state


def state_names(state: Mapping[str, Any], moments: Sequence[str]) -> tuple[str, ...]:
    """The keys of what an engine writes: the moments in their order, then their absmax."""
    if not is_8bit(state):
        return tuple(moments)
    return (*(name + CODES for name in moments), *(name + _ABSMAX for name in moments))


def moment_tensors(state: Mapping[str, Any], moments: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """What this rank holds of the moments and of their absmax, flat; no absmax for 32-bit moments."""
    flat = [local(state[name]).view(-1) for name in state_names(state, moments)]
    return flat[: len(moments)], flat[len(moments) :]


def state_problems(
    state: Mapping[str, Any], param: Tensor, moments: Mapping[str, bool], group: Mapping[str, Any], name: str
) -> list[str]:
    """Why a loaded state does not fit the parameter called ``name``; empty when it does.

    Absmax may be flat, as an optimizer of one flat parameter, of an earlier version or of another package has it.
    """
    layout = _layout(param, moments, is_8bit(state), group)
    if set(state) != {"step", *layout}:
        return [_words_of_keys(state, layout, name)]
    return _shape_problems(state, param, layout, name)


def option_problems(
    state: Mapping[str, Any], param: Tensor, moments: Mapping[str, bool], group: Mapping[str, Any], name: str
) -> list[str]:
    """Why the state that is there will not do for a step, say because an option of the group was changed since."""
    layout = _layout(param, moments, is_8bit(state), group)
    if not set(state) >= {"step", *layout}:
        return [_words_of_keys(state, layout, name)]
    return _shape_problems(state, param, layout, name)


def copy_state(
    state: Mapping[str, Any], param: Tensor, moments: Mapping[str, bool], group: Mapping[str, Any]
) -> ParamState:
    """Collective where a ``DTensor`` among it has to change its placement. Contiguous copies of a state that fits
    ``param``, on its device and sharded as its state has to be; nothing is cast.
    """
    copied: ParamState = {"step": int(state["step"])}
    layout = _layout(param, moments, is_8bit(state), group)
    for key in (key for key in state if key != "step"):
        _, shape, _, per = layout[key]
        value = state[key] if tuple(state[key].shape) == shape else state[key].reshape(shape)
        copied[key] = placed_like(value, param, per, group["block_size"])
    return copied


def _layout(param: Tensor, moments: Mapping[str, bool], eight_bit: bool, group: Mapping[str, Any]) -> _Layout:
    shape, blocks = tuple(param.shape), block_grid(param.shape, group["block_size"])
    layout: _Layout = {}
    for moment, signed in moments.items():
        if eight_bit:
            layout[moment + CODES] = (torch.uint8, shape, zero_code(signed), Per.ELEMENT)
            layout[moment + _ABSMAX] = (torch.float32, blocks, 0, Per.BLOCK)
        else:
            layout[moment] = (torch.float32, shape, 0, Per.ELEMENT)
    if group["percentile_clipping"] < HISTORY:
        layout["grad_norms"] = (torch.float32, (HISTORY,), 0, Per.PARAMETER)
    return layout


def _words_of_keys(state: Mapping[str, Any], layout: _Layout, name: str) -> str:
    keys, want = ", ".join(sorted(map(str, state))), ", ".join(sorted(["step", *layout]))
    return f"the state of {name} has the keys {keys}; this optimizer needs {want}"


def _shape_problems(state: Mapping[str, Any], param: Tensor, layout: _Layout, name: str) -> list[str]:
    return [
        f"{key} of {name} is {_words(state[key])}; a parameter of shape {list(param.shape)} needs {_kind(dtype, shape)}"
        for key, (dtype, shape, _, per) in layout.items()
        if _words(state[key]) not in (_kind(dtype, shape), _kind(dtype, _flat(shape) if per is Per.BLOCK else shape))
    ]


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (math.prod(shape),)


def _words(value: object) -> str:
    return _kind(value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
