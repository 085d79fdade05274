"""Configuration -> optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from holdfast.errors import ConfigurationError
from holdfast.optim.adamw8bit import AdamW8bit
from holdfast.optim.config import OptimConfig, OptimName, check

__all__ = ["build_optimizer", "ensure_state", "parameter_groups"]


def build_optimizer(config: OptimConfig, params: ParamsT) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over parameters or groups of them.

    ADAMW is ``torch.optim.AdamW`` itself: who asks for the reference gets the reference.

    Raises: ConfigurationError with every rule that the options break.
    """
    problems = check(config)
    if problems:
        raise ConfigurationError(problems)
    first, second = config.betas
    if config.name is OptimName.ADAMW:
        return torch.optim.AdamW(
            params, lr=config.lr, betas=(first, second), eps=config.eps, weight_decay=config.weight_decay
        )
    return AdamW8bit(
        params,
        lr=config.lr,
        betas=(first, second),
        eps=config.eps,
        weight_decay=config.weight_decay,
        block_size=config.block_size,
        min_8bit_size=config.min_8bit_size,
    )


def parameter_groups(named_parameters: Iterable[tuple[str, Tensor]], config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices and embeddings decay, vectors and scalars do not; and in each of the
    two, large parameters apart from small ones.

    The second division decides about 8 bits once and for all by a parameter's own size: ZeRO makes one flat tensor
    of each group and shows the optimizer a share of it. Order is kept and a group without parameters is left out.
    Call it before anything flattens or shards the parameters.

    Raises: ConfigurationError when no parameter is trainable.
    """
    trainable = [param for _, param in named_parameters if param.requires_grad]
    if not trainable:
        raise ConfigurationError("no parameter requires a gradient; unfreeze at least one")
    groups = [
        {
            "params": [p for p in trainable if (p.ndim >= 2, p.numel() >= config.min_8bit_size) == (decays, is_large)],
            "weight_decay": config.weight_decay if decays else 0.0,
            "min_8bit_size": 0 if is_large else _NEVER,
        }
        for decays in (True, False)
        for is_large in (True, False)
    ]
    return [group for group in groups if group["params"]]


_NEVER = 2**62
"""More elements than any tensor has."""


def ensure_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate all state now, as the first step would, so that it can be captured or restored before it.

    Raises: ConfigurationError for an optimizer that ``build_optimizer`` does not make.
    """
    if isinstance(optimizer, AdamW8bit):
        optimizer.ensure_state()
    elif isinstance(optimizer, torch.optim.AdamW):
        _ensure_torch_state(optimizer)
    else:
        raise ConfigurationError(f"optimizer {type(optimizer).__name__} is unknown; use AdamW8bit or torch.optim.AdamW")


def _ensure_torch_state(optimizer: torch.optim.AdamW) -> None:
    """What ``torch.optim.AdamW`` itself puts there when it first meets a gradient."""
    for group in optimizer.param_groups:
        moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        on_device = group["capturable"] or group["fused"]
        for param in (p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)):
            step = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
            zeros = {key: torch.zeros_like(param, memory_format=torch.preserve_format) for key in moments}
            optimizer.state[param] = {"step": step, **zeros}
