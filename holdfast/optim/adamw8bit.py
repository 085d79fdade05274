"""AdamW with block-wise 8-bit moments: 2.03 bytes of state per parameter instead of 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from holdfast.errors import ConfigurationError
from holdfast.optim.config import rule_breaks
from holdfast.optim.quantize import SIGNED, UNSIGNED
from holdfast.optim.state8bit import MOMENTS, ParamState, blockwise, copy_state, is_8bit, new_state, state_problems
from holdfast.optim.update import adamw8bit_update, adamw_update, coefficients

__all__ = ["AdamW8bit"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMAT = ("block_size", "codebooks")
"""Options that say how stored bytes become numbers; a state dict must agree on them."""

_CPU_CHUNK, _DEVICE_CHUNK = 1 << 17, 1 << 23
"""Elements updated at a time. Bounds the fp32 temporaries and, on a CPU, keeps them in its cache. Multiples of every
block size, so that chunks change no bits."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are kept in 8 bits per element, with one fp32 scale per ``block_size`` elements.

    Arithmetic is fp32 whatever the dtype of the parameters (float32, bfloat16 or float16). Weight decay is
    decoupled and applied before the update; ``eps`` is added to the root of the bias-corrected second moment; the
    step uses the exact new moments, which are quantised afterwards. Tensors with fewer than ``min_8bit_size``
    elements keep 32-bit moments and then agree with ``torch.optim.AdamW`` to a few units in the last place
    (operations are rounded one by one so that all machines agree on every bit; see ``holdfast.optim.update``).

    A gradient element that is NaN, infinite or above 2^63 is skipped: its parameter and moments stay as they are.
    ``nonzero_second_moment`` keeps positive second moments from rounding to 0. Every option can be set per
    parameter group; ``block_size`` and the codebooks' names are recorded there and in the state dict.

    Raises: ConfigurationError with all problems of a parameter group; from ``step`` for a sparse gradient, before
    anything has changed; from ``load_state_dict`` for a state dict that does not fit.

    Source: arXiv 2110.02861 (8-bit optimizers); arXiv 1711.05101 (decoupled weight decay).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        nonzero_second_moment: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "block_size": block_size,
            "min_8bit_size": min_8bit_size,
            "nonzero_second_moment": nonzero_second_moment,
            "codebooks": (SIGNED, UNSIGNED),
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take another group of parameters, or none of it when an option or a parameter is unfit."""
        super().add_param_group(param_group)
        problems = _group_problems(self.param_groups[-1], len(self.param_groups) - 1)
        if problems:
            self.param_groups.pop()
            raise ConfigurationError(problems)

    def ensure_state(self) -> None:
        """Allocate the state of every parameter with ``requires_grad`` that has none yet.

        Afterwards the state's tensors keep their addresses; ``step`` writes into them.
        """
        for param, group, _ in self._parameters():
            if param.requires_grad:
                self._state_of(param, group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._refuse_sparse_gradients()
            for param, group, _ in self._parameters():
                if param.grad is not None:
                    _update(param, param.grad, self._state_of(param, group), group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Become the optimizer that wrote ``state_dict``; codes stay codes, and nothing of it is shared.

        torch's own method casts every state tensor to its parameter's dtype, codes included, so it only gets the
        groups. Hooks registered on this optimizer therefore see a state dict without state.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        problems = _format_problems(self.param_groups, state_dict["param_groups"])
        targets = {} if problems else dict(zip(saved, self._parameters(), strict=True))
        for index, state in state_dict["state"].items() if targets else ():
            problems += _load_problems(state, targets.get(index), index)
        if problems:
            raise ConfigurationError(problems)
        super().load_state_dict({**state_dict, "state": {}})
        for index, state in state_dict["state"].items():
            param = targets[index][0]
            self.state[param] = copy_state(state, param.device)

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any], str]]:
        """Every parameter with its group and a name for messages."""
        for number, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                yield param, group, f"parameter {position} of group {number}"

    def _state_of(self, param: Tensor, group: Mapping[str, Any]) -> ParamState:
        if not self.state.get(param):
            self.state[param] = new_state(param, group)
        state: ParamState = self.state[param]
        return state

    def _refuse_sparse_gradients(self) -> None:
        problems = [
            f"{name} has a gradient of layout {param.grad.layout}; AdamW8bit needs dense ones "
            "(for an embedding: sparse=False)"
            for param, _, name in self._parameters()
            if param.grad is not None and param.grad.layout != torch.strided
        ]
        if problems:
            raise ConfigurationError(problems)


def _update(param: Tensor, grad: Tensor, state: ParamState, group: Mapping[str, Any]) -> None:
    """One update of one parameter, chunk by chunk in row-major order."""
    state["step"] += 1
    by = coefficients(group, state["step"])
    flat_param, flat_grad = param.reshape(-1), grad.reshape(-1)  # views, unless the strides are unusual
    for start, stop in _chunks(param):
        part, part_grad = flat_param[start:stop].float(), flat_grad[start:stop].float()
        if is_8bit(state):
            adamw8bit_update(part, part_grad, blockwise(state, group).part(start, stop), by)
        else:
            first, second = (state[moment].view(-1)[start:stop] for moment in MOMENTS)
            adamw_update(part, part_grad, first, second, by)
        if part.dtype != param.dtype:  # else part is a view of the parameter
            flat_param[start:stop].copy_(part)
    if not param.is_contiguous():
        param.copy_(flat_param.view(param.shape))


def _chunks(param: Tensor) -> Iterator[tuple[int, int]]:
    size = _CPU_CHUNK if param.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, param.numel(), size):
        yield start, min(start + size, param.numel())


def _group_problems(group: Mapping[str, Any], number: int) -> list[str]:
    problems = rule_breaks(group)
    if tuple(group["codebooks"]) != (SIGNED, UNSIGNED):
        problems.append(f"codebooks={group['codebooks']!r} must be {(SIGNED, UNSIGNED)!r}")
    problems += [
        f"parameter {position} of group {number} is {param.dtype}, {param.layout}; "
        "AdamW8bit updates dense float32, bfloat16 and float16 parameters, leave others to torch.optim"
        for position, param in enumerate(group["params"])
        if param.dtype not in _DTYPES or param.layout != torch.strided
    ]
    return problems


def _format_problems(groups: list[dict[str, Any]], saved: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why saved parameter groups do not fit the live ones."""
    saved = list(saved)
    sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    if sizes != saved_sizes:
        return [f"the state dict has groups of {saved_sizes} parameters, this optimizer has groups of {sizes}"]
    if any(key not in theirs for theirs in saved for key in _FORMAT):
        return [f"the state dict's groups do not record {' and '.join(_FORMAT)}: AdamW8bit did not write it"]
    return [
        f"group {number} of the state dict has {key}={_plain(theirs[key])!r}, this optimizer has "
        f"{_plain(ours[key])!r}; build AdamW8bit with the state dict's value, or start with fresh moments"
        for number, (ours, theirs) in enumerate(zip(groups, saved, strict=True))
        for key in _FORMAT
        if _plain(ours[key]) != _plain(theirs[key])
    ]


def _plain(value: object) -> object:
    """Tuples and lists alike, because a state dict may have gone through JSON."""
    return list(value) if isinstance(value, (tuple, list)) else value


def _load_problems(
    state: Mapping[str, Any], target: tuple[Tensor, dict[str, Any], str] | None, index: object
) -> list[str]:
    if target is None:
        return [f"the state dict holds state for parameter {index!r}, which is in none of its groups"]
    param, group, name = target
    return state_problems(state, param, group["block_size"], name)
