"""Optimizers with block-wise 8-bit state, and their 32-bit forms. Need torch and nothing else::

    from holdfast.optim import AdamW8bit

Names are imported when they are first used, so that a process that only reads the options never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.optim.build import build_optimizer, ensure_state, parameter_groups
    from holdfast.optim.config import OptimConfig, OptimName
    from holdfast.optim.describe import StateTensor, describe_state, load_scalars, scalars
    from holdfast.optim.embedding import StableEmbedding
    from holdfast.optim.family import (
        LAMB,
        LARS,
        SGD,
        Adagrad,
        Adagrad8bit,
        Adam,
        Adam8bit,
        AdamW,
        AdamW8bit,
        AdEMAMix,
        AdEMAMix8bit,
        LAMB8bit,
        LARS8bit,
        Lion,
        Lion8bit,
        RMSprop,
        RMSprop8bit,
        SGD8bit,
    )
    from holdfast.optim.optimizer import BlockwiseOptimizer
    from holdfast.optim.quantize import codebook, dequantize_blockwise, quantize_blockwise
    from holdfast.optim.schedules import learning_rate
    from holdfast.optim.segments import set_segments

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "BlockwiseOptimizer",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "OptimConfig",
    "OptimName",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
    "StableEmbedding",
    "StateTensor",
    "build_optimizer",
    "codebook",
    "dequantize_blockwise",
    "describe_state",
    "ensure_state",
    "learning_rate",
    "load_scalars",
    "parameter_groups",
    "quantize_blockwise",
    "scalars",
    "set_segments",
]

_MODULES = {
    "build": ("build_optimizer", "ensure_state", "parameter_groups"),
    "config": ("OptimConfig", "OptimName"),
    "describe": ("StateTensor", "describe_state", "load_scalars", "scalars"),
    "embedding": ("StableEmbedding",),
    "optimizer": ("BlockwiseOptimizer",),
    "quantize": ("codebook", "dequantize_blockwise", "quantize_blockwise"),
    "schedules": ("learning_rate",),
    "segments": ("set_segments",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:  # Any: whatever the module holds; type checkers read the imports above
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'family')}"), name)
