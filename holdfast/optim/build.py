"""Configuration -> optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from holdfast.errors import ConfigurationError
from holdfast.optim import family
from holdfast.optim.config import OptimConfig, check, constructor_options
from holdfast.optim.embedding import StableEmbedding
from holdfast.optim.optimizer import BlockwiseOptimizer

__all__ = ["build_optimizer", "ensure_state", "parameter_groups"]

_CLASSES = {name.lower(): getattr(family, name) for name in family.__all__}


def build_optimizer(config: OptimConfig, params: ParamsT) -> BlockwiseOptimizer:
    """The optimizer that ``config`` names, over parameters or groups of them.

    Raises: ConfigurationError with every rule that the options break.
    """
    problems = check(config)
    if problems:
        raise ConfigurationError(problems)
    optimizer: BlockwiseOptimizer = _CLASSES[config.name.value](params, **constructor_options(config))
    return optimizer


def parameter_groups(
    parameters: nn.Module | Iterable[tuple[str, Tensor]], config: OptimConfig, keep_32bit: Iterable[Tensor] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices and embeddings decay, vectors and scalars do not; and in each of the
    two, those with 8-bit moments apart from those with 32-bit ones.

    ``parameters`` are a model or its ``named_parameters()``. The second division decides about 8 bits once and for all
    by a parameter's own size, because ZeRO makes one flat tensor of each group and shows the optimizer a share of it.
    Those in ``keep_32bit`` and the weights of a model's ``StableEmbedding``s keep 32-bit moments. Order is kept and a
    group without parameters is left out. Call it before anything flattens or shards the parameters.

    Raises: ConfigurationError when no parameter is trainable.
    """
    exact = {id(param) for param in keep_32bit}
    if isinstance(parameters, nn.Module):
        exact |= {id(part.weight) for part in parameters.modules() if isinstance(part, StableEmbedding)}
        parameters = parameters.named_parameters()
    trainable = [param for _, param in parameters if param.requires_grad]
    if not trainable:
        raise ConfigurationError("no parameter requires a gradient; unfreeze at least one")
    bits = {id(p): _bits(p, config, id(p) in exact) for p in trainable}
    groups = [
        {
            "params": [p for p in trainable if (p.ndim >= 2, bits[id(p)]) == (decays, width)],
            "weight_decay": config.weight_decay if decays else 0.0,
            "bits": width,
            "min_8bit_size": 0,
        }
        for decays in (True, False)
        for width in (8, 32)
    ]
    return [group for group in groups if group["params"]]


def _bits(param: Tensor, config: OptimConfig, is_exact: bool) -> int:
    is_8bit = config.name.is_8bit and not is_exact and param.numel() >= config.min_8bit_size
    return 8 if is_8bit else 32


def ensure_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate all state now, as the first step would, so that it can be captured or restored before it.

    Raises: ConfigurationError for an optimizer that is not of this package.
    """
    if not isinstance(optimizer, BlockwiseOptimizer):
        raise ConfigurationError(f"{type(optimizer).__name__} is unknown here; use an optimizer of holdfast.optim")
    optimizer.ensure_state()
